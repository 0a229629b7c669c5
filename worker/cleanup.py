"""An ONNX graph as runtimes like it: initializers are no inputs, old opsets raised, constants folded, BatchNorm fused.

What a graph computes stays the same; what a runtime makes of it does not. ONNX Runtime runs a graph whose weights are
also inputs several times slower, and per-channel int8 on an opset below 13 is an invalid graph.

ONNX Runtime's optimizer writes operators that its CPU has no kernel for as the operators that they are defined by:
HardSwish becomes HardSigmoid and Mul. OpenVINO has kernels for them, fuses them into the layer before, and quantizes
the pieces badly, so they are set aside while ONNX Runtime works on the graph and are put back afterwards.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.version_converter
from onnxruntime.capi import onnxruntime_pybind11_state as errors
from onnxruntime.quantization.shape_inference import quant_pre_process

from shared.errors import StageFailed
from worker.vetting import load_onnx_checked

MIN_PER_CHANNEL_OPSET = 13
MIN_HARD_SWISH_OPSET = 14
RAISED_OPSET = 17
WITHOUT_KERNEL = {"GroupNormalization", "HardSwish", "Mish", "Swish"}  # of one tensor, whose shape they keep
QUANTIZING = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv",
    "QLinearMatMul",
}  # fmt: skip
CLEANUP_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError, errors.Fail,
    errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented,
    errors.RuntimeException,
)  # fmt: skip


def clean(source: Path, target: Path) -> None:
    """Write the cleaned graph; every node has a name, and shapes are inferred as far as they can be.

    What cannot be raised or folded is left as it is: the graph is right without. Raises StageFailed (invalid_onnx).
    """
    model = load_onnx_checked(source)
    with contextlib.suppress(RuntimeError, ValueError):
        if opset_of(model) < MIN_HARD_SWISH_OPSET:
            model = onnx.version_converter.convert_version(model, RAISED_OPSET)
    _name_nodes(model.graph)
    if opset_of(model) >= MIN_HARD_SWISH_OPSET:
        _fuse_hard_swish(model.graph)
    target.write_bytes(_folded(model).SerializeToString(deterministic=True))


def refuse_quantized(model: onnx.ModelProto) -> None:
    """Raises StageFailed (already_quantized): eight bits of eight bits would lose twice and gain nothing."""
    found = sorted({node.op_type for node in model.graph.node} & QUANTIZING)
    if not found and not any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer):
        return
    raise StageFailed(
        f"The model is quantized already ({', '.join(found) or 'its weights are fp16'}); a model is quantized once.",
        hint="Send the fp32 model that it was made of, or leave the quantize stage out.",
        code="already_quantized",
    )


def refuse_old_opset(model: onnx.ModelProto) -> None:
    """Raises StageFailed (quantize_failed) where the opset has no per-channel scales and could not be raised."""
    if opset_of(model) < MIN_PER_CHANNEL_OPSET:
        raise StageFailed(
            f"Int8 needs opset {MIN_PER_CHANNEL_OPSET}; the model has {opset_of(model)} and cannot be raised.",
            hint=f"Export it again with opset {RAISED_OPSET} or later.",
            code="quantize_failed",
        )


def opset_of(model: onnx.ModelProto) -> int:
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def layer_names(model: onnx.ModelProto) -> dict[str, str]:
    """What a person calls each node that has weights: its weights' name without its ending, or else the node's own."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        weights = [name for name in node.input[1:2] if name in constants]
        stem = weights[0].removesuffix(".weight") if weights and weights[0].endswith(".weight") else node.name
        found[node.name] = stem
    return found


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give a name to every node that has none or one that another has."""
    taken: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}.{index}"
        taken.add(node.name)


def _fuse_hard_swish(graph: onnx.GraphProto) -> None:
    """Write x * HardSigmoid(x) as the HardSwish that it is, where nothing else reads the HardSigmoid."""
    uses = [name for node in graph.node for name in node.input] + [value.name for value in graph.output]
    gates = {node.output[0]: node for node in graph.node if node.op_type == "HardSigmoid" and _is_hard_swish_gate(node)}
    for node in graph.node:
        if node.op_type != "Mul":
            continue
        for name, other in (node.input, reversed(node.input)):
            gate = gates.get(name)
            if gate is not None and uses.count(name) == 1 and gate.input[0] == other:
                graph.node.remove(gate)
                node.CopyFrom(onnx.helper.make_node("HardSwish", [other], node.output, name=node.name))
                break


def _is_hard_swish_gate(node: onnx.NodeProto) -> bool:
    values = {attribute.name: attribute.f for attribute in node.attribute}
    alpha, beta = float(values.get("alpha", 0.2)), float(values.get("beta", 0.5))
    return abs(alpha - 1 / 6) < 1e-4 and beta == 0.5


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph through ONNX Runtime's basic optimizations, which give standard operators only."""
    with tempfile.TemporaryDirectory(prefix="burnish-cleanup-") as directory:
        path = Path(directory) / "model.onnx"
        optimized = onnx.ModelProto()
        optimized.CopyFrom(model)
        kept = _set_aside(optimized.graph)
        onnx.save(optimized, path)
        try:
            with quiet():
                # symbolic shape inference fails on bilinear upsampling, and is not needed
                quant_pre_process(path, path, skip_symbolic_shape=True)
            folded = onnx.load(path)
        except CLEANUP_ERRORS:
            return model
    if any(node.domain not in ("", "ai.onnx") for node in folded.graph.node):
        return model
    if not _put_back(folded.graph, kept, model.graph):
        return model
    used = [entry for entry in folded.opset_import if entry.domain in ("", "ai.onnx")]
    del folded.opset_import[:]
    folded.opset_import.extend(used)
    _name_nodes(folded.graph)
    return folded


def _set_aside(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Put another operator that keeps its input's shape in the place of each one without a kernel; these, by name.

    Not where it would be folded: a stand-in's value is not the operator's.
    """
    constants = {tensor.name for tensor in graph.initializer} | {""}
    varying = {value.name for value in graph.input} - constants
    kept: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if not varying & set(node.input):
            continue
        varying.update(node.output)
        if node.op_type in WITHOUT_KERNEL and node.domain in ("", "ai.onnx") and constants >= set(node.input[1:]):
            kept[node.name] = onnx.NodeProto()
            kept[node.name].CopyFrom(node)
            node.CopyFrom(
                onnx.helper.make_node("ThresholdedRelu", node.input[:1], node.output, name=node.name, alpha=0.0)
            )
    return kept


def _put_back(graph: onnx.GraphProto, kept: dict[str, onnx.NodeProto], source: onnx.GraphProto) -> bool:
    """Put the operators back where their stand-ins are; False where one of these is gone."""
    stand_ins = [node for node in graph.node if node.name in kept]
    if len(stand_ins) != len(kept) or any(node.op_type != "ThresholdedRelu" for node in stand_ins):
        return False
    present = {tensor.name for tensor in graph.initializer}
    for node in stand_ins:
        operator = kept[node.name]
        inputs, outputs = [node.input[0], *operator.input[1:]], list(node.output)
        node.CopyFrom(operator)
        node.input[:], node.output[:] = inputs, outputs
        missing = set(inputs[1:]) - present
        graph.initializer.extend(tensor for tensor in source.initializer if tensor.name in missing)
        present |= missing
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and warnings away from stdout, which belongs to the pipeline."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
