"""From PyTorch to ONNX with a dynamic batch, checked in ONNX Runtime against the source model on real samples."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.onnx

from shared.errors import StageFailed
from shared.recipe import ExportOnnx, ModelFormat
from worker import engines
from worker.cleanup import clean
from worker.context import Model, StageContext, StageResult
from worker.evaluation.agreement import max_relative_error
from worker.loading import TensorOutput, load_module
from worker.vetting import load_onnx_checked

EXPORT_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, LookupError)


def run(stage: ExportOnnx, model: Model, ctx: StageContext) -> StageResult:
    """Raises StageFailed: export_failed, parity_failed."""
    samples = ctx.samples("evaluation")
    path = ctx.directory / "model.onnx"

    # trace the network and write the graph
    ctx.progress(0.05, "tracing the network")
    _export(load_module(model), samples.inputs(0, 2), stage, path)  # (n, C, [D,] H, W)

    # what the file says, not what was asked of the exporter
    ctx.progress(0.7, "cleaning the graph up")
    _strip_traces(path)
    clean(path, path)
    checked = load_onnx_checked(path)
    exported = Model(ModelFormat.ONNX, path)

    # the same outputs as the source model's, on real samples
    ctx.progress(0.8, "comparing with the source model")
    runner = engines.load("onnxruntime").open(exported, ctx.threads)
    error = max_relative_error(ctx.reference, runner, samples)
    if not error <= stage.tolerance:
        raise StageFailed(
            f"The exported network differs from the source model: relative error {error:.2g}, "
            f"tolerance {stage.tolerance:g}.",
            code="parity_failed",
        )
    ctx.progress(1.0)
    return StageResult(exported, details=_details(checked, stage))


def _export(module: torch.nn.Module, inputs: np.ndarray, stage: ExportOnnx, path: Path) -> None:
    # two samples: a batch of one would be taken for a constant
    example = torch.from_numpy(np.concatenate([inputs, inputs])[:2] if stage.dynamic_batch else inputs[:1])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns of its own internals
            torch.onnx.export(
                TensorOutput(module).eval(),
                (example,),
                path,
                input_names=["input"],
                output_names=["output"],
                opset_version=stage.opset,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if stage.dynamic_batch else None,
                external_data=False,
                verbose=False,
            )
    except EXPORT_ERRORS as error:
        raise StageFailed(
            f"The network cannot be exported: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            hint="Try dynamic_batch: false." if stage.dynamic_batch else None,
            code="export_failed",
        ) from error


def _strip_traces(path: Path) -> None:
    """Take out what the exporter notes of source files and lines: half of a small file, and not ours to tell."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    if model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_param"):
        _name_batch(model.graph)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _name_batch(graph: onnx.GraphProto) -> None:
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == symbol:
                dimension.dim_param = "batch"


def _details(model: onnx.ModelProto, stage: ExportOnnx) -> dict[str, object]:
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return {
        "opset": opset,
        "opset_asked": stage.opset,
        "ir_version": model.ir_version,
        "dynamic_batch": model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_param"),
        "operators": len(model.graph.node),
    }
