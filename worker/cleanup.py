"""An ONNX graph as runtimes like it: initializers are no inputs, old opsets raised, constants folded, BatchNorm fused.

What a graph computes stays the same; what a runtime makes of it does not. ONNX Runtime runs a graph whose weights are
also inputs several times slower, and per-channel int8 on an opset below 13 is an invalid graph.
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
RAISED_OPSET = 17
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
        if opset_of(model) < MIN_PER_CHANNEL_OPSET:
            model = onnx.version_converter.convert_version(model, RAISED_OPSET)
    _name_nodes(model.graph)
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


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph through ONNX Runtime's basic optimizations, which give standard operators only."""
    with tempfile.TemporaryDirectory(prefix="burnish-cleanup-") as directory:
        path = Path(directory) / "model.onnx"
        onnx.save(model, path)
        try:
            with quiet():
                # symbolic shape inference fails on bilinear upsampling, and is not needed
                quant_pre_process(path, path, skip_symbolic_shape=True)
            folded = onnx.load(path)
        except CLEANUP_ERRORS:
            return model
    if any(node.domain not in ("", "ai.onnx") for node in folded.graph.node):
        return model
    used = [entry for entry in folded.opset_import if entry.domain in ("", "ai.onnx")]
    del folded.opset_import[:]
    folded.opset_import.extend(used)
    _name_nodes(folded.graph)
    return folded


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and warnings away from stdout, which belongs to the pipeline."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
