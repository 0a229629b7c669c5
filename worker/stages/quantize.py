"""Fewer bits: static int8 in the form that each runtime of the recipe runs well, or fp16.

Int8 is not one file. ONNX Runtime is fast on QDQ with u8 activations and s8 per-channel weights; OpenVINO on what NNCF
makes of its own representation, while it reads other int8 ONNX slowly or wrongly. So the ONNX is quantized for ONNX
Runtime, and where the recipe later builds an OpenVINO engine, its form is made beside it (`variants["openvino"]`) from
the same calibration samples.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import onnx.version_converter
import openvino
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from shared.errors import CalibrationMissing, StageFailed
from shared.recipe import BuildEngine, ModelFormat, Quantize
from worker import engines
from worker.context import Model, StageContext, StageResult
from worker.data import Floats, Samples
from worker.evaluate import parity, parity_inputs, run_in_batches
from worker.loading import input_shape, load_onnx_checked

MIN_PER_CHANNEL_OPSET = 13  # below it, per-channel QDQ is an invalid graph
RAISED_OPSET = 17
QUANTIZE_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError)

# In ONNX Runtime a normalization runs in float, so int8 activations and concatenations beside it only add conversions
# (BasicUNet with InstanceNorm: 5.6 ms a slice; with these operators alone in int8 3.8 ms, and closer to fp32).
NORMALIZATIONS = {"InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"}
PRODUCTS = ["Conv", "ConvTranspose", "MatMul", "Gemm"]
NNCF_ERRORS = (*QUANTIZE_ERRORS, nncf.ValidationError, nncf.UnsupportedModelError, nncf.InternalError)

ORT_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
NNCF_METHODS = {
    "minmax": RangeEstimatorParametersSet.MINMAX,
    "entropy": RangeEstimatorParametersSet.HISTOGRAM,
    "percentile": RangeEstimatorParametersSet.MEAN_QUANTILE,
}


def run(stage: Quantize, model: Model, ctx: StageContext) -> StageResult:
    """The result's parity is told, not judged: a quantized model may differ, and its metrics decide.

    Raises StageFailed (quantize_failed), CalibrationMissing.
    """
    deed = _to_fp16 if stage.scheme == "fp16" else _to_int8
    quantized, details = deed(stage, model, ctx)

    # outputs on real samples against the source model's
    ctx.progress(0.9, "comparing with the source model")
    runner = engines.load("onnxruntime").open(quantized, ctx.threads)
    outputs = run_in_batches(runner.run, parity_inputs(ctx.samples("evaluation")))
    found = parity(np.load(ctx.reference), outputs, stage.tolerance)
    ctx.progress(1.0)
    return StageResult(quantized, details=details, parity=found)


# ---------------------------------------------------------------- fp16


def _to_fp16(stage: Quantize, model: Model, ctx: StageContext) -> tuple[Model, dict[str, Any]]:
    """Weights and operators in fp16, inputs and outputs in fp32; operators that lose their range stay in fp32."""
    ctx.progress(0.1, "converting to fp16")
    path = ctx.directory / "model.onnx"
    try:
        with _quiet():
            half = convert_float_to_float16(load_onnx_checked(model.path), keep_io_types=True)
            OnnxModel(half).topological_sort()  # the casts were put last
    except QUANTIZE_ERRORS as error:
        raise _failed("fp16", error) from error
    path.write_bytes(half.SerializeToString(deterministic=True))
    return Model(ModelFormat.ONNX, path, precision="fp16"), {"scheme": "fp16", "inputs_and_outputs": "fp32"}


# ---------------------------------------------------------------- int8


@dataclass(frozen=True)
class _Calibration:
    """The calibration samples that the seed draws, read one batch at a time."""

    samples: Samples
    positions: Sequence[int]
    batch: int
    input_name: str

    def __len__(self) -> int:
        return math.ceil(len(self.positions) / self.batch)

    def read(self, index: int) -> dict[str, Floats]:
        """Batch `index`; the last one begins again with the first samples where it would be too short."""
        count = len(self.positions)
        wanted = [self.positions[(index * self.batch + offset) % count] for offset in range(self.batch)]
        return {self.input_name: self.samples.take(wanted)}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """ONNX Runtime's view of the calibration samples: it asks for one range after the other."""

    def __init__(self, calibration: _Calibration, ctx: StageContext) -> None:
        self.calibration, self.ctx = calibration, ctx
        self.next, self.end = 0, len(calibration)

    def __len__(self) -> int:
        return len(self.calibration)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.next, self.end = start_index, end_index

    def get_next(self) -> dict[str, Floats] | None:
        if self.next >= self.end:
            return None
        self.ctx.progress(0.1 + 0.4 * self.next / len(self), "calibrating for ONNX Runtime")
        self.next += 1
        return self.calibration.read(self.next - 1)


def _to_int8(stage: Quantize, model: Model, ctx: StageContext) -> tuple[Model, dict[str, Any]]:
    checked = load_onnx_checked(model.path)
    calibration = _calibration(stage, checked, ctx)
    path = ctx.directory / "model.onnx"
    with contextlib.ExitStack() as cleaning:
        prepared = ctx.directory / "prepared.onnx"
        cleaning.callback(prepared.unlink, missing_ok=True)

        # fold constants and fuse BatchNorm, so that what is quantized is what will run
        ctx.progress(0.05, "preparing the graph")
        prepared.write_bytes(_with_per_channel_opset(checked).SerializeToString(deterministic=True))
        _quantize_onnx(prepared, path, calibration, stage, ctx)

        variants = {}
        if _wants_openvino(ctx):
            variants["openvino"] = _quantize_openvino(prepared, calibration, stage, ctx)
    details = {
        "scheme": "int8_static",
        "calibration_samples": len(calibration.positions),
        "calibration_method": stage.calibration_method,
        "onnxruntime": "QDQ, u8 activations, s8 per-channel weights",
        **({"openvino": "NNCF, from the fp32 graph"} if variants else {}),
    }
    return Model(ModelFormat.ONNX, path, precision="int8", variants=variants), details


def _calibration(stage: Quantize, model: onnx.ModelProto, ctx: StageContext) -> _Calibration:
    samples = ctx.samples("calibration")
    if len(samples) == 0:
        raise CalibrationMissing
    drawn = np.random.default_rng(ctx.seed).permutation(len(samples))[: stage.calibration_samples]
    return _Calibration(samples, sorted(drawn.tolist()), input_shape(model)[0] or 1, model.graph.input[0].name)


def _with_per_channel_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset >= MIN_PER_CHANNEL_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, RAISED_OPSET)
    except (RuntimeError, ValueError) as error:
        raise StageFailed(
            f"Int8 needs opset {MIN_PER_CHANNEL_OPSET}; the model has {opset} and cannot be raised: {error}",
            hint=f"Export it again with opset {RAISED_OPSET} or later.",
            code="quantize_failed",
        ) from error


def _quantize_onnx(prepared: Path, path: Path, calibration: _Calibration, stage: Quantize, ctx: StageContext) -> None:
    """QDQ for ONNX Runtime. A stride of one batch keeps only its activations in memory, whatever the method."""
    try:
        with _quiet():
            # symbolic shape inference fails on bilinear upsampling, and is not needed
            quant_pre_process(prepared, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                path,
                _Reader(calibration, ctx),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=_operators(prepared),
                calibrate_method=ORT_METHODS[stage.calibration_method],
                extra_options={"CalibStridedMinMax": 1},
            )
    except QUANTIZE_ERRORS as error:
        raise _failed("int8", error) from error
    path.write_bytes(_with_float_output(onnx.load(path), onnx.load(prepared)).SerializeToString(deterministic=True))


def _with_float_output(model: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """Leave the network's own output in float: eight bits would cut off every value above the calibrated range.

    The pair QuantizeLinear, DequantizeLinear at the output is taken out; the last layer's int8 weights stay. Not where
    the pair stands for the source's last operator: ONNX Runtime lets it do the work of a ReLU.
    """
    graph, name = model.graph, model.graph.output[0].name
    makers = _makers(graph)
    last = makers[name]
    before = makers.get(last.input[0]) if last.op_type == "DequantizeLinear" else None
    if before is None or before.op_type != "QuantizeLinear" or before.input[0] not in makers:
        return model
    kept = before.input[0]
    if makers[kept].op_type != _makers(source.graph)[name].op_type:
        return model
    graph.node.remove(last)
    graph.node.remove(before)
    for node in graph.node:
        node.input[:] = [name if found == kept else found for found in node.input]
        node.output[:] = [name if found == kept else found for found in node.output]
    return model


def _makers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}


def _operators(prepared: Path) -> list[str] | None:
    """Operators that are quantized; None for all that ONNX Runtime knows."""
    found = {node.op_type for node in onnx.load(prepared, load_external_data=False).graph.node}
    return PRODUCTS if found & NORMALIZATIONS else None


def _wants_openvino(ctx: StageContext) -> bool:
    return any(isinstance(stage, BuildEngine) and "openvino" in stage.engines for stage in ctx.recipe.stages)


def _quantize_openvino(prepared: Path, calibration: _Calibration, stage: Quantize, ctx: StageContext) -> Path:
    """NNCF's int8 of OpenVINO's own representation: min-max ranges, per-channel weights, fast bias correction."""

    def read(index: int) -> dict[str, Floats]:
        ctx.progress(0.5 + 0.35 * index / len(calibration), "calibrating for OpenVINO")
        return calibration.read(index)

    ranges = NNCF_METHODS[stage.calibration_method]
    runtime = engines.load("openvino")
    try:
        with _quiet():
            nncf.set_log_level(logging.WARNING)
            source = openvino.Core().read_model(prepared)
            runtime.settle_names(source)  # NNCF makes its own names from them
            quantized = nncf.quantize(
                source,
                nncf.Dataset(range(len(calibration)), read),
                subset_size=len(calibration),
                advanced_parameters=AdvancedQuantizationParameters(activations_range_estimator_params=ranges),
            )
    except NNCF_ERRORS as error:
        raise _failed("int8 for OpenVINO", error) from error
    path: Path = runtime.save(quantized, ctx.directory / "model.xml")
    return path


# ---------------------------------------------------------------- both


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and warnings away from stdout, which belongs to the pipeline."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _failed(scheme: str, error: Exception) -> StageFailed:
    detail = str(error).strip().splitlines()
    return StageFailed(
        f"The model cannot be quantized to {scheme}: {detail[0] if detail else type(error).__name__}",
        code="quantize_failed",
    )
