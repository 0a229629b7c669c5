"""An ONNX graph as a PyTorch network, for the stages that train: best effort, through onnx2torch.

onnx2torch knows operators up to opset 17 or so. Newer exports mostly use newer versions of operators whose meaning is
the same, so such a graph is written down in the older words first. Whether the network is right is told by its outputs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx2torch
import torch

from shared.errors import StageFailed
from worker.cleanup import clean, opset_of
from worker.vetting import invalid, load_onnx_checked, nodes

KNOWN_OPSET = 17
MAX_IR_VERSION = 10
PLAIN_NAME = re.compile(r"\w+", re.ASCII)
REDUCTIONS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSumSquare",
}  # fmt: skip
CONVERSION_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def write_graph(source: Path, target: Path) -> None:
    """Write the graph as `load_graph` reads it: cleaned, in the words of opset 17, every name plain.

    Raises StageFailed (not_importable, invalid_onnx).
    """
    clean(source, target)
    model = load_onnx_checked(target)
    if len(model.graph.input) > 1:
        raise _not_importable(f"it has {len(model.graph.input)} inputs, and training gives it images alone")
    _skip_empty_padding(model.graph)
    if opset_of(model) > KNOWN_OPSET:
        _lower(model)
    _rename(model.graph)
    target.write_bytes(model.SerializeToString(deterministic=True))
    load_graph(target)


def load_graph(path: Path) -> torch.nn.Module:
    """The network of a graph that `write_graph` wrote, with its weights, in evaluation mode.

    The converter writes Python from the graph's names: one that is not plain is not given to it. Raises StageFailed
    (not_importable, invalid_onnx).
    """
    model = load_onnx_checked(path)
    if any(name and not PLAIN_NAME.fullmatch(name) for name in _names(model.graph)):
        raise invalid("The graph has names that are no plain words.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what may differ; the outputs tell whether it does
            found: torch.nn.Module = onnx2torch.convert(model).eval()
    except CONVERSION_ERRORS as error:
        raise _not_importable(_cause(model, error)) from error
    return found


def _cause(model: onnx.ModelProto, error: Exception) -> str:
    """Which operator it is that the converter does not know, or else what it says."""
    asked = re.search(r"operation_type='(\w+)', version=(\d+)", str(error))
    if asked:
        return f"its operator {asked[1]} (opset {asked[2]}) is not known to the converter"
    told = (str(error) or type(error).__name__).splitlines()[0]
    return f"of its operators ({', '.join(sorted({node.op_type for node in nodes(model.graph)}))}) one fails: {told}"


def _not_importable(cause: str) -> StageFailed:
    return StageFailed(
        f"The ONNX network cannot be brought back to PyTorch: {cause}.",
        hint="Leave out import_onnx and the stages that train: quantize and build_engine take the ONNX as it is. "
        "Or send the network as an architecture with weights.",
        code="not_importable",
    )


# ---------------------------------------------------------------- older words


def _skip_empty_padding(graph: onnx.GraphProto) -> None:
    """Padding by nothing, as U-Nets export it for sizes that fit, would be traced as depending on the input."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        pads = constants.get(node.input[1]) if node.op_type == "Pad" and len(node.input) > 1 else None
        if pads is not None and not onnx.numpy_helper.to_array(pads).any():
            node.op_type = "Identity"
            del node.input[1:]
            del node.attribute[:]


def _lower(model: onnx.ModelProto) -> None:
    """Say the same in opset 17; the checker and the outputs tell whether it is the same."""
    opset = opset_of(model)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in nodes(model.graph):
        if node.op_type in REDUCTIONS:
            _axes_to_attribute(node, constants)
        for name in UNKNOWN_BEFORE.get(node.op_type, ()):
            _drop_default(node, name)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", KNOWN_OPSET))
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    del model.graph.value_info[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        told = str(error).strip().splitlines()[0]
        raise _not_importable(f"opset {opset} has no older form of it ({told})") from error


UNKNOWN_BEFORE = {
    "Resize": ("antialias", "keep_aspect_ratio_policy"),
    "Reshape": ("allowzero",),
    "Cast": ("saturate",),
}
DEFAULTS = {"antialias": 0, "allowzero": 0, "saturate": 1, "keep_aspect_ratio_policy": b"stretch"}


def _drop_default(node: onnx.NodeProto, name: str) -> None:
    """Take out an attribute that opset 17 or the converter does not have, where it says what is done anyway.

    Reshape's allowzero matters only where the shape has a zero, which an image's never has.
    """
    kept = [
        entry
        for entry in node.attribute
        if entry.name != name or (name != "allowzero" and onnx.helper.get_attribute_value(entry) != DEFAULTS.get(name))
    ]
    del node.attribute[:]
    node.attribute.extend(kept)


def _axes_to_attribute(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> None:
    """Until opset 17 the axes of most reductions were an attribute, not an input."""
    if len(node.input) > 1 and node.input[1] in constants:
        axes = constants[node.input[1]].tolist()
        node.attribute.append(onnx.helper.make_attribute("axes", axes))
        del node.input[1:]
    kept = [entry for entry in node.attribute if entry.name != "noop_with_empty_axes"]
    del node.attribute[:]
    node.attribute.extend(kept)


# ---------------------------------------------------------------- plain names


def _rename(graph: onnx.GraphProto) -> None:
    """Number all values, and name every node by its operator and number."""
    numbered: dict[str, str] = {"": ""}

    def plain(name: str) -> str:
        return numbered.setdefault(name, f"value_{len(numbered)}")

    for index, node in enumerate(_every_node(graph, plain)):
        node.name = f"{node.op_type}_{index}"


def _every_node(graph: onnx.GraphProto, plain: Callable[[str], str]) -> Iterator[onnx.NodeProto]:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = plain(value.name)
    for node in graph.node:
        node.input[:] = [plain(name) for name in node.input]
        node.output[:] = [plain(name) for name in node.output]
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _every_node(inner, plain)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from (node.name, node.op_type, *node.input, *node.output)
        yield from (entry.name for entry in node.attribute)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _names(inner)
