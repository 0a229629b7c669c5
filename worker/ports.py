"""What goes into an ONNX network and what comes out, as the recipe names it: images first, the scores first."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from pydantic import JsonValue

from shared.errors import StageFailed
from shared.recipe import OnnxSource
from worker.vetting import nodes


def settle_ports(model: onnx.ModelProto, source: OnnxSource) -> bool:
    """Make constants of the inputs that have a value, put the images' input first, and keep the named output alone.

    A dimension of -1, as some exporters write one that varies, gets a name in place of it. An output whose samples lie
    along another axis than the first, as recurrent networks have it, is transposed.
    Works on the model in place, which must be vetted; tells whether anything changed. Raises StageFailed
    (unknown_port).
    """
    before = [value.name for value in (*model.graph.input, *model.graph.output)]
    is_named = _name_open_dimensions(model.graph)
    _fix_constants(model.graph, source)
    _put_images_first(model.graph, source)
    _keep_named_output(model.graph, source)
    _put_samples_first(model.graph)
    return is_named or before != [value.name for value in (*model.graph.input, *model.graph.output)]


def _name_open_dimensions(graph: onnx.GraphProto) -> bool:
    """Whether there were any. The first axis is the batch's, the same everywhere; others are each value's own."""
    is_named = False
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis, entry in enumerate(value.type.tensor_type.shape.dim):
            if entry.HasField("dim_value") and entry.dim_value == -1:
                entry.dim_param = "batch" if axis == 0 else f"{value.name}.{axis}"
                is_named = True
    return is_named


def _fix_constants(graph: onnx.GraphProto, source: OnnxSource) -> None:
    for name, given in source.constants.items():
        value = _named(graph.input, name, "input")
        graph.initializer.append(onnx.numpy_helper.from_array(_filled(value, given), name))
        graph.input.remove(value)


def _filled(value: onnx.ValueInfoProto, given: JsonValue) -> np.ndarray:
    """The given number or lists in the input's type and shape; a dimension that varies is 1 where a number fills it."""
    described = value.type.tensor_type
    sizes = [entry.dim_value if entry.HasField("dim_value") else None for entry in described.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(described.elem_type)
    try:
        found = np.asarray(given, dtype=dtype)
    except (TypeError, ValueError):
        raise _unknown(f"The constant {value.name!r} is not a number, nor lists of numbers of one shape.") from None
    if found.ndim == 0:
        found = np.full([1 if size is None else size for size in sizes], found)
    fits = found.ndim == len(sizes) and all(size in (None, own) for size, own in zip(sizes, found.shape, strict=True))
    if not fits:
        raise _unknown(f"The constant {value.name!r} has the shape {list(found.shape)}; the input's is {sizes}.")
    return found


def _put_images_first(graph: onnx.GraphProto, source: OnnxSource) -> None:
    if source.inputs is not None:
        image = _named(graph.input, source.inputs.image, "input")
    elif len(graph.input) <= 1:
        return
    else:
        ranks = [len(value.type.tensor_type.shape.dim) for value in graph.input]
        likely = [value for value, rank in zip(graph.input, ranks, strict=True) if rank in (4, 5)]
        if len(likely) != 1:
            names = ", ".join(value.name for value in graph.input)
            raise _unknown(
                f"The network has {len(graph.input)} inputs ({names}); which takes the images is not plain.",
                hint='Name it: source.inputs {"image": name}.',
            )
        image = likely[0]
    ordered = [image, *(value for value in graph.input if value.name != image.name)]
    del graph.input[:]
    graph.input.extend(ordered)


def _keep_named_output(graph: onnx.GraphProto, source: OnnxSource) -> None:
    """Take out the other outputs, and the nodes that worked for them alone."""
    if source.outputs is None:
        return
    kept = _named(graph.output, source.outputs.logits, "output")
    del graph.output[:]
    graph.output.append(kept)
    needed, used = {kept.name}, []
    for node in reversed(graph.node):  # a vetted graph is in topological order
        if not needed.isdisjoint(node.output):
            used.append(node)
            needed.update(node.input)
            needed.update(name for inner in _inner(node) for name in inner.input)
            needed.update(value.name for attribute in node.attribute for value in attribute.g.output)
    del graph.node[:]
    graph.node.extend(reversed(used))


def _put_samples_first(graph: onnx.GraphProto) -> None:
    """Only where the graph says so: an axis of the output, and not its first, has the name of the input's first."""
    axes = graph.input[0].type.tensor_type.shape.dim if graph.input else []
    batch = axes[0].dim_param if axes else ""
    if not batch:
        return
    for index, value in enumerate(list(graph.output)):
        names = [entry.dim_param for entry in value.type.tensor_type.shape.dim]
        if names.count(batch) != 1 or names[0] == batch:
            continue
        axis = names.index(batch)
        order = [axis, *(other for other in range(len(names)) if other != axis)]
        first = copy.deepcopy(value)
        first.name = f"{value.name}.samples_first"
        for entry, old in zip(first.type.tensor_type.shape.dim, order, strict=True):
            entry.CopyFrom(value.type.tensor_type.shape.dim[old])
        graph.node.append(
            onnx.helper.make_node("Transpose", [value.name], [first.name], name=first.name, perm=order)
        )
        graph.output[index].CopyFrom(first)


def _inner(node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from nodes(graph)


def _named(values: Iterable[onnx.ValueInfoProto], name: str, what: str) -> onnx.ValueInfoProto:
    found = {value.name: value for value in values}
    if name not in found:
        raise _unknown(f"The network has no {what} named {name!r}; it has {', '.join(found)}.")
    return found[name]


def _unknown(detail: str, hint: str | None = None) -> StageFailed:
    return StageFailed(detail, hint=hint, code="unknown_port")
