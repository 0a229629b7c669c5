"""ONNX networks as other tools write them, small and with weights that mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 16
CLASSES = 3


def network(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, Any],
    *,
    opset: int = 17,
    ir_version: int = 8,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "stranger",
        list(inputs),
        list(outputs),
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def convolutions(first: str, last: str, *, dims: int = 2) -> list[onnx.NodeProto]:
    """One channel to eight, ReLU, to the classes: needs the weights of `filters`."""
    pads = [1] * (2 * dims)
    return [
        helper.make_node("Conv", [first, "w1", "b1"], ["c1"], pads=pads),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], [last], pads=pads),
    ]


def filters(dims: int = 2, classes: int = CLASSES) -> dict[str, np.ndarray]:
    kernel = (3,) * dims
    return {"w1": normal(8, 1, *kernel), "b1": normal(8, 1)[:, 0], "w2": normal(classes, 8, *kernel, seed=1)}


def plain(path: Path, *, batch: int | str = "batch", opset: int = 17, ir_version: int = 8) -> Path:
    """(batch, 1, H, W) to (batch, classes, H, W)."""
    ports = [floats("image", batch, 1, SIZE, SIZE)], [floats("scores", batch, CLASSES, SIZE, SIZE)]
    return network(path, convolutions("image", "scores"), *ports, filters(), opset=opset, ir_version=ir_version)


def channels_last(path: Path, classes: int = CLASSES) -> Path:
    """(batch, H, W, 1) to (batch, H, W, classes), as TensorFlow's converter writes it."""
    nodes = [
        helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2]),
        *convolutions("nchw", "found"),
        helper.make_node("Transpose", ["found"], ["scores"], perm=[0, 2, 3, 1]),
    ]
    ports = [floats("image", "batch", SIZE, SIZE, 1)], [floats("scores", "batch", SIZE, SIZE, classes)]
    return network(path, nodes, *ports, filters(classes=classes))


def one_channel(path: Path) -> Path:
    """(batch, 1, H, W) to the probability (batch, 1, H, W)."""
    nodes = [*convolutions("image", "found"), helper.make_node("Sigmoid", ["found"], ["scores"])]
    ports = [floats("image", "batch", 1, SIZE, SIZE)], [floats("scores", "batch", 1, SIZE, SIZE)]
    return network(path, nodes, *ports, filters(classes=1))


def weights_as_inputs(path: Path) -> Path:
    """Every initializer is an input too, as old exporters wrote it, at the opset and IR version of their time."""
    ports = (
        [floats("image", "batch", 1, SIZE, SIZE), *(floats(name, *value.shape) for name, value in filters().items())],
        [floats("scores", "batch", CLASSES, SIZE, SIZE)],
    )
    return network(path, convolutions("image", "scores"), *ports, filters(), opset=9, ir_version=3)


def weights_as_nodes(path: Path) -> Path:
    """The weights lie in Constant nodes."""
    constants = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in filters().items()
    ]
    ports = [floats("image", "batch", 1, SIZE, SIZE)], [floats("scores", "batch", CLASSES, SIZE, SIZE)]
    return network(path, [*constants, *convolutions("image", "scores")], *ports, {})


def volumes(path: Path) -> Path:
    """(batch, 1, D, H, W) to (batch, classes, D, H, W)."""
    ports = [floats("image", "batch", 1, 8, SIZE, SIZE)], [floats("scores", "batch", CLASSES, 8, SIZE, SIZE)]
    return network(path, convolutions("image", "scores", dims=3), *ports, filters(3))


def with_age(path: Path) -> Path:
    """Inputs age (batch, 1), slope () and image; outputs an embedding (batch, 8) and scores (batch, classes)."""
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
        helper.make_node("Mul", ["age", "slope"], ["years"]),
        helper.make_node("Concat", ["embedding", "years"], ["joined"], axis=1),
        helper.make_node("MatMul", ["joined", "head"], ["scores"]),
    ]
    weights = {name: value for name, value in filters().items() if name != "w2"} | {"head": normal(9, CLASSES)}
    inputs = [floats("age", "batch", 1), floats("slope"), floats("image", "batch", 1, SIZE, SIZE)]
    return network(path, nodes, inputs, [floats("embedding", "batch", 8), floats("scores", "batch", CLASSES)], weights)
