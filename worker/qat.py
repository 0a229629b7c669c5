"""Quantization-aware training: a float network's weights, made so that eight bits lose less of what they compute.

The network learns with its rounding in the loop and comes back plain: it is exported, and quantized by the same writers
as any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from shared.recipe import ExportOnnx, ImportOnnx, ModelFormat, Quantize
from worker import engines, stages
from worker.cleanup import clean
from worker.context import Model, StageContext
from worker.evaluation.agreement import keep_reference
from worker.fake_quantization import FakeQuantization
from worker.loading import load_module
from worker.quantization.calibration import Calibration
from worker.quantization.forms import RuntimeForms
from worker.quantization.quality import GOOD
from worker.training import TrainingLog, train

MOST_LOST = 0.01  # of the leading metric


def train_for_int8(
    stage: Quantize, graph: Path, calibration: Calibration, ctx: StageContext, directory: Path, *, symmetric: bool
) -> tuple[Path, TrainingLog]:
    """Train the network that the ONNX `graph` was made of: its cleaned ONNX in the directory, and how it went.

    `symmetric` is for int8 as TensorRT takes it. Raises StageFailed: not_importable, export_failed, parity_failed, and
    what training raises.
    """
    assert stage.training is not None
    network = network_of(graph, ctx, directory)
    module, teacher = load_module(network), load_module(network)

    # rounding goes in where the writers round, over the ranges that the calibration samples have
    torch.set_num_threads(ctx.threads)
    fake = FakeQuantization(module, next(_batches(calibration)), symmetric=symmetric)
    fake.watch(_batches(calibration))

    # it learns from the labels and from what it computed in float; then the rounding comes out
    log = train(InFullPrecision(module), stage.training, ctx, teacher=teacher, soft_targets=stage.soft_targets)
    fake.remove()

    trained = directory / "float.onnx"
    _export(_saved(module, network, directory), ctx, directory, trained)
    return trained, log


def network_of(graph: Path, ctx: StageContext, directory: Path) -> Model:
    """The PyTorch network behind the ONNX: the job's own, or what an import makes of the graph. Raises StageFailed."""
    if ctx.network is not None:
        return ctx.network
    place = directory / "imported"
    place.mkdir()
    silent = replace(ctx, directory=place, progress=lambda fraction, message="": None)
    imported: Model = stages.load("import_onnx").run(ImportOnnx(), Model(ModelFormat.ONNX, graph), silent).model
    return imported


class InFullPrecision(nn.Module):
    """The network, never in half precision: what was rounded to eight bits would be rounded again, to other values."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            found: torch.Tensor = self.network(inputs)
        return found


def _batches(calibration: Calibration) -> Iterator[torch.Tensor]:
    """The calibration samples' images (n, C, ...), as many at a time as the ONNX takes where that is fixed."""
    for index in range(len(calibration)):
        yield torch.from_numpy(calibration.read(index)[calibration.input_name])


def _saved(module: nn.Module, network: Model, directory: Path) -> Model:
    path = directory / "model.safetensors"
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    safetensors.torch.save_file(weights, path)
    return replace(network, path=path)


def _export(model: Model, ctx: StageContext, directory: Path, path: Path) -> None:
    """As the job exports: held against this network, not against the one before it."""
    reference = directory / "reference.npy"
    keep_reference(engines.load("torch eager").open(model, ctx.threads), ctx.samples("evaluation"), reference)
    words = next((stage for stage in ctx.recipe.stages if isinstance(stage, ExportOnnx)), ExportOnnx())
    silent = replace(ctx, directory=directory, reference=reference, progress=lambda fraction, message="": None)
    clean(stages.load("export_onnx").run(words, model, silent).model.path, path)


# ---------------------------------------------------------------- before and after


@dataclass(frozen=True)
class Standing:
    """How good the int8 of a network is in the runtimes that lack a good form: the best form of each.

    `missed` says what those that are not good lose; `lost` is how much worse their leading metric is than that of the
    network that was to be trained, and empty without labels.
    """

    missed: dict[str, str]
    layers_in_float: int
    lost: dict[str, float]

    def is_better_than(self, other: Standing) -> bool:
        """Less is missed, or less is in float, or else its metric is higher; training may cost a point in exchange."""
        both = self.lost.keys() & other.lost.keys()
        gained = min((other.lost[name] - self.lost[name] for name in both), default=0.0)
        if gained < -MOST_LOST:
            return False
        own, others = ((len(one.missed), one.layers_in_float) for one in (self, other))
        return own < others or (own == others and gained > 0)

    def details(self) -> dict[str, Any]:
        return {"missed": self.missed, "layers_in_float": self.layers_in_float, "lost": self.lost}


def standing(made: Mapping[str, RuntimeForms], runtimes: Sequence[str], lost: float = 0.0) -> Standing:
    """How the runtimes' best forms stand; `lost` is what training for int8 cost the float network itself."""
    forms = {runtime: form for runtime in runtimes if (form := made[runtime].best) is not None}
    qualities = {runtime: form.quality for runtime, form in forms.items() if form.quality is not None}
    missing = {runtime: "there is no form" for runtime in runtimes if runtime not in forms}
    wrong = {runtime: one.describe() for runtime, one in qualities.items() if not one.reaches(GOOD)}
    return Standing(
        missed=missing | wrong,
        layers_in_float=sum(len(form.in_float) for form in forms.values()),
        lost={runtime: lost + one.loss for runtime, one in qualities.items() if one.loss is not None},
    )
