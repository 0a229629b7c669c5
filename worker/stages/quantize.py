"""Fewer bits: int8 in the forms that each runtime of the recipe runs well, with float where int8 loses much, or fp16.

Int8 is not one file: the cleaned fp32 graph is written for ONNX Runtime, for OpenVINO and for TensorRT, each only where
the recipe asks for it, and for each in several forms: all of it in int8 and, where that loses too much on calibration
samples, with as few layers in float as two levels of quality take. Each runtime is judged by its own outputs. All forms
are handed on: build_engine checks and times each by itself, so what is made here does not depend on the job's goals.
Where no form is good, the network is trained for int8 if the recipe says how, and quantized anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from shared.errors import DataMismatch, StageFailed
from shared.recipe import BuildEngine, ModelFormat, Quantize
from shared.report import Agreement
from worker import engines
from worker.benchmark import first, ratio, time_quickly
from worker.cleanup import CLEANUP_ERRORS, clean, layer_names, quiet, refuse_old_opset, refuse_quantized
from worker.context import Form, Model, StageContext, StageResult
from worker.data import Samples
from worker.engines import Runner
from worker.evaluation.agreement import compare, keep_reference
from worker.material import split
from worker.qat import standing, train_for_int8
from worker.quantization import mixed_precision
from worker.quantization.calibration import Calibration, draw, measure_ranges
from worker.quantization.failure import failed
from worker.quantization.forms import OpenVinoForms, QdqForms, RuntimeForms, make_forms
from worker.quantization.openvino import onnx_name
from worker.quantization.qdq import write_dynamic
from worker.quantization.quality import GOOD, QualityCheck, at, quality_check
from worker.quantization.sensitivity import Layers
from worker.vetting import load_onnx_checked

MIN_SPEEDUP = 0.95  # of int8 against fp32 in the same runtime; less than one, for timing has noise
TRAINING, QUANTIZING = 0.2, 0.8  # where in the stage's progress training for int8 begins, and quantizing once more
KINDS = {
    "onnxruntime": "QDQ, u8 activations, s8 per-channel weights",
    "openvino": "NNCF, from the fp32 graph",
    "tensorrt": "QDQ, symmetric s8, biases in float",
}


def run(stage: Quantize, model: Model, ctx: StageContext) -> StageResult:
    """Raises StageFailed (already_quantized, quantize_failed), CalibrationMissing."""
    refuse_quantized(load_onnx_checked(model.path))
    network = ctx.directory / "float.onnx"
    ctx.progress(0.02, "cleaning the graph")
    clean(model.path, network)
    quantize = {"fp16": _to_fp16, "int8_dynamic": _to_dynamic, "int8_static": _to_static}[stage.scheme]
    quantized, details, unpaid = quantize(stage, network, ctx)
    agreement = _agreement_with_trained(quantized, ctx)
    ctx.progress(1.0)
    return StageResult(quantized, details={"scheme": stage.scheme, **details}, agreement=agreement, unpaid=unpaid)


def _agreement_with_trained(model: Model, ctx: StageContext) -> Agreement | None:
    """Closeness to the float network that training left; None where none did, and the source is what counts."""
    trained = model.trained()
    if trained is None:
        return None
    ctx.progress(0.95, "comparing with the trained network")
    samples, reference = ctx.samples("evaluation"), ctx.directory / "reference.npy"
    keep_reference(_open(trained.path, "onnxruntime", ctx), samples, reference)
    return compare(_open(model.path, "onnxruntime", ctx), samples, reference, ctx.recipe.task, "broken")


def _float_form(network: Path) -> Form:
    return Form("any", "fp32", network)


# ---------------------------------------------------------------- fp16


def _to_fp16(stage: Quantize, network: Path, ctx: StageContext) -> tuple[Model, dict[str, Any], None]:
    """Weights and operators in fp16, inputs and outputs in fp32; operators that lose their range stay in fp32."""
    ctx.progress(0.1, "converting to fp16")
    path = ctx.directory / "model.onnx"
    try:
        with quiet():
            half = convert_float_to_float16(onnx.load(network), keep_io_types=True)
            OnnxModel(half).topological_sort()  # the casts were put last
    except CLEANUP_ERRORS as error:
        raise failed("fp16", error) from error
    path.write_bytes(half.SerializeToString(deterministic=True))
    model = Model(ModelFormat.ONNX, path, precision="fp16", forms=(_float_form(network),))
    return model, {"inputs_and_outputs": "fp32"}, None


# ---------------------------------------------------------------- int8, dynamic


def _to_dynamic(stage: Quantize, network: Path, ctx: StageContext) -> tuple[Model, dict[str, Any], str | None]:
    ctx.progress(0.1, "converting the weights to int8")
    path = ctx.directory / "model.onnx"
    write_dynamic(network, path)
    ctx.progress(0.6, "timing against fp32")
    speedup = _speedup(path, network, "onnxruntime", ctx)
    details = {"weights": "u8", "speedup_over_fp32": round(speedup, 2), "slower_than_fp32": speedup < 1}
    model = Model(ModelFormat.ONNX, path, precision="int8", forms=(_float_form(network),))
    return model, details, _why_unpaid({"onnxruntime": speedup}, ctx)


# ---------------------------------------------------------------- int8, static


@dataclass(frozen=True)
class _Work:
    """What the forms of one network share; `check` is None where nothing is to be compared."""

    stage: Quantize
    ctx: StageContext
    network: Path
    calibration: Calibration
    directory: Path
    check: QualityCheck | None


def _to_static(stage: Quantize, network: Path, ctx: StageContext) -> tuple[Model, dict[str, Any], str | None]:
    graph = onnx.load(network)
    refuse_old_opset(graph)
    calibration = draw(stage, graph, ctx)
    check = None
    if stage.accuracy_aware or stage.training is not None:
        runner = _open(network, "onnxruntime", ctx)
        part, labelled = ctx.samples("calibration"), _labelled(stage, ctx)
        check = quality_check(runner, part, calibration.positions, ctx.recipe.task, labelled)
    with tempfile.TemporaryDirectory(prefix="attempts-", dir=ctx.directory) as directory:
        work = _Work(stage, ctx, network, calibration, Path(directory), check)
        if stage.training is None:
            return _finished(_quantized(work), work, {})
        work = replace(work, ctx=_within(ctx, 0.0, TRAINING))
        made, work, qat = _retrained(_quantized(work), work, ctx)
        return _finished(made, work, {"qat": qat})


def _labelled(stage: Quantize, ctx: StageContext) -> Samples | None:
    """Train samples with labels, where calibration samples have none: those that every training keeps out, or else all.

    Int8 is compared with float on the same samples, so that both have learnt from them matters little.
    """
    if ctx.samples("calibration").read_target is not None:
        return None
    trainings = [training for one in ctx.recipe.stages if (training := getattr(one, "training", None)) is not None]
    ratios = [training.validation_ratio for training in (stage.training, *trainings) if training is not None]
    try:
        train = ctx.samples("train")
        if train.read_target is None or not ratios or min(ratios) == 0:
            return None if train.read_target is None else train
        return at(train, split(train, min(ratios))[1].positions)
    except (StageFailed, DataMismatch):  # there is no such part, or training will raise it again
        return None


def _quantized(work: _Work) -> dict[str, RuntimeForms]:
    """The network in int8 for every runtime of the recipe. Raises StageFailed where there is no form for any."""
    stage, ctx = work.stage, work.ctx
    runtimes = _runtimes(ctx)
    ranges = work.directory / "ranges.json"
    try:
        measure_ranges(
            work.network, work.calibration, stage.calibration_method, _span(ctx, 0.05, 0.25, "calibrating"), ranges
        )
    except CLEANUP_ERRORS as error:
        raise failed("int8", error) from error
    made = {}
    for position, runtime in enumerate(runtimes):
        begin, end = (0.25 + 0.65 * (position + offset) / len(runtimes) for offset in (0, 1))
        progress = _span(ctx, begin, end, f"quantizing for {runtime}")
        directory = work.directory / runtime
        directory.mkdir()

        def open_form(path: Path, its: str = runtime) -> Runner:
            return _open(path, "onnxruntime" if its == "tensorrt" else its, ctx)

        method = stage.calibration_method
        writer: OpenVinoForms | QdqForms
        if runtime == "openvino":
            writer = OpenVinoForms(work.network, work.calibration, method, directory, open_form)
        else:
            writer = QdqForms(work.network, ranges, method, directory, open_form, symmetric=runtime == "tensorrt")
        num_samples = len(work.calibration.positions)
        made[runtime] = make_forms(writer, work.check, num_samples, stage.accuracy_aware, progress)
    if not any(found.forms for found in made.values()):
        reasons = "; ".join(f"{runtime}: {'; '.join(found.failures)}" for runtime, found in made.items())
        raise StageFailed(f"The model cannot be quantized to int8: {reasons}", code="quantize_failed")
    return made


def _runtimes(ctx: StageContext) -> list[str]:
    """The runtimes that int8 is written for: ONNX Runtime, which runs the stage's own result, and those built later."""
    built = [engine for stage in ctx.recipe.stages if isinstance(stage, BuildEngine) for engine in stage.engines]
    others = [name for name in ("openvino", "tensorrt") if any(engine.startswith(name) for engine in built)]
    return ["onnxruntime", *others]


# ---------------------------------------------------------------- training for int8


def _retrained(
    made: dict[str, RuntimeForms], work: _Work, ctx: StageContext
) -> tuple[dict[str, RuntimeForms], _Work, dict[str, Any]]:
    """The int8 of the network trained for it, where no form of a runtime is good and training makes it better."""
    check, training = work.check, _within(ctx, TRAINING, QUANTIZING)
    assert check is not None
    wanting = [runtime for runtime, found in made.items() if not any(form.reaches(GOOD) for form in found.forms)]
    if not wanting:
        return made, work, {"used": False, "reason": "not needed"}
    directory = work.directory / "trained"
    directory.mkdir()
    try:
        symmetric = "tensorrt" in wanting
        network, log = train_for_int8(
            work.stage, work.network, work.calibration, training, directory, symmetric=symmetric
        )
        trained = check.of_network(_open(network, "onnxruntime", ctx))
        again = replace(work, ctx=_within(ctx, QUANTIZING, 1.0), directory=directory, network=network, check=trained)
        tried = _quantized(again)
    except StageFailed as error:
        return made, work, {"used": False, "reason": error.detail}
    lost = 0.0 if check.metric is None or trained.metric is None else check.lost(trained.metric)
    before, after = standing(made, wanting), standing(tried, wanting, lost)
    details = {"before": before.details(), "after": after.details(), **log.details()}
    if after.is_better_than(before):
        return tried, again, {"used": True, "reason": "better than post-training int8", **details}
    return made, work, {"used": False, "reason": "no better than post-training int8", **details}


# ---------------------------------------------------------------- what becomes of them


def _finished(
    made: dict[str, RuntimeForms], work: _Work, more: dict[str, Any]
) -> tuple[Model, dict[str, Any], str | None]:
    """The model: its best form for ONNX Runtime, or the float network where none is good and engines are built later.

    Every other form goes with it, and so does the float network.
    """
    ctx, names = work.ctx, layer_names(onnx.load(work.network))
    network = work.network.rename(ctx.directory / "float.onnx")
    retrained = bool(more) and more["qat"]["used"]
    best = made["onnxruntime"].best
    if best is not None and not best.reaches(GOOD) and _builds_later(ctx):
        best = None
    forms = tuple(
        Form(runtime, _precision(form), _moved(form.path, runtime, form, ctx.directory), form.name)
        for runtime, found in made.items()
        for form in found.forms
        if form is not best
    )
    if best is None:
        model = Model(ModelFormat.ONNX, network, precision="fp32", forms=forms, retrained=retrained)
    else:
        path = best.path.rename(ctx.directory / "model.onnx")
        forms = (*forms, _float_form(network))
        model = Model(
            ModelFormat.ONNX, path, precision=_precision(best), name=best.name, forms=forms, retrained=retrained
        )
    speedups = _speedups(model, network, ctx)
    details: dict[str, Any] = {
        "calibration_samples": len(work.calibration.positions),
        "calibration_method": work.stage.calibration_method,
        **{runtime: _details(runtime, found, names, speedups.get(runtime)) for runtime, found in made.items()},
        **more,
    }
    if work.check is not None:
        details["judged_on"] = f"{len(work.check.samples)} {work.check.origin}"
    return model, details, _why_unpaid(speedups, ctx)


def _moved(path: Path, runtime: str, form: mixed_precision.Form, directory: Path) -> Path:
    """The form's file among the stage's own, under a name that no other form has."""
    precision = _precision(form).replace("+", "-")
    target = directory / f"model.{runtime}.{precision}.{form.name}{path.suffix}"
    if path.suffix == ".xml":
        path.with_suffix(".bin").rename(target.with_suffix(".bin"))
    return path.rename(target)


def _precision(form: mixed_precision.Form) -> str:
    return "int8+fp32" if form.in_float else "int8"


def _details(runtime: str, found: RuntimeForms, names: dict[str, str], speedup: float | None) -> dict[str, Any]:
    def named(layers: Layers) -> list[str]:
        return list(dict.fromkeys(names.get(onnx_name(layer), onnx_name(layer)) for layer in layers))

    details: dict[str, Any] = {"form": KINDS[runtime] if found.scheme is None else f"{KINDS[runtime]}: {found.scheme}"}
    details["forms"] = [
        {
            "name": form.name,
            "precision": _precision(form),
            "layers_in_float": named(form.in_float),
            "rms_error": None if form.quality is None else form.quality.rms_error,
            "loss": None if form.quality is None else form.quality.loss,
        }
        for form in found.forms
    ]
    if speedup is not None:
        details["speedup_over_fp32"] = round(speedup, 2)
    if found.failures:
        details["failures"] = found.failures
    if found.ranking:
        details["sensitivity"] = [{"layers": named(one.layers), "error": one.error} for one in found.ranking[:10]]
    return details


# ---------------------------------------------------------------- whether it pays


def _builds_later(ctx: StageContext) -> bool:
    return any(isinstance(stage, BuildEngine) for stage in ctx.recipe.stages)


def _speedups(model: Model, network: Path, ctx: StageContext) -> dict[str, float]:
    """How much faster int8 is than fp32 in ONNX Runtime; not where engines are built later, and timed then."""
    if _builds_later(ctx) or model.path == network:
        return {}
    return {"onnxruntime": _speedup(model.path, network, "onnxruntime", ctx)}


def _why_unpaid(speedups: dict[str, float], ctx: StageContext) -> str | None:
    """Why int8 is not worth having; None where it is, or where engines are built later and compared with fp32's.

    It is also worth having where a goal asks for fewer bytes.
    """
    if _builds_later(ctx) or ctx.recipe.wants_fewer_bytes or any(found >= MIN_SPEEDUP for found in speedups.values()):
        return None
    slower = [f"{1 / speedup:.2f} times fp32's latency in {name}" for name, speedup in speedups.items()]
    return f"it does not pay: {', '.join(slower)}" if slower else None


def _speedup(path: Path, network: Path, engine: str, ctx: StageContext) -> float:
    """Median latency of fp32 over int8's, at the batch size that the report gives latency at, timed in turns."""
    part = "calibration" if "calibration" in ctx.recipe.parts() else "evaluation"
    inputs = first(ctx.samples(part), ctx.recipe.benchmark.batches[0])
    runners = [_open(network, engine, ctx), _open(path, engine, ctx)]
    before, after = time_quickly(runners, inputs)
    return ratio(before, after).value


# ---------------------------------------------------------------- running


def _open(path: Path, engine: str, ctx: StageContext) -> Runner:
    runner: Runner = engines.load(engine).open(Model(ModelFormat.ONNX, path), ctx.recipe.benchmark.threads)
    return runner


def _span(ctx: StageContext, begin: float, end: float, message: str) -> Callable[[float], None]:
    return lambda share: ctx.progress(begin + share * (end - begin), message)


def _within(ctx: StageContext, begin: float, end: float) -> StageContext:
    """The context of a part of the stage, whose progress is that part's."""

    def progress(fraction: float, message: str = "") -> None:
        ctx.progress(begin + fraction * (end - begin), message)

    return replace(ctx, progress=progress)
