"""Int8 as ONNX: QuantizeLinear and DequantizeLinear around the operators, for ONNX Runtime and for TensorRT.

ONNX Runtime is fast on u8 activations and s8 per-channel weights; TensorRT takes symmetric s8 without quantized biases.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

from worker.cleanup import CLEANUP_ERRORS, quiet
from worker.environment import int8_needs_reduced_range
from worker.quantization.calibration import METHODS
from worker.quantization.failure import failed

PRODUCTS = ["Conv", "ConvTranspose", "MatMul", "Gemm"]
DYNAMIC = ["Conv", "MatMul", "Gemm"]

# In ONNX Runtime a normalization runs in float, so int8 activations and concatenations beside it only add conversions
# (BasicUNet with InstanceNorm: 5.6 ms a slice; with these operators alone in int8 3.8 ms, and closer to fp32).
NORMALIZATIONS = {"InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"}

SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}


def layers(network: Path) -> list[str]:
    """Names of the nodes that int8 is for, in the graph's order: products with constant weights."""
    graph = onnx.load(network).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in PRODUCTS and constants & set(node.input[1:2])]


def all_operators_pay(network: Path) -> bool:
    """Whether more than the products is worth int8 in ONNX Runtime."""
    return not {node.op_type for node in onnx.load(network).graph.node} & NORMALIZATIONS


def write_qdq(
    network: Path,
    ranges: Path,
    method: str,
    path: Path,
    *,
    symmetric: bool = False,
    products_only: bool = False,
    in_float: Sequence[str] = (),
    only: Sequence[str] = (),
) -> None:
    """Static int8 as ONNX: for TensorRT where `symmetric`, for ONNX Runtime otherwise.

    Layers `in_float` stay as they are; `only` those named are quantized, if any are. Weights keep to 7 bits where this
    CPU would overflow. Raises StageFailed (quantize_failed).
    """
    try:
        with quiet():
            quantize_static(
                network,
                path,
                None,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=int8_needs_reduced_range() and not symmetric,
                activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=PRODUCTS if products_only or symmetric or only else None,
                nodes_to_quantize=list(only),
                nodes_to_exclude=list(in_float),
                calibrate_method=METHODS[method],
                calibration_cache_path=ranges,
                extra_options=SYMMETRIC if symmetric else {},
            )
    except CLEANUP_ERRORS as error:
        raise failed("int8", error) from error
    quantized = _compact(_with_float_output(onnx.load(path), onnx.load(network)))
    path.write_bytes(quantized.SerializeToString(deterministic=True))


def write_dynamic(network: Path, path: Path) -> None:
    """Int8 whose activations are scaled as they come: u8 weights, for s8 is slower than fp32 in ONNX Runtime.

    Raises StageFailed (quantize_failed).
    """
    try:
        with quiet():
            quantize_dynamic(
                network,
                path,
                op_types_to_quantize=DYNAMIC,
                weight_type=QuantType.QUInt8,
                reduce_range=int8_needs_reduced_range(),
            )
    except CLEANUP_ERRORS as error:
        raise failed("dynamic int8", error) from error
    path.write_bytes(onnx.load(path).SerializeToString(deterministic=True))


def _with_float_output(model: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """Leave the network's own output in float: eight bits would cut off every value above the calibrated range.

    The pair QuantizeLinear, DequantizeLinear at the output is taken out; the last layer's int8 weights stay. Not where
    the pair stands for the source's last operator: ONNX Runtime lets it do the work of a ReLU.
    """
    graph = model.graph
    for name in [value.name for value in graph.output]:
        makers = _makers(graph)
        last = makers[name]
        before = makers.get(last.input[0]) if last.op_type == "DequantizeLinear" else None
        if before is None or before.op_type != "QuantizeLinear" or before.input[0] not in makers:
            continue
        kept = before.input[0]
        if makers[kept].op_type != _makers(source.graph)[name].op_type:
            continue
        graph.node.remove(last)
        graph.node.remove(before)
        for node in graph.node:
            node.input[:] = [name if used == kept else used for used in node.input]
            node.output[:] = [name if used == kept else used for used in node.output]
    return model


def _compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """Short names for the tensors within the graph, and none for the conversions: of a small network's file they are a
    twentieth. Layers keep their names. A graph with branches or loops, which see the names around them, is left alone.
    """
    graph = model.graph
    if any(attribute.type == attribute.GRAPH for node in graph.node for attribute in node.attribute):
        return model
    kept = {value.name for value in (*graph.input, *graph.output)} | {""}
    inner = [tensor.name for tensor in graph.initializer] + [name for node in graph.node for name in node.output]
    free = (name for number in itertools.count() if (name := f"t{number}") not in kept)
    short = {name: next(free) for name in inner if name not in kept}
    for tensor in graph.initializer:
        tensor.name = short.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.name = ""
    graph.ClearField("value_info")
    return model


def _makers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}
