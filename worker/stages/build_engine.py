"""One engine a target: candidates are built, compared with the source model, measured; the best is packed.

All candidates of all CPU targets are measured in one go, so that they are compared at one moment; the source model's
own fp32 graph is one of them, so that nothing slower is delivered. An engine that this machine cannot run is built all
the same, of the first form whose ONNX is right and meets the quality goals; it gets no verdict, and the figures beside
it are those of that ONNX.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from shared.errors import StageFailed
from shared.judging import verdict
from shared.recipe import BuildEngine, ModelFormat
from shared.report import Candidate, GoalResult, TargetReport
from shared.targets import Target, TensorRtRtx, engines_of, name_of
from worker import engines
from worker.benchmark import Timed, first, latency_of
from worker.candidates import Built, Contender, as_candidate, build, choose, compare, distinct, finish, forms, refused
from worker.cleanup import QUANTIZING, clean
from worker.context import Model, Progress, StageContext, StageResult
from worker.engines import archive, tensorrt
from worker.engines.cuda import CudaRunner
from worker.environment import instruction_sets
from worker.ranking import MISSES_QUALITY
from worker.vetting import load_onnx_checked
from worker.wording import missed_words

ON_CPU = ("onnxruntime", "openvino")
DEVICE_RUNS = 100


@dataclass(frozen=True)
class Chosen:
    """A target's engine, packed, and what the report says of it."""

    report: TargetReport
    path: Path

    @property
    def rank(self) -> tuple[bool, bool, bool]:
        """The lowest is delivered: one that was evaluated, that is right enough, that meets its goals."""
        missed = [result for result in self.report.goals if result.outcome == "missed"]
        return not self.report.evaluated, any(result.goal.is_quality for result in missed), bool(missed)


def run(stage: BuildEngine, model: Model, ctx: StageContext) -> StageResult:
    """Raises StageFailed (no_engine) if for none of the targets there is an engine whose outputs are right."""
    ctx = replace(ctx, progress=_forward(ctx.progress))
    model = _cleaned(model, ctx.directory)
    contenders, not_built = _on_cpu(stage, model, ctx)

    # choose and pack one engine a target
    chosen: list[Chosen] = []
    failed: list[TargetReport] = []
    for position, target in enumerate(stage.targets):
        span = (0.7 + 0.28 * position / len(stage.targets), 0.7 + 0.28 * (position + 1) / len(stage.targets))
        ctx.progress(span[0], f"packing the engine for {name_of(target)}")
        result = (
            _for_cpu(target, stage, contenders, not_built, ctx)
            if engines_of(target)[0] in ON_CPU
            else _for_gpu(target, stage, model, ctx, span)
        )
        if isinstance(result, Chosen):
            chosen.append(result)
        else:
            failed.append(result)
    if not chosen:
        reasons = "; ".join(_why_failed(report) for report in failed)
        raise StageFailed(f"No engine is right: {reasons.rstrip('.')}.", code="no_engine")
    chosen.sort(key=lambda entry: entry.rank)  # the first is delivered; equals stay in the recipe's order
    best, others = chosen[0], chosen[1:]
    report = best.report
    ctx.progress(1.0)
    return StageResult(
        Model(
            ModelFormat.ENGINE,
            best.path,
            precision=str(report.precision),
            engines=tuple(other.path for other in others),
        ),
        details={"engine": report.engine, "target": report.target},
        candidates=report.candidates,
        targets=[report, *(other.report for other in others), *failed],
        measurement=report.measurement,
        agreement=report.agreement,
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


def _on_cpu(stage: BuildEngine, model: Model, ctx: StageContext) -> tuple[list[Contender], list[Candidate]]:
    """Every candidate of every CPU target, compared; and those that could not be built."""
    names = [engine for engine in stage.engines if engine in ON_CPU]
    orders = [(engine, form, name) for engine in names for form, name in forms(model, engine, _source(engine, ctx))]
    built: list[Built] = []
    not_built: list[Candidate] = []
    for position, (engine, form, name) in enumerate(orders):
        ctx.progress(0.02 + 0.23 * position / len(orders), f"building {engine} {form.precision} {name}".rstrip())
        result = build(engine, form, name, model, ctx)
        if isinstance(result, Built):
            built.append(result)
        else:
            not_built.append(result)
    if not built:
        return [], not_built
    choices = [engines_of(target) for target in stage.targets if engines_of(target)[0] in ON_CPU]
    return compare(distinct(built), model, ctx, (0.25, 0.7), choices), not_built


def _source(engine: str, ctx: StageContext) -> Model | None:
    """The source model as ONNX: the customer's own file, for every runtime; or, of a network in PyTorch, what it was
    exported to, for ONNX Runtime."""
    if ctx.source.format == ModelFormat.ONNX:
        return ctx.source
    return ctx.onnxruntime()[0] if engine == "onnxruntime" else None


def _for_cpu(
    target: Target, stage: BuildEngine, contenders: list[Contender], not_built: list[Candidate], ctx: StageContext
) -> Chosen | TargetReport:
    names = engines_of(target)
    own = [entry for entry in contenders if entry.built.runner.engine in names]
    others = [entry for entry in not_built if entry.engine in names]
    best = choose(own)
    if best is None:
        return _none(target, [as_candidate(entry, None, own) for entry in own] + others)
    finish(best, ctx)
    candidates = [as_candidate(entry, best, own) for entry in own] + others
    built = best.built
    path, engine_bytes = _pack(
        built.runner.engine, built.model, built.portable, target, built.runner.versions, stage, ctx
    )
    return Chosen(_evaluated(target, best, candidates, engine_bytes, ctx), path)


# ---------------------------------------------------------------- for a GPU


def _for_gpu(
    target: Target, stage: BuildEngine, model: Model, ctx: StageContext, span: tuple[float, float]
) -> Chosen | TargetReport:
    """The engine of the first form that is right as ONNX, meets the quality goals, and that TensorRT takes."""
    edition = engines_of(target)[0]
    capability = target.compute_capability if isinstance(target, TensorRtRtx) else None
    why_not = tensorrt.not_here(edition, capability)
    tried: list[Candidate] = []
    spare: tuple[Model, Contender, Candidate] | None = None
    for form in model.candidates("tensorrt"):
        portable = _as_onnx(form, ctx)
        if isinstance(portable, Candidate):
            tried.append(portable.model_copy(update={"engine": edition}))
            continue
        try:
            engine = _build_for_gpu(form, target, stage, ctx, span)
        except StageFailed as error:
            reason = error.detail if error.hint is None else f"{error.detail} {error.hint}"
            tried.append(refused(edition, form.precision, reason, form.name))
            continue
        result = portable if why_not is not None else _opened(engine, form, ctx)
        if isinstance(result, Candidate):
            tried.append(result)
            continue
        half = (span[0] + span[1]) / 2
        (contender,) = compare([result], model, ctx, (half, span[1]), [(result.runner.engine,)])
        if not contender.is_right:
            why_wrong = contender.why_not or "its outputs are wrong"
            tried.append(refused(edition, form.precision, why_wrong, form.name, contender.agreement))
            continue
        if contender.rank[0] < MISSES_QUALITY:
            return _packed_for_gpu(target, engine, contender, tried, why_not, stage, ctx)
        missed = missed_words([result for result in contender.missed if result.goal.is_quality])
        tried.append(refused(edition, form.precision, f"misses {missed}", form.name, contender.agreement))
        spare = spare or (engine, contender, tried[-1])
    if spare is None:
        return _none(target, tried)
    engine, contender, refusal = spare
    others = [entry for entry in tried if entry is not refusal]
    return _packed_for_gpu(target, engine, contender, others, why_not, stage, ctx)


def _as_onnx(form: Model, ctx: StageContext) -> Built | Candidate:
    """The form in ONNX Runtime: what an engine of it would put out, if its outputs are right."""
    try:
        runner = engines.load("onnxruntime").open(form, ctx.recipe.benchmark.threads)
        found = Model(ModelFormat.ENGINE, form.path, precision=form.precision)
        agreement = ctx.evaluate(found, runner).agreement
    except StageFailed as error:
        return refused("onnxruntime", form.precision, error.detail, form.name)
    if not agreement.passed:
        why_wrong = f"its outputs are wrong: {agreement.reason}"
        return refused("onnxruntime", form.precision, why_wrong, form.name, agreement)
    return Built(found, form.path, runner)


def _build_for_gpu(
    form: Model, target: Target, stage: BuildEngine, ctx: StageContext, span: tuple[float, float]
) -> Model:
    edition = engines_of(target)[0]
    directory = ctx.directory / "-".join(part for part in (name_of(target), form.precision, form.name) if part)
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


def _opened(engine: Model, form: Model, ctx: StageContext) -> Built | Candidate:
    """The engine on this machine's GPU, if its outputs are right."""
    try:
        runner = tensorrt.open(engine, 1)
        agreement = ctx.evaluate(engine, runner).agreement
    except StageFailed as error:
        return refused(tensorrt.EDITIONS[engine.path.suffix], engine.precision, error.detail)
    if not agreement.passed:
        return refused(
            runner.engine, engine.precision, f"its outputs are wrong: {agreement.reason}", agreement=agreement
        )
    return Built(engine, form.path, runner)


def _packed_for_gpu(
    target: Target,
    engine: Model,
    contender: Contender,
    tried: list[Candidate],
    why_not: str | None,
    stage: BuildEngine,
    ctx: StageContext,
) -> Chosen:
    edition = engines_of(target)[0]
    finish(contender, ctx)
    built = contender.built
    versions = {edition: tensorrt.library(edition).__version__}
    path, engine_bytes = _pack(edition, engine, built.portable, target, versions, stage, ctx)
    if why_not is None:
        kept = as_candidate(contender, contender, [contender])
        report = _evaluated(target, contender, [kept, *tried], engine_bytes, ctx)
        times = _device_times(built, ctx)
        return Chosen(report.model_copy(update={"device_latency_ms": latency_of(Timed([times]))}), path)
    reason = f"built, and not run here: {why_not}; the figures are those of its ONNX in {built.runner.engine}"
    kept = refused(edition, engine.precision, reason).model_copy(update={"kept": True})
    report = TargetReport(
        target=name_of(target),
        engine=edition,
        precision=engine.precision,
        evaluated=False,
        engine_bytes=engine_bytes,
        measurement=contender.measurement,
        agreement=contender.agreement,
        candidates=[kept, *tried],
        goals=[GoalResult(goal=goal, reached=None, outcome="not_evaluated") for goal in ctx.recipe.goals_in_force],
        verdict="not_evaluated",
        reason=reason,
    )
    return Chosen(report, path)


def _device_times(found: Built, ctx: StageContext) -> list[float]:
    """Milliseconds on the GPU alone, by events, after the runs that were timed from outside."""
    settings = ctx.recipe.benchmark
    assert isinstance(found.runner, CudaRunner)
    batch = first(ctx.samples("evaluation"), min(settings.batches[0], found.runner.max_batch))
    return [found.runner.device_ms(batch) for _ in range(settings.runs or DEVICE_RUNS)]


# ---------------------------------------------------------------- reporting


def _evaluated(
    target: Target, best: Contender, candidates: list[Candidate], engine_bytes: int, ctx: StageContext
) -> TargetReport:
    assert ctx.baseline is not None
    return TargetReport(
        target=name_of(target),
        engine=best.built.runner.engine,
        precision=best.built.runner.precision,
        evaluated=True,
        engine_bytes=engine_bytes,
        measurement=best.measurement,
        agreement=best.agreement,
        candidates=candidates,
        goals=best.goals,
        verdict=verdict(best.goals, ctx.baseline, best.measurement),
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
        agreement=None,
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
        instruction_sets=instruction_sets(),
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
