"""Metrics of decisions that are no mean over samples: from a table of labels, decisions and probabilities.

Each is worked out for the whole table and, at once, for the table without each group of rows: what statistics.py makes
bounds of.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from worker.evaluation.outputs import Bools, Ints
from worker.evaluation.overlap import Doubles

ECE_BINS = 15


@dataclass(frozen=True)
class Records:
    """One row a sample. `truth` and `found` (n, classes) say which classes a sample has and was given: one each, or,
    of a multilabel task, any number."""

    truth: Bools
    found: Bools
    probabilities: npt.NDArray[np.float32]  # (n, classes)
    multilabel: bool

    def __len__(self) -> int:
        return len(self.truth)


def by_class(name: str, records: Records) -> Doubles | None:
    """The metric of each class (classes,), NaN where it is not defined; None where it is one figure for all classes."""
    values = _without_groups(name, records, np.arange(1), np.zeros(len(records), dtype=np.int64), keep=True)
    return None if values.shape[1] == 1 and len(records.truth.T) > 1 else values[0]


def mean(name: str, records: Records) -> float:
    """The metric of the whole table: the mean over the classes that it is defined for; NaN if it is for none."""
    values = _without_groups(name, records, np.arange(1), np.zeros(len(records), dtype=np.int64), keep=True)
    return float(_nanmean(values)[0])


def without_each(name: str, records: Records, groups: Ints) -> Doubles:
    """The metric (num_groups,) of the table without the rows of each group; groups are numbered from 0.

    NaN where leaving out the group changes the classes that the metric is defined for.
    """
    values = _without_groups(name, records, np.arange(groups.max() + 1), groups, keep=False)
    whole = _without_groups(name, records, np.arange(1), np.zeros(len(records), dtype=np.int64), keep=True)
    found = _nanmean(values)
    found[(np.isnan(values) != np.isnan(whole)).any(axis=1)] = np.nan
    return found


def rows_behind(name: str, records: Records, groups: Ints) -> int:
    """What a mean over classes rests on: groups that hold the rarest class, times the classes that there are.

    Of specificity, groups without the class; of a multilabel task, the rarer of both.
    """
    sides = [records.truth, ~records.truth] if records.multilabel else [records.truth]
    sides = [~records.truth] if name == "specificity" else sides
    held = [np.zeros((int(groups.max()) + 1, records.truth.shape[1]), dtype=bool) for _ in sides]
    for table, side in zip(held, sides, strict=True):
        np.logical_or.at(table, groups, side)
    counts = np.min([table.sum(axis=0) for table in held], axis=0)
    counts = counts[counts > 0]
    return int(counts.min() * len(counts)) if len(counts) else 0


# ---------------------------------------------------------------- the table of functions


def _without_groups(name: str, records: Records, which: Ints, groups: Ints, keep: bool) -> Doubles:
    """The metric (groups, classes) of the rows outside each group; with `keep`, of all rows (one group)."""
    if name == "auroc":
        return _auroc(records, which, groups, keep)
    if name == "ece":
        return _ece(records, which, groups, keep)
    truth, found = records.truth, records.found
    sums = [_outside(table, which, groups, keep) for table in (truth & found, truth, found, np.ones_like(truth))]
    with np.errstate(invalid="ignore", divide="ignore"):
        return _COUNTED[name](Sums(*sums), records.multilabel)


def _outside(table: npt.NDArray[np.generic], which: Ints, groups: Ints, keep: bool) -> Doubles:
    """Sums of the columns outside each group."""
    total: Doubles = table.sum(axis=0, dtype=np.float64)[None]
    if keep:
        return total
    inside = np.zeros((len(which), table.shape[1]))
    np.add.at(inside, groups, table.astype(np.float64))
    outside: Doubles = total - inside
    return outside


def _nanmean(values: Doubles) -> Doubles:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
        found: Doubles = np.nanmean(values, axis=1)
    return found


@dataclass(frozen=True)
class Sums:
    """Rows by class, (groups, classes) each: right ones, those that have the class, those given it, and all."""

    both: Doubles
    truth: Doubles
    found: Doubles
    rows: Doubles


def _sensitivity(sums: Sums, multilabel: bool) -> Doubles:
    return sums.both / sums.truth


def _specificity(sums: Sums, multilabel: bool) -> Doubles:
    return (sums.rows - sums.truth - sums.found + sums.both) / (sums.rows - sums.truth)


def _balanced_accuracy(sums: Sums, multilabel: bool) -> Doubles:
    recall = _sensitivity(sums, multilabel)
    return (recall + _specificity(sums, multilabel)) / 2 if multilabel else recall


def _f1(sums: Sums, multilabel: bool) -> Doubles:
    return 2 * sums.both / (sums.truth + sums.found)


def _kappa(sums: Sums, multilabel: bool) -> Doubles:
    number = sums.rows[:, :1]
    observed = sums.both.sum(axis=1, keepdims=True) / number
    by_chance = (sums.truth * sums.found).sum(axis=1, keepdims=True) / number**2
    return np.where(by_chance < 1, (observed - by_chance) / (1 - by_chance), np.nan)


_COUNTED: dict[str, Callable[[Sums, bool], Doubles]] = {
    "sensitivity": _sensitivity,
    "specificity": _specificity,
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _f1,
    "kappa": _kappa,
}
NAMES = ("auroc", "ece", *_COUNTED)


def _auroc(records: Records, which: Ints, groups: Ints, keep: bool) -> Doubles:
    """By the pairs of a row that has the class and one that has not: the share that is in the right order."""
    columns = []
    for truth, score in zip(records.truth.T, records.probabilities.T, strict=True):
        ranks = rankdata(score)
        order = np.empty(len(score))  # of each row, the right pairs it is in
        order[truth] = ranks[truth] - rankdata(score[truth])
        order[~truth] = truth.sum() - (ranks[~truth] - rankdata(score[~truth]))
        positive = _outside(truth[:, None], which, groups, keep)[:, 0]
        negative = _outside(~truth[:, None], which, groups, keep)[:, 0]
        if keep:
            right = np.array([order[truth].sum()])
        else:
            taken = np.bincount(groups, order, minlength=len(which)) - _pairs_within(truth, score, groups, len(which))
            right = order[truth].sum() - taken
        with np.errstate(invalid="ignore"):
            columns.append(np.where(positive * negative > 0, right / (positive * negative), np.nan))
    return np.stack(columns, axis=1)


def _pairs_within(truth: Bools, score: npt.NDArray[np.float32], groups: Ints, count: int) -> Doubles:
    """Right pairs of rows of one group, which both rows have counted."""
    found = np.zeros(count)
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.cumsum(np.bincount(groups, minlength=count))[:-1]):
        if len(rows) > 1:
            above, below = score[rows][truth[rows]], score[rows][~truth[rows]]
            found[groups[rows[0]]] = (above[:, None] > below).sum() + (above[:, None] == below).sum() / 2
    return found


def ece_bias(records: Records, groups: Ints) -> float:
    """How far the calibration error may lie above its true value by chance alone: a gap's size is never below zero.

    The mean of |x| is at most sqrt(2 / pi) times its standard deviation above |its mean|, for each bin and label.
    """
    biases = []
    for gaps in _gaps(records):
        by_group = np.zeros((int(groups.max()) + 1, ECE_BINS))
        np.add.at(by_group, groups, gaps)
        biases.append(np.sqrt(2 / np.pi) * np.sqrt(np.square(by_group).sum(axis=0)).sum() / len(records))
    return float(np.mean(biases))


def _ece(records: Records, which: Ints, groups: Ints, keep: bool) -> Doubles:
    """Mean distance of confidence and accuracy over 15 bins, by rows: of the class found, or of each label."""
    rows = _outside(np.ones((len(records), 1)), which, groups, keep)[:, 0]
    with np.errstate(invalid="ignore"):
        columns = [np.abs(_outside(gaps, which, groups, keep)).sum(axis=1) / rows for gaps in _gaps(records)]
    return np.stack(columns, axis=1)


def _gaps(records: Records) -> Iterator[Doubles]:
    """Rightness less confidence of each row, in the column of its bin, (n, 15); of several labels once for each."""
    confidence, right = records.probabilities, records.truth
    if not records.multilabel:
        confidence = confidence.max(axis=1, keepdims=True)
        right = np.asarray((right & records.found).any(axis=1, keepdims=True))
    for sure, correct in zip(confidence.T, right.T, strict=True):
        bins = np.minimum((sure * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        gaps = np.zeros((len(records), ECE_BINS))
        gaps[np.arange(len(records)), bins] = correct.astype(np.float64) - sure
        yield gaps
