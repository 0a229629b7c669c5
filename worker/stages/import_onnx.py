"""From ONNX back to PyTorch: the graph becomes a network that can be trained, if it gives the same outputs."""

from __future__ import annotations

import safetensors.torch

from shared.errors import StageFailed
from shared.recipe import ImportOnnx, ModelFormat
from worker import engines
from worker.context import Graph, Model, StageContext, StageResult
from worker.evaluation.agreement import max_relative_error
from worker.onnx_to_torch import load_graph, write_graph


def run(stage: ImportOnnx, model: Model, ctx: StageContext) -> StageResult:
    """Raises StageFailed: not_importable, already_quantized, parity_failed."""
    graph, path = ctx.directory / "graph.onnx", ctx.directory / "model.safetensors"

    # the graph in the converter's words, and its weights as a file of their own
    ctx.progress(0.1, "bringing the graph back to PyTorch")
    write_graph(model.path, graph)
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in load_graph(graph).state_dict().items()}
    safetensors.torch.save_file(weights, path)
    imported = Model(ModelFormat.TORCH, path, Graph(graph))

    # the same outputs as the source model's, on real samples
    ctx.progress(0.7, "comparing with the source model")
    runner = engines.load("torch eager").open(imported, ctx.threads)
    error = max_relative_error(ctx.reference, runner, ctx.samples("evaluation"))
    if not error <= stage.tolerance:
        raise StageFailed(
            f"The imported network differs from the source model: relative error {error:.2g}, "
            f"tolerance {stage.tolerance:g}.",
            hint="Leave out import_onnx and the stages that train: quantize and build_engine take the ONNX as it is.",
            code="parity_failed",
        )
    ctx.progress(1.0)
    return StageResult(imported, details={"tensors": len(weights)})
