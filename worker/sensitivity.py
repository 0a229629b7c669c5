"""Which layers int8 hurts, and how few of them must stay in float.

Everything here is judged on samples of the calibration part, on those that gave no range where there are enough of
them. The evaluation part has no say in what is chosen: it only checks the result, in the stage's gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shared.recipe import Goal, Task
from shared.report import metric_loss
from worker.context import StageContext
from worker.data import Samples
from worker.engines import Runner
from worker.evaluate import Run, evaluate, parity, run_in_batches
from worker.feed import Array, Floats, Inputs

MIN_HELD_OUT = 16
MAX_JUDGED = 256  # samples behind the metrics
MAX_COMPARED = 16  # of them, samples whose raw outputs are compared
MAX_RANKED = 8  # of those, samples that layers are ranked on


@dataclass(frozen=True)
class Judge:
    """Whether a quantized network is right enough: its raw outputs against fp32's, its metrics against the goals."""

    samples: Samples
    held_out: bool
    inputs: Inputs
    expected: Floats
    tolerance: float
    task: Task
    goals: Sequence[Goal]
    source: Mapping[str, float]

    def missed(self, run: Run) -> str | None:
        """What is missed, as one sentence; None if nothing is."""
        found = parity(self.expected, run_in_batches(run, self.inputs), self.tolerance)
        if not found.passed:
            return f"its outputs differ from fp32's by {found.relative_error:.3g}, {self.tolerance:g} is accepted"
        if not self.goals:
            return None
        metrics, _ = evaluate(run, self.samples, self.task)
        missed = [goal for goal in self.goals if _misses(goal, self.source, metrics)]
        told = [f"{goal.kind} of {goal.metric} is {goal.value:g}, it is {metrics.get(goal.metric)}" for goal in missed]
        return "; ".join(told) or None

    def metric(self, run: Run) -> float | None:
        """The task's leading metric; None where the samples have no labels."""
        if not self.task.metrics or self.samples.read_target is None:
            return None
        return evaluate(run, self.samples, self.task)[0].get(self.task.metrics[0])

    def of(self, fp32: Run) -> Judge:
        """The same judge, on the same samples and for the same goals, of what is made of another network."""
        return replace(self, expected=run_in_batches(fp32, self.inputs))

    def error(self, run: Run) -> float:
        """Root mean square of the difference from fp32's outputs, over that of fp32's outputs."""
        difference = run_in_batches(run, self.inputs[:MAX_RANKED]) - self.expected[:MAX_RANKED]
        scale = float(np.sqrt(np.square(self.expected[:MAX_RANKED], dtype=np.float64).mean()))
        found = float(np.sqrt(np.square(difference, dtype=np.float64).mean())) / max(scale, 1e-12)
        return found if np.isfinite(found) else np.finfo(np.float64).max


def appoint(
    fp32: Runner,
    source: Callable[[], Runner],
    drawn: Sequence[int],
    tolerance: float,
    ctx: StageContext,
    kept_out: Sequence[int] = (),
) -> Judge:
    """The judge of what is made of `fp32`; `drawn` are the positions of the samples that gave the ranges.

    Where calibration samples have no labels it judges on the train part's, at the positions that are `kept_out` of
    training, if there are any. A quality goal that the fp32 network misses on these samples is not asked of its int8.
    """
    part = ctx.samples("calibration")
    if part.read_target is None and kept_out:
        part, drawn = _at(ctx.samples("train"), kept_out), ()
    samples, held_out = _held_out(part, drawn)
    inputs = samples.feed(samples.spread(MAX_COMPARED))
    asked = [goal for goal in ctx.recipe.goals if goal.is_quality] if samples.read_target is not None else []
    before: dict[str, float] = {}
    if asked:
        before, _ = evaluate(source().run, samples, ctx.recipe.task)
        after, _ = evaluate(fp32.run, samples, ctx.recipe.task)
        asked = [goal for goal in asked if not _misses(goal, before, after)]
    expected = run_in_batches(fp32.run, inputs)
    return Judge(samples, held_out, inputs, expected, tolerance, ctx.recipe.task, asked, before)


def _held_out(part: Samples, drawn: Sequence[int]) -> tuple[Samples, bool]:
    """At most 256 samples, evenly spaced over those that were not drawn, or over all where too few are left."""
    left = sorted(set(range(len(part))) - set(drawn))
    held_out = len(left) >= MIN_HELD_OUT
    pool = left if held_out else list(range(len(part)))
    count = min(MAX_JUDGED, len(pool))
    return _at(part, [pool[index * len(pool) // count] for index in range(count)]), held_out


def _at(part: Samples, positions: Sequence[int]) -> Samples:
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


def _misses(goal: Goal, before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    held = goal.value if goal.kind == "threshold" else before.get(goal.metric)
    reached = after.get(goal.metric)
    if held is None or reached is None:
        return held is not None
    return metric_loss(goal.metric, held, reached) > (0 if goal.kind == "threshold" else goal.value)


# ---------------------------------------------------------------- the layers


@dataclass(frozen=True)
class Hurt:
    """A layer, and the error of the network's outputs when it alone is in int8."""

    layer: str
    error: float


def rank(layers: Sequence[str], alone: Callable[[str], Run], judge: Judge, told: Callable[[float], None]) -> list[Hurt]:
    """Every layer, the one that int8 hurts most first; `alone` runs the network with that one layer in int8."""
    found = []
    for position, layer in enumerate(layers):
        told(position / len(layers))
        found.append(Hurt(layer, judge.error(alone(layer))))
    return sorted(found, key=lambda hurt: (-hurt.error, hurt.layer))


@dataclass(frozen=True)
class Attempt:
    """One int8 form: its file, its layers in float, what it misses, and how much faster than fp32 it is."""

    path: Path
    runner: Runner
    in_float: tuple[str, ...]
    missed: str | None
    speedup: float | None


def rescue(
    ranking: Sequence[Hurt],
    limit: int,
    attempt: Callable[[tuple[str, ...]], Attempt],
    pays: Callable[[Attempt], bool],
) -> list[Attempt]:
    """Put the worst layers back into float one by one, until nothing is missed or int8 no longer pays.

    Every attempt, the last one last. One layer at least stays in int8.
    """
    tried: list[Attempt] = []
    for count in range(1, min(limit, len(ranking) - 1) + 1):
        tried.append(attempt(tuple(hurt.layer for hurt in ranking[:count])))
        if tried[-1].missed is None or not pays(tried[-1]):
            break
    return tried
