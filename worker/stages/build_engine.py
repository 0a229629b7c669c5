"""Engines for the given target: each is built, checked against the source model, measured; the fastest is kept.

An engine whose outputs are wrong is never kept. Of the right ones, those that meet the job's goals come first, then
those that meet at least its quality goals; among equals the fastest wins. Where none meets them the fastest is
returned all the same, and the stage's gate decides about it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from shared.errors import StageFailed
from shared.recipe import BuildEngine, ModelFormat
from shared.report import Candidate, GoalResult, Measurement, Parity, judge
from worker import engines
from worker.benchmark import complexity_of, first, measure, side_by_side
from worker.context import Model, StageContext, StageResult
from worker.data import Floats
from worker.engines import Runner, archive
from worker.evaluate import parity, parity_inputs, run_in_batches
from worker.loading import load_onnx_checked


@dataclass(frozen=True)
class Built:
    """One engine on disk, loaded, and how its outputs compare with the source model's."""

    model: Model
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


def run(stage: BuildEngine, model: Model, ctx: StageContext) -> StageResult:
    """Raises StageFailed (no_engine) if no engine's outputs agree with the source model's within the tolerance."""
    inputs, reference = parity_inputs(ctx.samples("evaluation")), np.load(ctx.reference)
    model = _normalized(model, ctx.directory)

    # build every engine and check its outputs on real samples
    built: list[Built] = []
    refused: list[Candidate] = []
    for position, engine in enumerate(stage.engines):
        ctx.progress(0.05 + 0.3 * position / len(stage.engines), f"building {engine}")
        found = _build(engine, stage, model, ctx, inputs, reference)
        if isinstance(found, Candidate):
            refused.append(found)
        else:
            built.append(found)
    if not built:
        raise StageFailed(
            f"No engine is right: {'; '.join(f'{candidate.engine}: {candidate.reason}' for candidate in refused)}.",
            code="no_engine",
        )

    # measure those that are right side by side
    measured = _measure(built, model, ctx)

    # choose one
    best = min(measured, key=lambda entry: entry.rank)
    ctx.progress(0.95, f"packing {best.built.runner.engine}")
    path = _pack(best.built, stage, model, ctx)
    candidates = [_candidate(entry, best, measured) for entry in measured] + refused
    ctx.progress(1.0)
    return StageResult(
        Model(ModelFormat.ENGINE, path, precision=model.precision),
        details={"engine": best.built.runner.engine, "target": stage.targets[0], "precision": model.precision},
        candidates=candidates,
        measurement=best.measurement,
        parity=best.built.parity,
    )


# ---------------------------------------------------------------- building


def _normalized(model: Model, directory: Path) -> Model:
    """The model as `load_onnx_checked` gives it: a customer's ONNX may not have been through a stage yet."""
    content = load_onnx_checked(model.path).SerializeToString(deterministic=True)
    if content == model.path.read_bytes():
        return model
    path = directory / "portable.onnx"
    path.write_bytes(content)
    return replace(model, path=path)


def _build(
    engine: str, stage: BuildEngine, model: Model, ctx: StageContext, inputs: Floats, reference: Floats
) -> Built | Candidate:
    """The engine, if its outputs are right; or else why it is not considered."""
    directory = ctx.directory / engine
    directory.mkdir()
    runtime = engines.load(engine)
    try:
        files = Model(ModelFormat.ENGINE, runtime.build(model, directory), precision=model.precision)
        runner = runtime.open(files, ctx.recipe.benchmark.threads)
        agreement = parity(reference, run_in_batches(runner.run, inputs), stage.tolerance)
    except StageFailed as error:
        return Candidate(
            engine=engine, precision=model.precision, measurement=None, parity=None, kept=False, reason=error.detail
        )
    if not agreement.passed:
        reason = f"its outputs are wrong: relative error {agreement.relative_error:.2g}, tolerance {stage.tolerance:g}"
        return Candidate(
            engine=engine, precision=model.precision, measurement=None, parity=agreement, kept=False, reason=reason
        )
    return Built(files, runner, agreement)


# ---------------------------------------------------------------- measuring


def _measure(built: Sequence[Built], model: Model, ctx: StageContext) -> list[Measured]:
    samples, settings = ctx.samples("evaluation"), ctx.recipe.benchmark
    ctx.progress(0.4, "timing the engines side by side")
    times = side_by_side([entry.runner for entry in built], first(samples, settings.batches[0]), settings)
    complexity = complexity_of(model, samples)
    found = []
    for position, (entry, times_ms) in enumerate(zip(built, times, strict=True)):
        ctx.progress(0.5 + 0.4 * position / len(built), f"evaluating {entry.runner.engine}")
        measurement = measure(
            entry.model, entry.runner, samples, ctx.recipe, complexity=complexity, times_ms=times_ms
        )
        goals = [judge(goal, ctx.baseline, measurement) for goal in ctx.recipe.goals]
        found.append(Measured(entry, measurement, goals))
    return found


def _candidate(entry: Measured, best: Measured, measured: Sequence[Measured]) -> Candidate:
    return Candidate(
        engine=entry.built.runner.engine,
        precision=entry.built.runner.precision,
        measurement=entry.measurement,
        parity=entry.built.parity,
        kept=entry is best,
        reason=_reason(entry, best, measured),
    )


def _reason(entry: Measured, best: Measured, measured: Sequence[Measured]) -> str:
    missed = ", ".join(
        f"{result.goal.kind} of {result.goal.metric} is {result.reached:.4g}, asked {result.goal.value:g}"
        for result in entry.missed
    )
    if entry is best:
        among = "the only one that is right"
        if len(measured) > 1:
            fastest = all(entry.measurement.latency_ms.p50 <= other.measurement.latency_ms.p50 for other in measured)
            among = f"the {'fastest' if fastest else 'best'} of {len(measured)}"
        return f"{among}, though it misses a goal: {missed}" if missed else among
    if entry.rank[:2] > best.rank[:2]:
        return f"misses a goal: {missed}"
    slower = entry.measurement.latency_ms.p50 / best.measurement.latency_ms.p50
    return f"{slower:.2f} times the latency of {best.built.runner.engine}"


# ---------------------------------------------------------------- packing


def _pack(best: Built, stage: BuildEngine, model: Model, ctx: StageContext) -> Path:
    """One zip: manifest, engine files, portable ONNX (which for ONNX Runtime is the engine)."""
    entry = best.model.path
    files = {path.name: path for path in engines.load(best.runner.engine).files(entry)}
    notes = [archive.note(name, path, "engine") for name, path in files.items()]
    if "model.onnx" not in files:
        files["model.onnx"] = model.path
        notes.append(archive.note("model.onnx", model.path, "portable"))
    graph = load_onnx_checked(model.path).graph
    manifest = archive.Manifest(
        engine=best.runner.engine,
        target=stage.targets[0],
        precision=best.runner.precision,
        entry=entry.name,
        portable="model.onnx",
        inputs=[_port(value) for value in graph.input],
        outputs=[_port(value) for value in graph.output[:1]],
        preprocessing=ctx.recipe.data.preprocessing,
        task=ctx.recipe.task,
        versions={**best.runner.versions, "burnish": importlib.metadata.version("burnish")},
        files=notes,
    )
    path = ctx.directory / "engine.zip"
    archive.write(path, manifest, files)
    return path


def _port(value: onnx.ValueInfoProto) -> archive.Port:
    dimensions = value.type.tensor_type.shape.dim
    return archive.Port(
        name=value.name, shape=[entry.dim_value if entry.HasField("dim_value") else None for entry in dimensions]
    )
