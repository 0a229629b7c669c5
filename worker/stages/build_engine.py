"""One engine a target: candidates are built, checked against the source model, measured; the best is packed.

All candidates of all CPU targets are measured in one go, so that they are compared at one moment. An engine that this
machine cannot run is built all the same, of the first form whose ONNX is right and meets the quality goals; it gets no
verdict, and the figures beside it are those of that ONNX.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from shared.errors import StageFailed
from shared.recipe import BuildEngine, ModelFormat
from shared.report import Candidate, GoalResult, TargetReport, verdict
from shared.targets import Target, TensorRtRtx, engines_of, name_of
from worker import engines
from worker.benchmark import first, percentiles
from worker.candidates import Built, Measured, best_of, build, forms, measure_all, refused, tell, why_wrong
from worker.cleanup import QUANTIZING, clean
from worker.context import Model, Progress, StageContext, StageResult
from worker.engines import archive, tensorrt
from worker.engines.cuda import CudaRunner
from worker.evaluate import hold
from worker.vetting import load_onnx_checked

ON_CPU = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Chosen:
    """A target's engine, packed, and what the report tells of it."""

    report: TargetReport
    path: Path

    @property
    def rank(self) -> tuple[bool, bool, bool]:
        """The lowest is delivered: one that was evaluated, that is right enough, that meets its goals."""
        missed = [result for result in self.report.goals if result.met is False]
        return not self.report.evaluated, any(result.goal.is_quality for result in missed), bool(missed)


def run(stage: BuildEngine, model: Model, ctx: StageContext) -> StageResult:
    """Raises StageFailed (no_engine) if for none of the targets there is an engine whose outputs are right."""
    ctx = replace(ctx, progress=_forward(ctx.progress))
    model = _cleaned(model, ctx.directory)
    measured, wrong = _on_cpu(stage, model, ctx)

    # choose and pack one engine a target
    chosen: list[Chosen] = []
    failed: list[TargetReport] = []
    for position, target in enumerate(stage.targets):
        span = (0.7 + 0.28 * position / len(stage.targets), 0.7 + 0.28 * (position + 1) / len(stage.targets))
        ctx.progress(span[0], f"packing the engine for {name_of(target)}")
        found = (
            _of_cpu(target, stage, measured, wrong, ctx)
            if engines_of(target)[0] in ON_CPU
            else _of_gpu(target, stage, model, ctx, span)
        )
        if isinstance(found, Chosen):
            chosen.append(found)
        else:
            failed.append(found)
    if not chosen:
        reasons = "; ".join(_why_failed(report) for report in failed)
        raise StageFailed(f"No engine is right: {reasons.rstrip('.')}.", code="no_engine")
    chosen.sort(key=lambda entry: entry.rank)  # the first is delivered; equals stay in the recipe's order
    best, others = chosen[0], chosen[1:]
    told = best.report
    ctx.progress(1.0)
    return StageResult(
        Model(
            ModelFormat.ENGINE,
            best.path,
            precision=str(told.precision),
            engines=tuple(other.path for other in others),
        ),
        details={"engine": told.engine, "target": told.target},
        candidates=told.candidates,
        targets=[told, *(other.report for other in others), *failed],
        measurement=told.measurement,
        parity=told.parity,
    )


def _cleaned(model: Model, directory: Path) -> Model:
    """The model with a graph that runtimes like: a customer's ONNX may not have been through a stage yet.

    A quantized graph comes of a clean one, or is a customer's own, and is left as it is but for its inputs.
    """
    checked = load_onnx_checked(model.path)
    content = checked.SerializeToString(deterministic=True)
    path = directory / "portable.onnx"
    if not any(node.op_type in QUANTIZING for node in checked.graph.node):
        clean(model.path, path)
        return replace(model, path=path)
    if content == model.path.read_bytes():
        return model
    path.write_bytes(content)
    return replace(model, path=path)


def _why_failed(report: TargetReport) -> str:
    reasons = "; ".join(f"{entry.engine} {entry.precision}: {entry.reason}" for entry in report.candidates)
    return reasons or f"{report.target}: {report.reason}"


# ---------------------------------------------------------------- on this machine's CPU


def _on_cpu(stage: BuildEngine, model: Model, ctx: StageContext) -> tuple[list[Measured], list[Candidate]]:
    """Every candidate of every CPU target: those that are right, measured, and those that are not."""
    orders = [(engine, form) for engine in stage.engines if engine in ON_CPU for form in forms(model, engine)]
    built: list[Built] = []
    wrong: list[Candidate] = []
    for position, (engine, form) in enumerate(orders):
        ctx.progress(0.02 + 0.28 * position / len(orders), f"building {engine} {form.precision}")
        found = build(engine, form, model, stage.tolerance, ctx)
        if isinstance(found, Built):
            built.append(found)
        else:
            wrong.append(found)
    return (measure_all(built, model, ctx, (0.3, 0.7)) if built else []), wrong


def _of_cpu(
    target: Target, stage: BuildEngine, measured: list[Measured], wrong: list[Candidate], ctx: StageContext
) -> Chosen | TargetReport:
    names = engines_of(target)
    mine = [entry for entry in measured if entry.built.runner.engine in names]
    not_mine = [entry for entry in wrong if entry.engine in names]
    if not mine:
        return _none(target, not_mine)
    best = best_of(mine)
    candidates = [tell(entry, best, mine) for entry in mine] + not_mine
    built = best.built
    path, engine_bytes = _pack(
        built.runner.engine, built.model, built.portable, target, built.runner.versions, stage, ctx
    )
    return Chosen(_evaluated(target, best, candidates, engine_bytes), path)


# ---------------------------------------------------------------- for a GPU


def _of_gpu(
    target: Target, stage: BuildEngine, model: Model, ctx: StageContext, span: tuple[float, float]
) -> Chosen | TargetReport:
    """The engine of the first form that is right as ONNX, meets the quality goals, and that TensorRT takes."""
    edition = engines_of(target)[0]
    capability = target.compute_capability if isinstance(target, TensorRtRtx) else None
    why_not = tensorrt.not_here(edition, capability)
    tried: list[Candidate] = []
    spare: tuple[Model, Built, Measured, Candidate] | None = None
    for form in model.candidates("tensorrt"):
        portable = _as_onnx(form, stage, ctx)
        if isinstance(portable, Candidate):
            tried.append(portable.model_copy(update={"engine": edition}))
            continue
        try:
            engine = _build_for_gpu(form, target, stage, ctx, span)
        except StageFailed as error:
            reason = error.detail if error.hint is None else f"{error.detail} {error.hint}"
            tried.append(refused(edition, form.precision, reason))
            continue
        found = portable if why_not is not None else _opened(engine, form, stage, ctx)
        if isinstance(found, Candidate):
            tried.append(found)
            continue
        (measured,) = measure_all([found], model, ctx, ((span[0] + span[1]) / 2, span[1]))
        if not measured.rank[0]:
            return _packed_for_gpu(target, engine, found, measured, tried, why_not, stage, ctx)
        missed = ", ".join(_asked(result) for result in measured.missed if result.goal.is_quality)
        tried.append(refused(edition, form.precision, f"misses {missed}", found.parity))
        spare = spare or (engine, found, measured, tried[-1])
    if spare is None:
        return _none(target, tried)
    engine, found, measured, told = spare
    others = [entry for entry in tried if entry is not told]
    return _packed_for_gpu(target, engine, found, measured, others, why_not, stage, ctx)


def _asked(result: GoalResult) -> str:
    return f"{result.goal.kind} of {result.goal.metric}: {result.reached:.4g}, asked {result.goal.value:g}"


def _as_onnx(form: Model, stage: BuildEngine, ctx: StageContext) -> Built | Candidate:
    """The form in ONNX Runtime: what an engine of it would put out, if its outputs are right."""
    try:
        runner = engines.load("onnxruntime").open(form, ctx.recipe.benchmark.threads)
        held = hold(runner, ctx.samples("evaluation"), ctx.reference, stage.tolerance, ctx.recipe.task)
    except StageFailed as error:
        return refused("onnxruntime", form.precision, error.detail)
    if not held.passed:
        return refused("onnxruntime", form.precision, why_wrong(held), held)
    return Built(Model(ModelFormat.ENGINE, form.path, precision=form.precision), form.path, runner, held)


def _build_for_gpu(
    form: Model, target: Target, stage: BuildEngine, ctx: StageContext, span: tuple[float, float]
) -> Model:
    edition = engines_of(target)[0]
    directory = ctx.directory / f"{name_of(target)}-{form.precision}"
    directory.mkdir()
    plan = tensorrt.Plan(
        edition,
        sample=first(ctx.samples("evaluation"), 1).shape[1:],
        batches=stage.batches,
        compute_capability=target.compute_capability if isinstance(target, TensorRtRtx) else None,
        workspace_bytes=stage.workspace_bytes,
        timing_cache=None if edition == "tensorrt_rtx" else ctx.directory / tensorrt.timing_cache_name(),
    )

    def progress(fraction: float, message: str = "") -> None:
        ctx.progress(span[0] + fraction * 0.5 * (span[1] - span[0]), message)

    known = None if plan.timing_cache is None else ctx.timings.load(plan.timing_cache.name)
    if plan.timing_cache is not None and known is not None:
        plan.timing_cache.write_bytes(known.read_bytes())
    path = tensorrt.build(form, directory, plan, progress)
    if plan.timing_cache is not None:
        ctx.timings.save(plan.timing_cache.name, plan.timing_cache)
    return Model(ModelFormat.ENGINE, path, precision=form.precision)


def _opened(engine: Model, form: Model, stage: BuildEngine, ctx: StageContext) -> Built | Candidate:
    """The engine on this machine's GPU, if its outputs are right."""
    try:
        runner = tensorrt.open(engine, 1)
        held = hold(runner, ctx.samples("evaluation"), ctx.reference, stage.tolerance, ctx.recipe.task)
    except StageFailed as error:
        return refused(tensorrt.EDITIONS[engine.path.suffix], engine.precision, error.detail)
    if not held.passed:
        return refused(runner.engine, engine.precision, why_wrong(held), held)
    return Built(engine, form.path, runner, held)


def _packed_for_gpu(
    target: Target,
    engine: Model,
    found: Built,
    measured: Measured,
    tried: list[Candidate],
    why_not: str | None,
    stage: BuildEngine,
    ctx: StageContext,
) -> Chosen:
    edition = engines_of(target)[0]
    versions = {edition: tensorrt.library(edition).__version__}
    path, engine_bytes = _pack(edition, engine, found.portable, target, versions, stage, ctx)
    if why_not is None:
        kept = tell(measured, measured, [measured])
        report = _evaluated(target, measured, [kept, *tried], engine_bytes)
        times = _device_times(found, ctx)
        return Chosen(report.model_copy(update={"device_latency_ms": percentiles(times)}), path)
    reason = f"built, and not run here: {why_not}; the figures are those of its ONNX in {found.runner.engine}"
    kept = refused(edition, engine.precision, reason).model_copy(update={"kept": True})
    report = TargetReport(
        target=name_of(target),
        engine=edition,
        precision=engine.precision,
        evaluated=False,
        engine_bytes=engine_bytes,
        measurement=measured.measurement,
        parity=found.parity,
        candidates=[kept, *tried],
        goals=[GoalResult(goal=goal, reached=None, met=None) for goal in ctx.recipe.goals],
        verdict="not_evaluated",
        reason=reason,
    )
    return Chosen(report, path)


def _device_times(found: Built, ctx: StageContext) -> list[float]:
    """Milliseconds on the GPU alone, by events, after the runs that were timed from outside."""
    settings = ctx.recipe.benchmark
    assert isinstance(found.runner, CudaRunner)
    batch = first(ctx.samples("evaluation"), min(settings.batches[0], found.runner.max_batch))
    return [found.runner.device_ms(batch) for _ in range(settings.runs)]


# ---------------------------------------------------------------- telling


def _evaluated(target: Target, best: Measured, candidates: list[Candidate], engine_bytes: int) -> TargetReport:
    return TargetReport(
        target=name_of(target),
        engine=best.built.runner.engine,
        precision=best.built.runner.precision,
        evaluated=True,
        engine_bytes=engine_bytes,
        measurement=best.measurement,
        parity=best.built.parity,
        candidates=candidates,
        goals=best.goals,
        verdict=verdict(best.goals, delivered=True),
        reason=next(entry.reason for entry in candidates if entry.kept),
    )


def _none(target: Target, candidates: list[Candidate]) -> TargetReport:
    return TargetReport(
        target=name_of(target),
        engine=None,
        precision=None,
        evaluated=False,
        engine_bytes=None,
        measurement=None,
        parity=None,
        candidates=candidates,
        goals=[],
        verdict="missed",
        reason="no engine is right",
    )


# ---------------------------------------------------------------- packing


def _pack(
    runtime: str,
    engine: Model,
    portable: Path,
    target: Target,
    versions: dict[str, str],
    stage: BuildEngine,
    ctx: StageContext,
) -> tuple[Path, int]:
    """One zip: manifest, engine files, portable ONNX (which for ONNX Runtime is the engine); and the engine's bytes."""
    files = {path.name: path for path in engines.load(runtime).files(engine.path)}
    notes = [archive.note(name, path, "engine") for name, path in files.items()]
    engine_bytes = sum(note.size_bytes for note in notes)
    if "model.onnx" not in files:
        files["model.onnx"] = portable
        notes.append(archive.note("model.onnx", portable, "portable"))
    graph = load_onnx_checked(portable).graph
    manifest = archive.Manifest(
        engine=runtime,
        target=name_of(target),
        compute_capability=target.compute_capability if isinstance(target, TensorRtRtx) else None,
        batches=None if runtime in ON_CPU else stage.batches,
        precision=engine.precision,
        entry=engine.path.name,
        portable="model.onnx",
        inputs=[_port(value) for value in graph.input],
        outputs=[_port(value) for value in graph.output],
        preprocessing=ctx.recipe.data.preprocessing,
        task=ctx.recipe.task,
        versions={**versions, "burnish": importlib.metadata.version("burnish")},
        files=notes,
    )
    path = ctx.directory / f"{name_of(target)}.zip"
    archive.write(path, manifest, files)
    return path, engine_bytes


def _forward(progress: Progress) -> Progress:
    """Progress that never goes back: a target may take several forms until TensorRT takes one."""
    furthest = 0.0

    def told(fraction: float, message: str = "") -> None:
        nonlocal furthest
        furthest = max(furthest, fraction)
        progress(furthest, message)

    return told


def _port(value: onnx.ValueInfoProto) -> archive.Port:
    dimensions = value.type.tensor_type.shape.dim
    return archive.Port(
        name=value.name,
        dtype="int64" if value.type.tensor_type.elem_type == onnx.TensorProto.INT64 else "float32",
        shape=[entry.dim_value if entry.HasField("dim_value") else None for entry in dimensions],
    )
