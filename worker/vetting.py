"""An ONNX file, read only if it is whole in itself and says nothing but standard operators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.checker
import onnx.inliner
from google.protobuf.message import DecodeError

from shared.errors import StageFailed
from shared.formats import inspect_file

MIN_OPSET = 9
MAX_SIDE = 65_536
MIN_IR_VERSION = 4  # below it, every initializer must be an input
WEIGHT_TYPES = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
)
QUANTIZED = frozenset(
    {
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv",
        "QLinearMatMul",
    }
)  # fmt: skip


def load_onnx_checked(path: Path) -> onnx.ModelProto:
    """A vetted ONNX model of which the ports are settled: see `load_onnx_vetted` and `check_ports`."""
    model = load_onnx_vetted(path)
    check_ports(model)
    return model


def load_onnx_vetted(path: Path) -> onnx.ModelProto:
    """The ONNX model, if it is whole in itself: standard operators only, all weights inside.

    Initializers that are also graph inputs are taken out of the inputs (no runtime folds constants that a caller
    could replace), weights in Constant nodes become initializers, local functions are inlined. Raises StageFailed
    with code invalid_onnx.
    """
    with path.open("rb") as file:
        inspect_file(file, path.stat().st_size, "onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except (ValueError, RuntimeError, OSError, DecodeError) as error:
        raise invalid(f"The ONNX file cannot be read: {error}") from error
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise invalid(
                f"The weights {tensor.name!r} lie in another file.",
                hint="Save one file: onnx.save(model, path, save_as_external_data=False).",
            )
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _check_domains(model)
    _take_initializers_out_of_inputs(model)
    _take_weights_out_of_nodes(model.graph)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise invalid(
            f"The ONNX model is not valid: {str(error).splitlines()[0]}",
            hint="onnx.checker.check_model(path) says the same; export the model again, or mend what it names.",
        ) from error
    return model


def check_ports(model: onnx.ModelProto) -> None:
    """The first input must be fp32 images or volumes, the others fp32 or int64, and all outputs fp32.

    Raises StageFailed (invalid_onnx).
    """
    graph = model.graph
    if not graph.input or not graph.output:
        raise invalid("The model has no input or no output.")
    shape, kind = input_shape(model), _kind(graph.input[0])
    if kind != onnx.TensorProto.FLOAT:
        raise invalid(
            f"The model's input is {_kind_name(graph.input[0])}; FLOAT is needed.",
            hint="Export the network with images in fp32; how bytes are scaled is said in data.preprocessing.",
        )
    if len(shape) not in (4, 5) or any(size is not None and not 1 <= size <= MAX_SIDE for size in shape):
        raise invalid(
            f"The model's input has the shape {shape}; (samples, channels, [depth,] height, width) is needed, "
            f"or with the channels at the end, each of 1 to {MAX_SIDE}.",
            hint="Export the network for batches of images or volumes; a dimension that varies has a name.",
        )
    for value in graph.input[1:]:
        if not value.type.tensor_type.shape.dim:
            raise invalid(
                f"The input {value.name!r} is a single number, not one a sample.",
                hint="Give it a value in source.constants.",
            )
        if _kind(value) not in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64):
            raise invalid(
                f"The input {value.name!r} is {_kind_name(value)}; beside the images there may be FLOAT and INT64.",
                hint="Give it a value in source.constants, or export the network with one of these types.",
            )
    for value in graph.output:
        if _kind(value) != onnx.TensorProto.FLOAT:
            raise invalid(
                f"The output {value.name!r} is {_kind_name(value)}; outputs must be FLOAT.",
                hint='Name the one with the scores, and the others are taken out: source.outputs {"logits": name}.',
            )


def _check_domains(model: onnx.ModelProto) -> None:
    foreign = sorted({node.domain for node in nodes(model.graph)} - {"", "ai.onnx"})
    if foreign:
        named = sorted({f"{node.domain}::{node.op_type}" for node in nodes(model.graph) if node.domain in foreign})
        raise invalid(
            "The model uses operators outside the ONNX standard: "
            + ", ".join(named[:3])
            + (f" and {len(named) - 3} more." if len(named) > 3 else "."),
            hint="Export it again with standard operators only; custom operators cannot be vetted.",
        )
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset, newest = versions.get("", versions.get("ai.onnx", 0)), onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise invalid(f"The model has opset {opset}; {MIN_OPSET} to {newest} are accepted.")
    if model.ir_version > onnx.IR_VERSION:
        raise invalid(f"The model has IR version {model.ir_version}; up to {onnx.IR_VERSION} are accepted.")


def _take_initializers_out_of_inputs(model: onnx.ModelProto) -> None:
    constants = initializers(model.graph)
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = max(model.ir_version, MIN_IR_VERSION)


def initializers(graph: onnx.GraphProto) -> set[str]:
    """Names of the graph's constants."""
    return {tensor.name for tensor in graph.initializer} | {entry.values.name for entry in graph.sparse_initializer}


def _take_weights_out_of_nodes(graph: onnx.GraphProto) -> None:
    """Make initializers of the arrays that Constant nodes hold: it is there that quantizers look for weights."""
    outputs, kept = {value.name for value in graph.output}, []
    for node in graph.node:
        tensor = next((entry.t for entry in node.attribute if entry.name == "value"), None)
        weights = tensor if tensor is not None and tensor.dims and tensor.data_type in WEIGHT_TYPES else None
        if node.op_type != "Constant" or weights is None or node.output[0] in outputs:
            kept.append(node)
        else:
            weights.name = node.output[0]
            graph.initializer.append(weights)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _kind(value: onnx.ValueInfoProto) -> int:
    return value.type.tensor_type.elem_type


def _kind_name(value: onnx.ValueInfoProto) -> str:
    if not value.type.HasField("tensor_type"):
        return "no tensor"
    return str(onnx.TensorProto.DataType.Name(_kind(value)))


def operators(model: onnx.ModelProto) -> set[str]:
    """Every operator that the model uses, at any depth."""
    return {node.op_type for node in nodes(model.graph)}


def other_inputs(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the inputs beside the images."""
    return tuple(value.name for value in model.graph.input[1:])


def input_shape(model: onnx.ModelProto) -> list[int | None]:
    """Shape of the model's input; a dimension that varies is None."""
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    return [entry.dim_value if entry.HasField("dim_value") else None for entry in dimensions]


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of the graph and of the graphs within its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes(inner)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in the model: weights, sparse weights, and constants in attributes, at any depth."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _graph_tensors(inner)


def invalid(detail: str, hint: str | None = None) -> StageFailed:
    return StageFailed(detail, hint=hint, code="invalid_onnx")
