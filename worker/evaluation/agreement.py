"""How close a model's outputs are to another's on real samples, without labels: each output by what it is.

The largest difference is reported and never judged: one boundary voxel of two million must not veto an engine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shared.errors import StageFailed
from shared.recipe import Goal, Task
from shared.report import Agreement, Bound, OutputAgreement
from worker.data import Samples
from worker.engines import Runner
from worker.engines.batching import refuse_other_axes
from worker.evaluation.outputs import Ints, best_class, class_axis, is_one_channel, labels_above, threshold_of
from worker.evaluation.overlap import Doubles
from worker.evaluation.statistics import jackknife_bound, numbered, share_bound
from worker.feed import Floats, Inputs

Rule = Literal["broken", "close"]
Decisions = npt.NDArray[Any]

MAX_SAMPLES = 16
MAX_SMALL_SAMPLES = 64  # where a sample's outputs are few, so that decisions are not compared on 16 of them alone
SMALL_OUTPUTS = 4096
MAX_GOAL_SAMPLES = 512  # where a goal is of agreement, as many as MAX_GOAL_VALUES outputs hold
MAX_GOAL_VALUES = 2**22
MAX_OUTPUTS = 100
WORST_ERROR = float(np.finfo(np.float32).max)
LEAST_SPREAD = 1e-3  # a spread below this share of the values' size is rounding, and no scale

# What passes. RMS errors as measured: of int8 that kept its metric .01 to .10, of int8 that lost it .6 to .84; of
# symmetric int8 of a U-Net, which OpenVINO runs wrongly if it has not converted it, .15 to .18; .02 otherwise.
# One decision of a saturated softmax that flips, of 16 of 10 classes, is an RMS error of .37 by itself.
CLOSE_RMS = 0.1  # of values and of maps
CLOSE_DICE = 0.9  # of maps
CLOSE_DECISIONS_RMS = 0.5  # of single decisions
CLOSE_DECISIONS = 0.9
BROKEN_RMS = 0.9  # about as wrong as one constant value
BROKEN_DICE = 0.5


# ---------------------------------------------------------------- reference


def keep_reference(
    runner: Runner, samples: Samples, path: Path, batch: int = 4, *, goals: Sequence[Goal] = ()
) -> bool:
    """Write what the runner puts out on samples that are spread over the part: 16, or 64 where outputs are small, or
    up to 512 where one of the `goals` is of agreement.

    The first output goes to `path` (.npy), output i of a network that has several to `<stem>.<i>.npy` beside it.
    Returns whether every number of it is finite.
    """
    outputs = run_all_in_batches(runner, samples.feed(samples.spread(MAX_SAMPLES)), batch)
    size = sum(output[0].size for output in outputs)
    count = MAX_SMALL_SAMPLES if size <= SMALL_OUTPUTS else MAX_SAMPLES
    if any(goal.of_agreement for goal in goals):
        count = max(count, min(MAX_GOAL_VALUES // size, MAX_GOAL_SAMPLES))
    if min(count, len(samples)) > len(outputs[0]):
        outputs = run_all_in_batches(runner, samples.feed(samples.spread(count)), batch)
    for index, output in enumerate(outputs):
        np.save(_reference_path(path, index), output)
    return all(bool(np.isfinite(output).all()) for output in outputs)


def load_reference(path: Path) -> list[Floats]:
    """Every output that `keep_reference` wrote, memory-mapped."""
    paths = [found for index in range(MAX_OUTPUTS) if (found := _reference_path(path, index)).exists()]
    return [np.load(found, mmap_mode="r") for found in paths]


def reference_inputs(samples: Samples, reference: Sequence[Floats]) -> Inputs:
    """The inputs of the samples that the reference was made of."""
    return samples.feed(samples.spread(len(reference[0])))


def run_all_in_batches(runner: Runner, inputs: Inputs, batch: int = 4) -> list[Floats]:
    """Every raw output of all inputs, `batch` at a time. Raises StageFailed (output_mismatch) where the samples are not
    an output's first axis."""
    parts = []
    for start in range(0, len(inputs), batch):
        stretch = inputs[start : start + batch]
        parts.append(runner.run_all(stretch))
        refuse_other_axes(parts[-1], len(stretch))
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _reference_path(path: Path, index: int) -> Path:
    return path.with_suffix(f".{index}.npy") if index else path


# ---------------------------------------------------------------- comparing


def compare(
    runner: Runner, samples: Samples, reference: Path, task: Task, rule: Rule, batch: int = 4
) -> Agreement:
    """Agreement of every output, run `batch` samples at a time, with the kept ones.

    Raises StageFailed (output_mismatch).
    """
    kept = load_reference(reference)
    outputs = run_all_in_batches(runner, reference_inputs(samples, kept), batch)
    groups = None
    if samples.groups is not None:
        groups = np.array(samples.groups)[samples.spread(len(kept[0]))]
    return agreement_of(kept, outputs, task, rule, groups=groups)


def agreement_of(
    reference: Sequence[Floats],
    outputs: Sequence[Floats],
    task: Task,
    rule: Rule,
    names: Sequence[str] | None = None,
    groups: Ints | None = None,
) -> Agreement:
    """Agreement of outputs (n, ...) with the reference's; the task is read from the first of them.

    `groups` (n,) say which samples belong together; None: each stands by itself.

    Raises StageFailed (output_mismatch) where number or shapes differ.
    """
    _check_shapes(reference, outputs)
    names = names or [f"output {index}" for index in range(len(reference))]
    number = numbered(groups, len(reference[0]))
    judged = [
        _compare_output(name, before, after, _meaning(before, task, index), rule, number)
        for index, (name, before, after) in enumerate(zip(names, reference, outputs, strict=True))
    ]
    return Agreement(samples=len(reference[0]), rule=rule, outputs=judged)


def as_metrics(agreement: Agreement) -> dict[str, float]:
    """The metrics of agreement that goals name: each the worst over the outputs; those of decisions only where an
    output has any."""
    outputs = agreement.outputs
    found = {"rms_error": max(output.rms_error for output in outputs)}
    decisions = [output.decisions for output in outputs if output.decisions is not None]
    dice = [output.dice for output in outputs if output.dice is not None]
    return found | ({"agreement": min(decisions)} if decisions else {}) | ({"fidelity_dice": min(dice)} if dice else {})


def bounds_of(agreement: Agreement, goals: Sequence[Goal]) -> list[Bound]:
    """One bound for each goal of agreement: the worst over the outputs."""
    metrics, found = as_metrics(agreement), list[Bound]()
    for goal in (goal for goal in goals if goal.of_agreement):
        its = [bound for output in agreement.outputs for bound in output.bounds if bound.metric == goal.metric]
        if its:
            worst = (min if goal.higher_is_better else max)(its, key=lambda bound: bound.bound)
            found.append(worst.model_copy(update={"value": metrics[goal.metric], "samples": agreement.samples}))
    return found


def max_relative_error(reference: Path, runner: Runner, samples: Samples) -> float:
    """Largest difference over the largest value of the kept outputs, worst over them: for conversions that must be
    exact. 3.4e38 where an output is not finite. Raises StageFailed (output_mismatch)."""
    kept = load_reference(reference)
    outputs = run_all_in_batches(runner, reference_inputs(samples, kept))
    _check_shapes(kept, outputs)
    return max(_closeness(before, after).max_error for before, after in zip(kept, outputs, strict=True))


def relative_rms(reference: Floats, outputs: Floats) -> float:
    """Root mean square of the difference, over the reference's standard deviation.

    So an offset that all values share gives no credit, and a map that is zero almost everywhere is judged by the little
    that is in it. 3.4e38 where the outputs are not finite.
    """
    return _closeness(reference, outputs).rms_error


def _check_shapes(reference: Sequence[Floats], outputs: Sequence[Floats]) -> None:
    if len(outputs) != len(reference):
        raise StageFailed(
            f"The model has {len(outputs)} outputs, the source model {len(reference)}.", code="output_mismatch"
        )
    for before, after in zip(reference, outputs, strict=True):
        if before.shape != after.shape:
            raise StageFailed(
                f"The outputs have the shape {list(after.shape)}, the source model's {list(before.shape)}.",
                code="output_mismatch",
            )


@dataclass(frozen=True)
class Closeness:
    """How far two arrays of numbers are apart. Errors are 3.4e38 where the second is not finite.

    `rms_errors_without` (groups,) are the RMS errors of all samples but those of one group, for the jackknife;
    `squares` (groups,) the mean squared errors of a group's samples.
    """

    finite: bool
    rms_error: float  # over the reference's standard deviation
    max_error: float  # over the reference's largest value
    cosine: float
    rms_errors_without: Doubles
    squares: Doubles


def _closeness(reference: Floats, outputs: Floats, number: Ints | None = None) -> Closeness:
    """Taken sample by sample, so that volumes need no copies as large as themselves; `number` is each one's group."""
    if not np.isfinite(outputs).all():
        return Closeness(False, WORST_ERROR, WORST_ERROR, 0.0, np.empty(0), np.empty(0))
    mean = float(reference.mean(dtype=np.float64))
    names = ("reference", "outputs", "product", "spread", "difference")
    squares: dict[str, Doubles] = {name: np.zeros(len(reference)) for name in names}
    largest, error = 0.0, 0.0
    for index, (one, other) in enumerate(zip(reference, outputs, strict=True)):
        before, after = (np.asarray(values, dtype=np.float64).ravel() for values in (one, other))
        difference, centred = after - before, before - mean
        pairs = ((before, before), (after, after), (before, after), (centred, centred), (difference, difference))
        for name, (left, right) in zip(names, pairs, strict=True):
            squares[name][index] = float(left @ right)
        largest, error = max(largest, float(np.abs(before).max())), max(error, float(np.abs(difference).max()))
    total = {name: float(values.sum()) for name, values in squares.items()}
    sizes = math.sqrt(total["reference"] * total["outputs"])
    cosine = total["product"] / sizes if sizes > 0 else float(error == 0)
    groups = numbered(number, len(reference))
    by_group = {name: np.bincount(groups, squares[name]) for name in names}
    without = [
        _relative({name: total[name] - float(by_group[name][group]) for name in names})
        for group in range(len(by_group["difference"]))
    ]
    means = by_group["difference"] / np.bincount(groups)
    return Closeness(True, _relative(total), _ratio(error, largest), cosine, np.array(without), means)


def _relative(squares: dict[str, float]) -> float:
    """The RMS error, of sums of squares; those of all samples but one may be below 0 by rounding."""
    scale = math.sqrt(max(squares["spread"], LEAST_SPREAD**2 * squares["reference"], 0.0))
    return _ratio(math.sqrt(max(squares["difference"], 0.0)), scale)


def _ratio(error: float, scale: float) -> float:
    return 0.0 if error == 0 else min(error / scale, WORST_ERROR) if scale > 0 else WORST_ERROR


# ---------------------------------------------------------------- what an output is


@dataclass(frozen=True)
class Meaning:
    """What an output decides, found on the reference and never on what is compared with it.

    task: as the task says. one_of: probabilities or scores of classes along `axis`. above: each value by itself, at
    .5. itself: the values are class indices. values: nothing is decided.
    """

    kind: Literal["task", "one_of", "above", "itself", "values"]
    axis: int = 1
    task: Task | None = None

    def decisions(self, outputs: Floats) -> Decisions:
        """Class indices; or true and false, of each value or label."""
        if self.task is not None:
            return decisions(outputs, self.task)
        if self.kind == "one_of":
            return best_class(outputs, self.axis)
        return outputs > 0.5 if self.kind == "above" else np.rint(outputs).astype(np.int64)


def decisions(outputs: Floats, task: Task) -> Decisions:
    """What a task's output decides: a class for each sample, pixel or voxel; of a multilabel task, label by label, the
    label's number from 1 where it is found, and 0 elsewhere."""
    if task.kind == "multilabel":
        axis = class_axis(outputs, task) if outputs.ndim > 1 and len(task.classes) > 1 else 0
        found = labels_above(outputs, task, axis)
        number = np.arange(1, len(task.classes) + 1).reshape([-1 if at == axis else 1 for at in range(outputs.ndim)])
        return np.where(found, number, 0)
    if is_one_channel(outputs, task):
        return (outputs > threshold_of(task)).astype(np.int64)
    return best_class(outputs, class_axis(outputs, task))


def _meaning(reference: Floats, task: Task, index: int) -> Meaning:
    """Of the first output the task says it; of others, and of a raw task's, the values do."""
    if index == 0 and task.kind != "raw":
        return Meaning("task", task=task)
    low, high = float(reference.min()), float(reference.max())
    if low >= 0 and high <= 1.001:
        for axis in {1, reference.ndim - 1} if reference.ndim > 1 else ():
            if reference.shape[axis] > 1 and np.allclose(reference.sum(axis=axis), 1, atol=1e-3):
                return Meaning("one_of", axis)
        return Meaning("above") if low < 0.5 < high else Meaning("values")
    few_values = 0 <= low < high < MAX_CLASSES and bool((reference == np.rint(reference)).all())
    return Meaning("itself") if few_values else Meaning("values")


MAX_CLASSES = 1000


# ---------------------------------------------------------------- judging one output


def _compare_output(
    name: str, reference: Floats, outputs: Floats, meaning: Meaning, rule: Rule, number: Ints
) -> OutputAgreement:
    closeness = _closeness(reference, outputs, number)
    compared = None
    if meaning.kind != "values":
        compared = _compare_decisions(reference, outputs, meaning, number) if closeness.finite else NONE_EQUAL
    bounds = [] if compared is None else compared.bounds
    if closeness.finite:
        without, squares = closeness.rms_errors_without, closeness.squares
        bounds = [jackknife_bound("rms_error", closeness.rms_error, without, squares), *bounds]
    found = OutputAgreement(
        name=name,
        kind="values" if compared is None else "decisions",
        rms_error=closeness.rms_error,
        cosine=closeness.cosine,
        max_error=closeness.max_error,
        decisions=None if compared is None else compared.equal,
        dice=None if compared is None else compared.dice,
        bounds=bounds,
        passed=True,
    )
    reason = _reason(found, closeness.finite, rule, compared is not None and compared.is_map)
    return found.model_copy(update={"passed": reason is None, "reason": reason})


@dataclass(frozen=True)
class _Compared:
    """Decisions of an output beside the reference's: the share that is equal, and their class-wise Dice.

    `is_map`: a sample has a map of decisions, beyond one a class or label.
    """

    equal: float
    dice: float
    is_map: bool
    bounds: list[Bound]


NONE_EQUAL = _Compared(0.0, 0.0, False, [])


def _compare_decisions(reference: Floats, outputs: Floats, meaning: Meaning, number: Ints) -> _Compared:
    """The Dice is the mean over the classes that either decides, without the reference's commonest: that is what lies
    around the others."""
    counts: list[tuple[Counter[int], Counter[int], Counter[int]]] = []
    is_map, is_single = False, False
    for index in range(len(reference)):
        before, after = (meaning.decisions(values[index : index + 1]) for values in (reference, outputs))
        is_map, is_single = before.ndim > 2, before.size == 1
        counts.append((_count(before), _count(after), _count(before[before == after])))
    classes = sorted(set[int]().union(*(counter.keys() for counters in counts for counter in counters)))
    table = np.array([[[counter[one] for one in classes] for counter in counters] for counters in counts])  # (n, 3, k)
    total = table.sum(axis=0)
    others = np.arange(len(classes)) != total[0].argmax()
    by_group = np.zeros((number.max() + 1, *total.shape), dtype=np.int64)
    np.add.at(by_group, number, table)
    rest = total - by_group  # of all samples but those of one group
    equal, dice = float(_share_equal(total)), float(_dice(total[:, others]))
    of_equal = (
        share_bound("agreement", equal, len(rest))
        if is_single
        else jackknife_bound("agreement", equal, _share_equal(rest), 1 - _share_equal(by_group))
    )
    of_dice = jackknife_bound("fidelity_dice", dice, _dice(rest[:, :, others]))
    return _Compared(equal, dice, is_map, [of_equal, of_dice])


def _count(found: Decisions) -> Counter[int]:
    classes, counts = np.unique(found, return_counts=True)
    return Counter(dict(zip(classes.tolist(), counts.tolist(), strict=True)))


def _share_equal(counts: npt.NDArray[np.int64]) -> Doubles:
    """Of counts (..., 3, classes) in the reference, in the outputs, and in both."""
    shares: Doubles = counts[..., 2, :].sum(axis=-1) / np.maximum(counts[..., 0, :].sum(axis=-1), 1)
    return shares


def _dice(counts: npt.NDArray[np.int64]) -> Doubles:
    """Mean over the classes that either has, of such counts; 1 where none has any."""
    sizes = counts[..., 0, :] + counts[..., 1, :]
    scores = 2 * counts[..., 2, :] / np.maximum(sizes, 1)
    number = (sizes > 0).sum(axis=-1)
    means: Doubles = np.where(number > 0, scores.sum(axis=-1) / np.maximum(number, 1), 1.0)
    return means


def _reason(found: OutputAgreement, finite: bool, rule: Rule, is_map: bool) -> str | None:
    """Why an output does not pass, as a sentence; None if it does."""
    if not finite:
        return f"{found.name} has NaN or infinite values"
    differs = f"{found.name} differs from the source model's by an RMS error of {found.rms_error:.3g} of its spread"
    if found.kind == "values":
        limit = CLOSE_RMS if rule == "close" else BROKEN_RMS
        return f"{differs}; {limit:g} is accepted" if found.rms_error > limit else None
    assert found.decisions is not None
    assert found.dice is not None
    if rule == "broken":
        wild = found.rms_error > BROKEN_RMS and min(found.dice, found.decisions) < BROKEN_DICE
        return f"{differs}, and {100 * found.decisions:.1f} % of its decisions are equal" if wild else None
    if is_map and found.dice < CLOSE_DICE:
        overlap = f"overlap the source model's with a Dice of {found.dice:.3f}"
        return f"the decisions of {found.name} {overlap}; {CLOSE_DICE:g} is accepted"
    if not is_map and found.decisions < CLOSE_DECISIONS:
        equal = f"{100 * found.decisions:.1f} % of the decisions of {found.name} equal the source model's"
        return f"{equal}; {100 * CLOSE_DECISIONS:g} % is accepted"
    limit = CLOSE_RMS if is_map else CLOSE_DECISIONS_RMS
    return f"{differs}; {limit:g} is accepted" if found.rms_error > limit else None
