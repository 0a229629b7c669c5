"""How much a network lost in int8, on samples of the calibration part: every output, and the metric where labels are.

Nothing here reads the job's goals or its evaluation part: what is quantized serves any goal, and the evaluation part
only checks the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shared.metrics import loss_of
from shared.recipe import Task
from worker.data import Samples
from worker.engines import Runner
from worker.evaluation.agreement import relative_rms, run_all_in_batches
from worker.evaluation.metrics import evaluate
from worker.feed import Array, Floats, Inputs

MIN_HELD_OUT = 16
MAX_LABELLED = 256  # samples behind the metric
MAX_LABELLED_MAPS = 64  # where each sample is many decisions
MAX_COMPARED = 16  # of them, samples whose raw outputs are compared
MAX_RMS_WITH_LABELS = 1.0  # as wrong as one constant value; the metric decides below
AS_GOOD_AS_FLOAT = 0.01  # RMS error at which a metric's loss is chance


@dataclass(frozen=True)
class Level:
    """How much int8 may lose: relative RMS error of each output, and of the leading metric where there are labels."""

    name: str
    rms_error: float
    loss: float


GOOD = Level("good", rms_error=0.1, loss=0.01)
CLOSE = Level("close", rms_error=0.03, loss=0.0025)
LEVELS = (GOOD, CLOSE)


@dataclass(frozen=True)
class Quality:
    """What was lost: the relative RMS error of each output, and of the leading metric (None without labels).

    `grain` is what one sample's decision weighs in the metric: a loss of so much is not yet one.
    """

    errors: tuple[float, ...]
    loss: float | None = None
    grain: float = 0.0

    @property
    def rms_error(self) -> float:
        return max(self.errors)

    def reaches(self, level: Level) -> bool:
        """The metric decides on the first output, closeness on those that it does not read."""
        first, *others = self.errors
        if any(error > level.rms_error for error in others):
            return False
        if self.loss is None or first <= AS_GOOD_AS_FLOAT:
            return first <= level.rms_error
        return first <= MAX_RMS_WITH_LABELS and self.loss <= max(level.loss, self.grain)

    @property
    def num_levels(self) -> int:
        """How many levels it reaches."""
        return sum(self.reaches(level) for level in LEVELS)

    @property
    def rank(self) -> tuple[int, float, float]:
        """The lower the better."""
        return -self.num_levels, self.loss or 0.0, self.rms_error

    def describe(self) -> str:
        """What was lost, in words."""
        lost = "" if self.loss is None else f", and {100 * self.loss:.2g} points of the leading metric"
        return f"its outputs differ from the float network's by {self.rms_error:.2g} (relative RMS error){lost}"


@dataclass(frozen=True)
class QualityCheck:
    """What int8 is compared with: a float network's outputs, and its leading metric on samples with labels."""

    samples: Samples
    held_out: bool  # whether the samples gave no range
    inputs: Inputs
    outputs: list[Floats]
    task: Task
    metric: float | None

    def of(self, runner: Runner) -> Quality:
        outputs = run_all_in_batches(runner, self.inputs)
        errors = tuple(relative_rms(*pair) for pair in zip(self.outputs, outputs, strict=True))
        if self.metric is None:
            return Quality(errors)
        grain = 1 / len(self.samples) if self.task.target == "labels" else 0.0
        after = _metric(runner, self.samples, self.task)
        return Quality(errors, 1.0 if after is None else self.lost(after), grain)

    def error(self, runner: Runner, num_samples: int | None = None) -> float:
        """The largest relative RMS error of the outputs, on the first `num_samples` compared samples (None: all)."""
        outputs = run_all_in_batches(runner, self.inputs[:num_samples])
        return max(relative_rms(its[:num_samples], found) for its, found in zip(self.outputs, outputs, strict=True))

    def lost(self, metric: float) -> float:
        """How much worse another network's metric is."""
        return 0.0 if self.metric is None else loss_of(self.task.metrics[0], self.metric, metric)

    def of_network(self, network: Runner) -> QualityCheck:
        """The same samples, for what is made of another float network."""
        metric = None if self.metric is None else _metric(network, self.samples, self.task)
        return replace(self, outputs=run_all_in_batches(network, self.inputs), metric=metric)

    @property
    def num_passes(self) -> int:
        """Samples that `of` runs."""
        return len(self.inputs) + (0 if self.metric is None else len(self.samples))

    @property
    def origin(self) -> str:
        """Which samples these are, in the report's words."""
        if self.samples.part == "train":
            return "train samples"
        return "calibration samples that gave no range" if self.held_out else "calibration samples"


def quality_check(
    network: Runner, part: Samples, drawn: Sequence[int], task: Task, labelled: Samples | None = None
) -> QualityCheck:
    """The check of what is made of `network`, on the calibration part; `drawn` are the samples that gave the ranges.

    Where these have no labels, `labelled` samples that nothing learns from are taken, if there are any.
    """
    if part.read_target is None and labelled is not None and len(labelled) > 0:
        part, drawn = labelled, ()
    has_labels = part.read_target is not None and bool(task.metrics)
    wanted = (MAX_LABELLED if task.target == "labels" else MAX_LABELLED_MAPS) if has_labels else MAX_COMPARED
    samples, held_out = _held_out(part, drawn, wanted)
    inputs = samples.feed(samples.spread(MAX_COMPARED))
    metric = _metric(network, samples, task) if has_labels else None
    return QualityCheck(samples, held_out, inputs, run_all_in_batches(network, inputs), task, metric)


def _metric(runner: Runner, samples: Samples, task: Task) -> float | None:
    return evaluate(runner.run, samples, task).means.get(task.metrics[0])


def _held_out(part: Samples, drawn: Sequence[int], wanted: int) -> tuple[Samples, bool]:
    """Evenly spaced samples of those that were not drawn, or of all where too few are left."""
    left = sorted(set(range(len(part))) - set(drawn))
    held_out = len(left) >= MIN_HELD_OUT
    pool = left if held_out else list(range(len(part)))
    count = min(wanted, len(pool))
    return at(part, [pool[index * len(pool) // count] for index in range(count)]), held_out


def at(part: Samples, positions: Sequence[int]) -> Samples:
    """The samples at these positions, as a part of their own."""
    read_target = part.read_target
    return replace(
        part,
        num_samples=len(positions),
        read_input=lambda index: part.read_input(positions[index]),
        read_target=None if read_target is None else lambda index: read_target(positions[index]),
        read_others={name: _moved(read, positions) for name, read in part.read_others.items()},
    )


def _moved(read: Callable[[int], Array], positions: Sequence[int]) -> Callable[[int], Array]:
    return lambda index: read(positions[index])
