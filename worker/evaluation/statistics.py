"""How sure a quality figure is: one-sided 95 % bounds, paired sample by sample with the source model, by group.

A share of right decisions has intervals of its own: Tango's for a difference of pairs, Clopper-Pearson's for itself. A
mean of per-sample scores has a bootstrap-t over groups. A metric that is no mean is made one by the jackknife: its
pseudo-values, one a group, are treated as scores, at 97.5 %. Agreement has a bound on the scale of the logarithm.
No method sees what happens in none of the samples: failures of fewer than 3 in n may well be absent among n. So every
bound of a metric of labels also allows for those, up to a size. benchmarks/verdicts.py tries this by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta
from scipy.stats import t as student

from shared.evidence import CLOPPER_PEARSON, LEVEL, TOO_FEW, UNSEEN_LOSS, unseen_share
from shared.metrics import AGREEMENT, METRICS, Metric, loss_of
from shared.recipe import Goal
from shared.report import Bound
from worker.evaluation import records
from worker.evaluation.metrics import Evaluation
from worker.evaluation.outputs import Ints
from worker.evaluation.overlap import Doubles

RESAMPLES = 10_000
LEAST_RESAMPLES = 2000
MAX_DRAWS = 40_000_000  # resamples times groups: where there are many groups, fewer resamples say the same
DRAWS_AT_ONCE = 4_000_000
Z_PAIRS = 1.70
RECOMPUTED_LEVEL = 0.025  # by the jackknife; with .05, up to 8 % of true losses lie beyond their bounds
MOST_SPREADS = 50.0  # a bound lies at most so many standard errors away
LEAST_OF_MEAN = 1e-3  # where a group's error is a smaller share of the mean, errors are not taken for log-normal
LARGEST = float(np.finfo(np.float32).max)  # of a bound: a report has no infinity


def bounds(
    goals: Sequence[Goal],
    source: Evaluation,
    result: Evaluation,
    groups: Ints | None,
    seed: int,
    resamples: int = RESAMPLES,
) -> list[Bound]:
    """One bound for each quality goal whose metric was evaluated; those of agreement have bounds of their own.

    `groups` (n,) say which samples belong together; None: each stands by itself.
    """
    found = (
        _bound(goal, source, result, groups, seed, resamples)
        for goal in goals
        if goal.is_quality and not goal.of_agreement
    )
    return [bound for bound in found if bound is not None]


def _bound(
    goal: Goal, source: Evaluation, result: Evaluation, groups: Ints | None, seed: int, resamples: int
) -> Bound | None:
    name, metric = goal.metric, METRICS[goal.metric]
    before = source if goal.kind == "max_drop" else None
    if name not in result.means or (before is not None and name not in before.means):
        return None
    value = result.means[name] if before is None else loss_of(name, before.means[name], result.means[name])
    losses = _losses(name, before, result, groups)
    if name == "top1" and losses.each_alone:
        upper, method = _of_decisions(losses.sums, before is not None)
    else:
        upper, method = upper_bound(losses, _unseen_size(metric, source, losses), seed, resamples)
        upper += losses.bias
    # losses of a threshold are the metric itself, turned so that more is worse
    turned = before is None and metric.higher_is_better
    bound = -upper if turned else upper
    if metric.high is not None:
        worst = _worst(metric, None if before is None else before.means[name])
        bound = max(bound, worst) if turned else min(bound, worst)
    return Bound(metric=name, kind=goal.kind, value=value, bound=bound, groups=len(losses.sums), method=method)


def _worst(metric: Metric, before: float | None) -> float:
    """The worst value of a metric in 0..1, or the most that can be lost of `before`."""
    assert metric.high is not None
    end = metric.low if metric.higher_is_better else metric.high
    return end if before is None else abs(before - end)


# ---------------------------------------------------------------- losses by group


@dataclass(frozen=True)
class Losses:
    """What is bounded: the mean of losses, of which each group has `sums` of `sizes` samples.

    `value` is the figure as it is reported; `evidence` the number of groups in which a failure could have shown.
    """

    sums: Doubles  # (groups,)
    sizes: Doubles
    value: float
    evidence: int
    mean_size: float  # samples a group
    bias: float = 0.0  # by how much `value` may be too small for another reason than chance
    level: float = LEVEL

    @property
    def each_alone(self) -> bool:
        return self.mean_size == 1


def _losses(name: str, before: Evaluation | None, after: Evaluation, groups: Ints | None) -> Losses:
    """The losses by group, or, of a threshold (`before` is None), the metric turned so that more is worse."""
    sign = -1.0 if METRICS[name].higher_is_better else 1.0
    if name in after.scores:
        scores = sign * after.scores[name] - (0.0 if before is None else sign * before.scores[name])
        return losses_of(scores, groups)
    assert after.records is not None
    number = numbered(groups, len(after.records))
    value = sign * records.mean(name, after.records)
    without = sign * records.without_each(name, after.records, number)
    bias = 0.0
    if before is not None:
        assert before.records is not None
        value -= sign * records.mean(name, before.records)
        bias = records.ece_bias(before.records, number) if name == "ece" else 0.0
        without = without - sign * records.without_each(name, before.records, number)
    count = len(without)
    pseudo_values = count * value - (count - 1) * without
    evidence = records.rows_behind(name, after.records, number)
    return Losses(pseudo_values, np.ones(count), value, evidence, len(number) / count, bias, RECOMPUTED_LEVEL)


def losses_of(scores: Doubles, groups: Ints | None) -> Losses:
    """Losses (n,) of samples, by group."""
    number = numbered(groups, len(scores))
    sums, sizes = (np.bincount(number, weights).astype(np.float64) for weights in (scores, None))
    return Losses(sums, sizes, float(scores.mean()), len(sums), len(scores) / len(sums))


def numbered(groups: Ints | None, count: int) -> Ints:
    """Each sample's group, numbered from 0 without gaps."""
    return np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]


def _unseen_size(metric: Metric, source: Evaluation, losses: Losses) -> float:
    """How much a group may lose that was not seen to lose: 20 points where samples are scored; where they are decided
    right or wrong, at least one of its samples; of a distance, as much again as the source model has."""
    if metric.unit == "distance":
        return max(source.means.get(metric.name, 0.0), 1.0)
    if metric.name in SCORED or metric.high is None:
        return UNSEEN_LOSS
    return max(UNSEEN_LOSS, 1 / losses.mean_size) * (metric.high - metric.low)


SCORED = ("dice", "iou", "nsd", "auroc", "ece")


# ---------------------------------------------------------------- decisions, one by one


def _of_decisions(losses: Doubles, paired: bool) -> tuple[float, str]:
    """Of losses that are -1, 0 or 1 (paired), or of decisions that are right (-1) or wrong (0)."""
    count = len(losses)
    if paired:
        return tango_bound(int((losses > 0).sum()), int((losses < 0).sum()), count), "Tango score interval"
    return -_lowest_share(int((losses < 0).sum()), count), CLOPPER_PEARSON


def share_bound(metric: str, share: float, count: int) -> Bound:
    """Of the share of samples that are decided alike; `count` is the number of groups, each counted as one decision."""
    bound = _lowest_share(math.floor(share * count + 1e-9), count)
    return Bound(metric=metric, kind="threshold", value=share, bound=bound, groups=count, method=CLOPPER_PEARSON)


def _lowest_share(right: int, count: int) -> float:
    return float(beta.ppf(LEVEL, right, count - right + 1)) if right else 0.0


def tango_bound(worse: int, better: int, count: int) -> float:
    """One-sided 95 % upper bound of the share of right decisions lost, by Tango's score interval for pairs (1998).

    `worse` samples were decided rightly before and wrongly after, `better` the other way round. With z = 1.645 its
    exact level rises to .066; with 1.70, and never below what Clopper-Pearson says of `worse`, it stays below .05.
    """
    low, high = (worse - better) / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        # the likeliest share of `better` if the loss were `middle`
        b = -worse - better + (2 * count - worse + better) * middle
        c = -better * middle * (1 - middle)
        share = (np.sqrt(max(b * b - 8 * count * c, 0.0)) - b) / (4 * count)
        inside = (count * middle - worse + better) ** 2 < Z_PAIRS**2 * count * (2 * share + middle * (1 - middle))
        low, high = (middle, high) if inside else (low, middle)
    exact = float(beta.ppf(1 - LEVEL, worse + 1, count - worse)) if worse < count else 1.0
    return max(high, exact - better / count)


# ---------------------------------------------------------------- agreement


def jackknife_bound(metric: str, value: float, without: Doubles, errors: Doubles | None = None) -> Bound:
    """Of a metric of agreement, from its values (groups,) on all samples but those of one group.

    The bound is computed on the error: of a share, what it lacks of 1. `errors` (groups,) are each group's own, of
    rms_error its mean squared error, on any common scale; where they are None, the jackknife estimates them.
    """
    turned = AGREEMENT[metric].higher_is_better
    error, others = (1 - value, 1 - without) if turned else (value, without)
    worst, method = math.inf, TOO_FEW
    if len(without) >= 2:
        worst, method = _largest_error(error, others, 1 if turned else 2, errors), "jackknife"
    bound = max(1 - worst, AGREEMENT[metric].low) if turned else min(worst, LARGEST)
    return Bound(metric=metric, kind="threshold", value=value, bound=bound, groups=len(without), method=method)


def _largest_error(error: float, without: Doubles, power: int, errors: Doubles | None) -> float:
    """The upper bound of an error whose `power` is a mean over groups, by Student's t at 97.5 %.

    Some samples err far more than others, so the jackknife is on the scale of the logarithm. Where the tail is longest
    it does not reach far enough; Cox's interval of a log-normal mean (Zhou and Gao 1997) does: the larger one counts.
    """
    if error <= 0:
        return error
    count = len(without)
    away = float(student.ppf(1 - RECOMPUTED_LEVEL, count - 1))
    upper = away * _jackknife_error(without) / error  # of log(error)
    if errors is None:
        errors = count - (count - 1) * (without / error) ** power
    if errors.min() > LEAST_OF_MEAN**power * errors.mean():
        logarithms = np.log(errors / errors.mean())
        variance = float(logarithms.var(ddof=1))
        width = away * math.sqrt(variance / count + variance**2 / (2 * (count - 1)))
        upper = max(upper, (float(logarithms.mean()) + variance / 2 + width) / power)
    return error * math.exp(min(upper, MOST_SPREADS))


def _jackknife_error(without: Doubles) -> float:
    return math.sqrt((len(without) - 1) / len(without) * float(np.square(without - without.mean()).sum()))


# ---------------------------------------------------------------- means over groups


def upper_bound(losses: Losses, unseen_size: float, seed: int, resamples: int = RESAMPLES) -> tuple[float, str]:
    """One-sided 95 % upper bound of the mean loss, and its method.

    Bootstrap-t or Student's t over groups, or what failures that were not seen may cost, each `unseen_size`: whichever
    lies furthest away. So equal losses are never taken for certainty.
    """
    groups = len(losses.sums)
    unseen = unseen_size * unseen_share(max(losses.evidence, 1))
    if groups < 2 or not np.isfinite(losses.sums).all():
        return losses.value + MOST_SPREADS * unseen_size, TOO_FEW
    rest = losses.sums - losses.sums.sum() / losses.sizes.sum() * losses.sizes  # (groups,)
    spread = _standard_error(float(np.square(rest).sum()), float(losses.sizes.sum()), groups)
    away = max(
        -_low_quantile(rest, losses.sizes, seed, resamples, losses.level),
        float(student.ppf(1 - losses.level, groups - 1)),
    )
    sampled = min(away, MOST_SPREADS) * spread
    if sampled < unseen:
        return losses.value + unseen, "what failures that were not seen may cost"
    return losses.value + sampled, f"bootstrap-t over {'samples' if losses.each_alone else 'groups'}"


def _standard_error(squares: float, number: float, groups: int) -> float:
    """Of a mean over groups of unequal sizes: a ratio of two sums."""
    return float(np.sqrt(squares * groups / (groups - 1)) / number)


def _low_quantile(rest: Doubles, sizes: Doubles, seed: int, resamples: int, level: float) -> float:
    """The `level` quantile of (resampled mean - mean) / resampled standard error (Efron and Tibshirani 1993, 12.5)."""
    groups = len(rest)
    resamples = max(min(resamples, MAX_DRAWS // groups), min(resamples, LEAST_RESAMPLES))
    generator = np.random.default_rng(seed)
    columns = np.stack([rest, sizes, rest**2, rest * sizes, sizes**2], axis=1)
    ratios = []
    for start in range(0, resamples, step := max(DRAWS_AT_ONCE // groups, 1)):
        count = min(step, resamples - start)
        drawn = generator.integers(groups, size=(count, groups)) + groups * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * groups).reshape(count, groups)
        total, number, squares, cross, size_squares = (times @ columns).T
        shift = total / number
        left = np.maximum(squares - 2 * shift * cross + shift**2 * size_squares, 0)
        left[left < 1e-12 * squares] = 0  # rounding: every drawn group has one mean
        errors = np.sqrt(left * groups / (groups - 1)) / number
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(np.nan_to_num(shift / errors, nan=0.0, posinf=np.inf, neginf=-np.inf))
    return float(np.quantile(np.concatenate(ratios), level, method="lower"))
