"""How large a network is in itself: parameters and multiply-accumulates, counted and not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.shape_inference
import torch
from torch.utils.flop_counter import FlopCounterMode

from worker.loading import TensorOutput
from worker.vetting import input_shape, load_onnx_checked

Shapes = dict[str, list[int]]


def module_parameters(module: torch.nn.Module) -> int:
    """Number of the network's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def module_macs(module: torch.nn.Module, sample: tuple[int, ...]) -> int:
    """Multiply-accumulates of one sample of shape (C, [D,] H, W): convolutions and matrix products."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        TensorOutput(module)(torch.zeros(1, *sample))
    return int(counter.get_total_flops()) // 2


def onnx_parameters(path: Path) -> int:
    """Number of weights in an ONNX file: float or int8 arrays, without scales, zero points, shapes and indices."""
    graph = load_onnx_checked(path).graph
    settings = {name for node in graph.node if "Linear" in node.op_type for name in node.input[1:]}
    indices = {onnx.TensorProto.INT64, onnx.TensorProto.BOOL}
    return sum(
        math.prod(tensor.dims)
        for tensor in graph.initializer
        if tensor.name not in settings and tensor.dims and tensor.data_type not in indices
    )


def onnx_macs(path: Path, sample: tuple[int, ...]) -> int | None:
    """Multiply-accumulates of one sample, its images of shape (C, [D,] H, W) or with C at the end.

    None where a shape cannot be told from the file.
    """
    model = load_onnx_checked(path)
    batch = input_shape(model)[0] or 1
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    for entry, size in zip(dimensions, (batch, *sample), strict=True):
        entry.dim_value = size
    for other in model.graph.input[1:]:
        shape = other.type.tensor_type.shape.dim
        if shape and not shape[0].HasField("dim_value"):
            shape[0].dim_value = batch
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    shapes = _shapes(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
    try:
        return sum(_macs(node, shapes) for node in model.graph.node) // batch
    except KeyError:
        return None


def _shapes(graph: onnx.GraphProto) -> Shapes:
    found = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if all(entry.HasField("dim_value") for entry in dimensions) and value.type.tensor_type.HasField("shape"):
            found[value.name] = [entry.dim_value for entry in dimensions]
    found |= {node.output[0]: list(value.shape) for node, value in _constants(graph)}
    return found


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, np.ndarray]]:
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node, onnx.numpy_helper.to_array(attribute.t)


def _macs(node: onnx.NodeProto, shapes: Shapes) -> int:
    if node.op_type == "Conv":  # every output element sums over the kernel's (C / groups, kH, kW)
        return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "ConvTranspose":  # every input element is spread over (K / groups, kH, kW)
        return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "MatMul":
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]
    return 0
