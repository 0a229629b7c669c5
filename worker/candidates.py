"""Engines that are held against each other: built in every form, checked, timed in turns, and the best one chosen.

An engine whose outputs are wrong is never chosen. Of the right ones, those that meet the job's goals come first, then
those that meet at least its quality goals; among equals the fastest wins. No precision and no runtime wins everywhere:
int8 can be slower than fp32, and one runtime's int8 wrong in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.errors import StageFailed
from shared.recipe import ModelFormat
from shared.report import Candidate, GoalResult, Measurement, Parity, judge
from worker import engines
from worker.benchmark import complexity_of, first, measure, side_by_side
from worker.context import Model, StageContext
from worker.engines import Runner
from worker.evaluate import hold


@dataclass(frozen=True)
class Built:
    """One engine on disk, loaded, what it was built of, and how its outputs compare with the source model's."""

    model: Model
    portable: Path
    runner: Runner
    parity: Parity


@dataclass(frozen=True)
class Measured:
    """A built engine with its figures, and the goals that it was held against."""

    built: Built
    measurement: Measurement
    goals: list[GoalResult]

    @property
    def missed(self) -> list[GoalResult]:
        return [result for result in self.goals if result.met is False]

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """The lowest is the best: right enough, all goals met, fast."""
        misses_quality = any(result.goal.is_quality for result in self.missed)
        return misses_quality, bool(self.missed), self.measurement.latency_ms.p50


def forms(model: Model, engine: str) -> list[Model]:
    """What is worth building for a runtime: the model's forms, and in OpenVINO each fp32 one in bf16 where it can."""
    found = model.candidates(engine)
    if engine == "openvino" and engines.load(engine).has_bf16():
        found += [replace(form, precision="bf16") for form in found if form.precision == "fp32"]
    return found


def build(engine: str, form: Model, model: Model, tolerance: float, ctx: StageContext) -> Built | Candidate:
    """The engine, if its outputs are right; or else why it is not considered. `model` is what the form is a form of."""
    directory = ctx.directory / f"{engine}-{form.precision}"
    directory.mkdir()
    runtime = engines.load(engine)
    try:
        files = Model(ModelFormat.ENGINE, runtime.build(form, directory), precision=form.precision)
        runner = runtime.open(files, ctx.recipe.benchmark.threads)
        agreement = hold(runner, ctx.samples("evaluation"), ctx.reference, tolerance, ctx.recipe.task)
    except StageFailed as error:
        return refused(engine, form.precision, error.detail)
    if not agreement.passed:
        return refused(engine, form.precision, why_wrong(agreement), agreement)
    return Built(files, form.path if form.path.suffix == ".onnx" else model.path, runner, agreement)


def why_wrong(found: Parity) -> str:
    return f"its outputs are wrong: relative error {found.relative_error:.2g}, tolerance {found.tolerance:g}"


def refused(engine: str, precision: str, reason: str, found: Parity | None = None) -> Candidate:
    """An engine that was not measured."""
    return Candidate(engine=engine, precision=precision, measurement=None, parity=found, kept=False, reason=reason)


def measure_all(built: Sequence[Built], model: Model, ctx: StageContext, span: tuple[float, float]) -> list[Measured]:
    """Figures of every engine. All of them and the source model are timed in turns, so that a ratio is of one moment.

    `span` is the part of the stage's progress that this is.
    """
    samples, settings = ctx.samples("evaluation"), ctx.recipe.benchmark
    begin, end = span
    ctx.progress(begin, "timing the engines and the source model in turns")
    runners = [source_runner(ctx), *(entry.runner for entry in built)]
    source_ms, *times = side_by_side(runners, first(samples, settings.batches[0]), settings)
    complexity = complexity_of(model, samples)
    found = []
    for position, (entry, times_ms) in enumerate(zip(built, times, strict=True)):
        share = (1 + position) / (1 + len(built))
        ctx.progress(begin + share * (end - begin), f"evaluating {entry.runner.engine} {entry.runner.precision}")
        measurement = measure(
            entry.model,
            entry.runner,
            samples,
            ctx.recipe,
            complexity=complexity,
            times_ms=times_ms,
            baseline_times_ms=source_ms,
        )
        goals = [judge(goal, ctx.baseline, measurement) for goal in ctx.recipe.goals]
        found.append(Measured(entry, measurement, goals))
    return found


def source_runner(ctx: StageContext) -> Runner:
    """The source model as the baseline ran it."""
    home = "torch eager" if ctx.source.format == ModelFormat.TORCH else "onnxruntime"
    runner: Runner = engines.load(home).open(ctx.source, ctx.recipe.benchmark.threads)
    return runner


# ---------------------------------------------------------------- choosing


def best_of(measured: Sequence[Measured]) -> Measured:
    return min(measured, key=lambda entry: entry.rank)


def tell(entry: Measured, best: Measured, measured: Sequence[Measured]) -> Candidate:
    """The candidate for the report, with the reason why it is kept or not."""
    return Candidate(
        engine=entry.built.runner.engine,
        precision=entry.built.runner.precision,
        measurement=entry.measurement,
        parity=entry.built.parity,
        kept=entry is best,
        reason=reason(entry, best, measured),
    )


def reason(entry: Measured, best: Measured, measured: Sequence[Measured]) -> str:
    """Why an engine is kept or not, in words."""
    missed = ", ".join(
        f"{result.goal.kind} of {result.goal.metric} is {result.reached:.4g}, asked {result.goal.value:g}"
        for result in entry.missed
    )
    if entry is best:
        among = "the only one that is right"
        if len(measured) > 1:
            fastest = all(_p50(entry) <= _p50(other) for other in measured)
            among = f"the {'fastest' if fastest else 'best'} of {len(measured)}"
        return f"{among}, though it misses a goal: {missed}" if missed else among
    if entry.rank[:2] > best.rank[:2]:
        return f"misses a goal: {missed}"
    slower = f"{_p50(entry) / _p50(best):.2f} times the latency of {_name(best)}"
    float_ones = [other for other in measured if _float_twin(entry, other) and _p50(other) < _p50(entry)]
    if not float_ones:
        return slower
    twin = min(float_ones, key=_p50)
    precision = entry.built.runner.precision
    pays = f"{precision} does not pay here: {_p50(entry) / _p50(twin):.2f} times the latency of {_name(twin)}"
    return pays if twin is best else f"{pays}, {slower}"


def _float_twin(entry: Measured, other: Measured) -> bool:
    """Whether the other is the same runtime's fp32, and this one has fewer bits."""
    same = entry.built.runner.engine == other.built.runner.engine
    return same and other.built.runner.precision == "fp32" != entry.built.runner.precision


def _p50(entry: Measured) -> float:
    return entry.measurement.latency_ms.p50


def _name(entry: Measured) -> str:
    return f"{entry.built.runner.engine} {entry.built.runner.precision}"
