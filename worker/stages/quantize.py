"""Fewer bits: int8 in the form that each runtime of the recipe runs well, with float where int8 hurts, or fp16.

Int8 is not one file: the cleaned fp32 graph is written once for ONNX Runtime, once for OpenVINO and once for TensorRT,
each only where the recipe asks for it. Each form is judged on calibration samples; where it misses the tolerance or a
quality goal, the layers that hurt most go back to float one by one; where that does not help either, or costs the
speed, the network is trained for int8 if the recipe says how, and quantized anew. Int8 that is no faster than fp32 is
not delivered: build_engine measures every form beside fp32, and where no engine is built, this stage does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from shared.errors import StageFailed
from shared.recipe import Benchmark, BuildEngine, ModelFormat, Quantize
from worker import engines
from worker.benchmark import first, side_by_side
from worker.calibration import Calibration, draw, measure_ranges
from worker.candidates import source_runner
from worker.cleanup import CLEANUP_ERRORS, clean, layer_names, quiet, refuse_old_opset, refuse_quantized
from worker.context import Form, Model, StageContext, StageResult
from worker.engines import Runner
from worker.evaluate import hold, keep_reference
from worker.int8 import all_operators_pay, failed, layers, write_dynamic, write_openvino, write_qdq
from worker.material import split
from worker.qat import standing, train_for_int8
from worker.sensitivity import Attempt, Hurt, Judge, appoint, rank, rescue
from worker.vetting import load_onnx_checked

MIN_SPEEDUP = 0.95  # of int8 against fp32 in the same runtime; less than one, for timing has noise
TIMED = Benchmark(warm_up=3, runs=20)
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
    ctx.progress(0.02, "cleaning the graph up")
    clean(model.path, network)
    deed = {"fp16": _to_fp16, "int8_dynamic": _to_dynamic, "int8_static": _to_static}[stage.scheme]
    quantized, details, unpaid = deed(stage, network, ctx)

    # outputs on real samples, against those of the network that was quantized
    ctx.progress(0.95, "comparing with the float network")
    samples, reference = ctx.samples("evaluation"), ctx.reference
    if (trained := quantized.trained()) is not None:
        reference = ctx.directory / "reference.npy"
        keep_reference(engines.load("onnxruntime").open(trained, ctx.threads), samples, reference)
    runner = engines.load("onnxruntime").open(quantized, ctx.threads)
    held = hold(runner, samples, reference, stage.tolerance, ctx.recipe.task)
    ctx.progress(1.0)
    return StageResult(quantized, details={"scheme": stage.scheme, **details}, parity=held, unpaid=unpaid)


def _fp32(network: Path) -> Form:
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
    model = Model(ModelFormat.ONNX, path, precision="fp16", forms=(_fp32(network),))
    return model, {"inputs_and_outputs": "fp32"}, None


# ---------------------------------------------------------------- int8, dynamic


def _to_dynamic(stage: Quantize, network: Path, ctx: StageContext) -> tuple[Model, dict[str, Any], str | None]:
    ctx.progress(0.1, "converting the weights to int8")
    path = ctx.directory / "model.onnx"
    write_dynamic(network, path)
    ctx.progress(0.6, "timing against fp32")
    speedup = _speedup(_open(path, "onnxruntime", ctx), _open(network, "onnxruntime", ctx), ctx)
    details = {"weights": "u8", "speedup_over_fp32": round(speedup, 2), "slower_than_fp32": speedup < 1}
    model = Model(ModelFormat.ONNX, path, precision="int8", forms=(_fp32(network),))
    return model, details, _why_unpaid({"onnxruntime": speedup}, ctx)


# ---------------------------------------------------------------- int8, static


@dataclass
class _Workshop:
    """What the forms of one network share: its ranges, its judge, its ranking, and a place for attempts."""

    stage: Quantize
    ctx: StageContext
    network: Path
    calibration: Calibration
    directory: Path
    judge: Judge | None = None
    ranking: list[Hurt] = field(default_factory=list)

    @property
    def ranges(self) -> Path:
        return self.directory / "ranges.json"


def _to_static(stage: Quantize, network: Path, ctx: StageContext) -> tuple[Model, dict[str, Any], str | None]:
    graph = onnx.load(network)
    refuse_old_opset(graph)
    calibration = draw(stage, graph, ctx)
    with tempfile.TemporaryDirectory(prefix="attempts-", dir=ctx.directory) as directory:
        shop = _Workshop(stage, ctx, network, calibration, Path(directory))
        if stage.training is None:
            return _settled(_quantized(shop), shop, {})
        shop.ctx = _within(ctx, 0.0, TRAINING)
        made, shop, told = _retrained(_quantized(shop), shop, ctx)
        return _settled(made, shop, {"qat": told})


def _quantized(shop: _Workshop) -> dict[str, Attempt]:
    """The network in int8 for every runtime of the recipe."""
    stage, ctx = shop.stage, shop.ctx
    try:
        told = _span(ctx, 0.05, 0.3, "calibrating")
        measure_ranges(shop.network, shop.calibration, stage.calibration_method, told, shop.ranges)
    except CLEANUP_ERRORS as error:
        raise failed("int8", error) from error
    if shop.judge is None and (stage.accuracy_aware or stage.training is not None):
        fp32, kept_out = _open(shop.network, "onnxruntime", ctx), _kept_out(stage, ctx)
        positions = shop.calibration.positions
        shop.judge = appoint(fp32, lambda: source_runner(ctx), positions, stage.tolerance, ctx, kept_out)
    return {runtime: _make(runtime, shop) for runtime in _runtimes(ctx)}


def _kept_out(stage: Quantize, ctx: StageContext) -> Sequence[int]:
    """Positions in the train part that training never learns from."""
    if stage.training is None or ctx.samples("calibration").read_target is not None:
        return ()
    try:
        return split(ctx.samples("train"), stage.training.validation_ratio)[1].positions
    except StageFailed:  # which training will raise again, if it comes to that
        return ()


def _runtimes(ctx: StageContext) -> list[str]:
    """The runtimes that int8 is written for: ONNX Runtime, on which the stage is judged, and those built later."""
    built = [engine for stage in ctx.recipe.stages if isinstance(stage, BuildEngine) for engine in stage.engines]
    others = [name for name in ("openvino", "tensorrt") if any(engine.startswith(name) for engine in built)]
    return ["onnxruntime", *others]


def _make(runtime: str, shop: _Workshop) -> Attempt:
    """The runtime's int8 form, with as many layers in float as it takes; if nothing helps, the nearest to fp32."""
    ctx = shop.ctx
    ctx.progress(0.4, f"quantizing for {runtime}")
    all_operators = runtime == "onnxruntime" and all_operators_pay(shop.network)
    tried = [_attempt(runtime, shop, (), products_only=not all_operators)]
    if tried[-1].missed is not None and all_operators:
        tried.append(_attempt(runtime, shop, (), products_only=True))
    aware = shop.judge if shop.stage.accuracy_aware else None
    if tried[-1].missed is not None and aware is not None and any(_pays(found) for found in tried):
        tried += rescue(
            _ranking(shop, aware),
            shop.stage.max_float_layers,
            lambda in_float: _attempt(runtime, shop, in_float, products_only=True),
            _pays,
        )
    if tried[-1].missed is None or shop.judge is None:
        return tried[-1]
    judge = shop.judge
    return min(tried, key=lambda attempt: judge.error(attempt.runner.run))


def _pays(found: Attempt) -> bool:
    return found.speedup is None or found.speedup >= MIN_SPEEDUP


def _attempt(runtime: str, shop: _Workshop, in_float: tuple[str, ...], *, products_only: bool) -> Attempt:
    """One form, written, loaded, judged and timed."""
    stage, ctx = shop.stage, shop.ctx
    ending = "xml" if runtime == "openvino" else "onnx"
    path = shop.directory / f"{runtime}-{len(list(shop.directory.iterdir()))}.{ending}"
    if runtime == "openvino":
        told = _span(ctx, 0.6, 0.9, "calibrating for OpenVINO")
        method = stage.calibration_method
        write_openvino(shop.network, shop.calibration, method, path, in_float=in_float, told=told)
    else:
        write_qdq(
            shop.network,
            shop.ranges,
            stage.calibration_method,
            path,
            symmetric=runtime == "tensorrt",
            products_only=products_only,
            in_float=in_float,
        )
    engine = "onnxruntime" if runtime == "tensorrt" else runtime
    runner = _open(path, engine, ctx)
    missed = shop.judge.missed(runner.run) if shop.judge is not None else None
    speedup = None if runtime == "tensorrt" else _speedup(runner, _open(shop.network, engine, ctx), ctx)
    return Attempt(path, runner, in_float, missed, speedup)


def _ranking(shop: _Workshop, judge: Judge) -> list[Hurt]:
    """The layers by how much int8 hurts them, measured once, in ONNX Runtime."""
    if not shop.ranking:
        path = shop.directory / "alone.onnx"

        def alone(layer: str) -> Callable[[Any], Any]:
            write_qdq(shop.network, shop.ranges, shop.stage.calibration_method, path, only=[layer])
            return _open(path, "onnxruntime", shop.ctx).run

        told = _span(shop.ctx, 0.4, 0.6, "measuring which layers int8 hurts")
        shop.ranking = rank(layers(shop.network), alone, judge, told)
    return shop.ranking


# ---------------------------------------------------------------- training for int8


def _retrained(
    made: dict[str, Attempt], shop: _Workshop, ctx: StageContext
) -> tuple[dict[str, Attempt], _Workshop, dict[str, Any]]:
    """The int8 of the network trained for it where that is needed and better; and what the report tells of it."""
    judge, training = shop.judge, _within(ctx, TRAINING, QUANTIZING)
    assert judge is not None
    wanting = [runtime for runtime, found in made.items() if _is_wanting(found, ctx)]
    if not wanting:
        told = "not needed" if all(found.missed is None for found in made.values()) else "int8 does not pay"
        return made, shop, {"used": False, "reason": told}
    again = replace(shop, ctx=_within(ctx, QUANTIZING, 1.0), directory=shop.directory / "trained", ranking=[])
    again.directory.mkdir()
    try:
        symmetric = "tensorrt" in wanting
        again.network, log = train_for_int8(
            shop.stage, shop.network, shop.calibration, training, again.directory, symmetric=symmetric
        )
        again.judge = judge.of(_open(again.network, "onnxruntime", ctx).run)
        tried = _quantized(again)
    except StageFailed as error:
        return made, shop, {"used": False, "reason": error.detail}
    before, after = (standing(found, wanting, its, _pays) for found, its in ((made, judge), (tried, again.judge)))
    found = {"before": before.told(), "after": after.told(), **log.details()}
    if after.is_better_than(before, judge):
        return tried, again, {"used": True, "reason": "better than post-training int8", **found}
    return made, shop, {"used": False, "reason": "no better than post-training int8", **found}


def _is_wanting(found: Attempt, ctx: StageContext) -> bool:
    """Whether the form misses something, or meets it only with so much in float that it does not pay.

    Not where the network does not pay in int8 at all.
    """
    if found.missed is None:
        return bool(found.in_float) and not _pays(found)
    return _pays(found) or bool(found.in_float) or _asks_for_bytes(ctx)


# ---------------------------------------------------------------- what becomes of them


def _settled(
    made: dict[str, Attempt], shop: _Workshop, told: dict[str, Any]
) -> tuple[Model, dict[str, Any], str | None]:
    """The model with its forms. Where int8 is right in other runtimes only, the model itself stays in fp32."""
    ctx, names = shop.ctx, layer_names(onnx.load(shop.network))
    network = shop.network.rename(ctx.directory / "float.onnx")
    unpaid = _why_unpaid({runtime: found.speedup for runtime, found in made.items()}, ctx)
    kept = {name: found for name, found in made.items() if found.missed is None} or made
    forms = tuple(
        Form(runtime, _precision(found), _moved(found, ctx.directory / f"model.{runtime}{found.path.suffix}"))
        for runtime, found in kept.items()
        if runtime != "onnxruntime"
    )
    retrained = bool(told) and told["qat"]["used"]
    if "onnxruntime" in kept:
        path = _moved(kept["onnxruntime"], ctx.directory / "model.onnx")
        precision, forms = _precision(kept["onnxruntime"]), (*forms, _fp32(network))
    else:
        path, precision = network, "fp32"
    model = Model(ModelFormat.ONNX, path, precision=precision, retrained=retrained, forms=forms)
    details: dict[str, Any] = {
        "calibration_samples": len(shop.calibration.positions),
        "calibration_method": shop.stage.calibration_method,
        **{runtime: _told(runtime, found, runtime in kept, names) for runtime, found in made.items()},
        **told,
    }
    if shop.judge is not None:
        details["judged_on"] = f"{len(shop.judge.samples)} {_origin(shop.judge)}"
    if shop.ranking:
        hurt = [{"layer": names.get(hurt.layer, hurt.layer), "error": hurt.error} for hurt in shop.ranking[:10]]
        details["sensitivity"] = hurt
    return model, details, unpaid


def _origin(judge: Judge) -> str:
    """What it judged on, in the report's words."""
    if judge.samples.part == "train":
        return "train samples that are not learnt from"
    return "calibration samples that gave no range" if judge.held_out else "calibration samples"


def _moved(found: Attempt, path: Path) -> Path:
    if path.suffix == ".xml":
        found.path.with_suffix(".bin").rename(path.with_suffix(".bin"))
    return found.path.rename(path)


def _precision(found: Attempt) -> str:
    return "int8+fp32" if found.in_float else "int8"


def _told(runtime: str, found: Attempt, kept: bool, names: dict[str, str]) -> dict[str, Any]:
    return {
        "form": KINDS[runtime],
        "kept": kept,
        "layers_in_float": [names.get(name, name) for name in found.in_float],
        "speedup_over_fp32": None if found.speedup is None else round(found.speedup, 2),
        "missed": found.missed,
    }


def _why_unpaid(speedups: dict[str, float | None], ctx: StageContext) -> str | None:
    """Why int8 is not worth having; None where it is, or where engines are built later and compared with fp32's.

    It is also worth having where a goal asks for fewer bytes.
    """
    compared_later = any(isinstance(stage, BuildEngine) for stage in ctx.recipe.stages)
    if compared_later or _asks_for_bytes(ctx):
        return None
    if any(found is None or found >= MIN_SPEEDUP for found in speedups.values()):
        return None
    told = [f"{1 / speedup:.2f} times fp32's latency in {name}" for name, speedup in speedups.items() if speedup]
    return f"it does not pay: {', '.join(told)}"


def _asks_for_bytes(ctx: StageContext) -> bool:
    return any(goal.kind == "max_ratio" and goal.metric in ("size", "memory") for goal in ctx.recipe.goals)


# ---------------------------------------------------------------- running


def _open(path: Path, engine: str, ctx: StageContext) -> Runner:
    runner: Runner = engines.load(engine).open(Model(ModelFormat.ONNX, path), ctx.recipe.benchmark.threads)
    return runner


def _speedup(runner: Runner, fp32: Runner, ctx: StageContext) -> float:
    """Median latency of fp32 over the runner's, at the batch size that the report tells latency at, timed in turns."""
    part = "calibration" if "calibration" in ctx.recipe.parts() else "evaluation"
    inputs = first(ctx.samples(part), ctx.recipe.benchmark.batches[0])
    times: Sequence[Sequence[float]] = side_by_side([fp32, runner], inputs, TIMED)
    before, after = (float(np.median(found)) for found in times)
    return before / after


def _span(ctx: StageContext, begin: float, end: float, message: str) -> Callable[[float], None]:
    return lambda share: ctx.progress(begin + share * (end - begin), message)


def _within(ctx: StageContext, begin: float, end: float) -> StageContext:
    """The context of a part of the stage, whose progress is that part's."""

    def progress(fraction: float, message: str = "") -> None:
        ctx.progress(begin + fraction * (end - begin), message)

    return replace(ctx, progress=progress)
