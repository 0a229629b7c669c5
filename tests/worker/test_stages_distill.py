"""Distilling: where the student comes from, that it is the smaller one, and what is told of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import AttentionUnet, BasicUNet, DynUNet, SegResNet, SwinUNETR, UNet
from safetensors.torch import load_file, save_file

from shared.errors import StageFailed
from shared.recipe import Architecture, Distill, ExportOnnx, ModelFormat, SoftTargets, Training
from tests.worker.workbench import ARGUMENTS, Workbench
from worker import engines
from worker.architectures import constructor, new_module
from worker.context import Model
from worker.loading import load_module
from worker.stages import distill, export_onnx
from worker.width import narrower, prune_and_forget

QUICK = Training(epochs=2, batch=8, learning_rate=0.01, validation_ratio=0.1)
SMALL = Architecture(library="monai", name="BasicUNet", arguments={**ARGUMENTS, "features": [8] * 6})


def parameters(architecture: Architecture) -> int:
    return sum(parameter.numel() for parameter in constructor(architecture)().parameters())


# ---------------------------------------------------------------- the stage


def test_a_student_of_its_own_is_trained_and_can_be_exported(bench: Workbench, tmp_path: Path) -> None:
    result = bench.run(Distill(student=SMALL, training=QUICK), bench.source, tmp_path / "distilled")
    assert (result.model.architecture, result.model.pruned, result.model.precision) == (SMALL, False, "fp32")
    assert result.details["parameters"] < result.details["source_parameters"]
    assert result.details["student"] == "an architecture of its own"
    assert (result.details["epochs_run"], len(result.details["history"])) == (2, 2)
    assert 0 <= result.details["validation_dice"] <= 1
    student = load_module(result.model)
    samples = bench.samples("evaluation")
    inputs = samples.take(samples.spread(16))
    with torch.no_grad():
        expected = student(torch.from_numpy(inputs)).numpy()

    # held against the student itself, as the pipeline does once a stage has trained
    np.save(tmp_path / "reference.npy", expected)
    context = dataclasses.replace(bench.context(tmp_path), reference=tmp_path / "reference.npy")
    exported = export_onnx.run(ExportOnnx(), result.model, context)
    outputs = engines.load("onnxruntime").open(exported.model, 1).run(inputs)
    assert np.abs(outputs - expected).max() < 1e-3


def test_a_student_learns_from_its_teacher(bench: Workbench, tmp_path: Path) -> None:
    training = Training(epochs=12, batch=6, learning_rate=0.02, validation_ratio=0.1)
    soft_targets = SoftTargets(temperature=2, alpha=0.9, teacher="always")
    stage = Distill(student=SMALL, training=training, soft_targets=soft_targets)
    result = bench.run(stage, bench.source, tmp_path)
    assert result.details["history"][-1]["loss"] < 0.5 * result.details["history"][0]["loss"]
    assert result.details["validation_dice"] > 0.5


def test_the_same_job_gives_the_same_bytes(bench: Workbench, tmp_path: Path) -> None:
    first, second = (
        bench.run(Distill(student=SMALL, training=QUICK), bench.source, tmp_path / name).model.path.read_bytes()
        for name in ("first", "second")
    )
    assert first == second


def test_a_student_by_width_has_fewer_channels_and_the_same_ends(bench: Workbench, tmp_path: Path) -> None:
    result = bench.run(Distill(width=0.5, training=QUICK), bench.source, tmp_path)
    assert result.model.architecture is not None
    assert result.model.architecture.arguments["features"] == [8, 8, 8, 8, 16, 8]
    assert result.model.architecture.arguments["out_channels"] == 4
    assert result.details["student"] == "the source's constructor, narrower"
    load_module(result.model)


def test_a_source_without_a_width_is_pruned_and_forgets_its_weights(bench: Workbench, tmp_path: Path) -> None:
    arguments = {"in_channels": 1, "out_channels": 4, "backbone": "resnet10"}
    wide = Architecture(library="monai", name="FlexibleUNet", arguments=arguments)
    assert narrower(wide, 0.5) is None
    torch.manual_seed(0)
    save_file(new_module(wide).state_dict(), tmp_path / "wide.safetensors")
    source = Model(ModelFormat.TORCH, tmp_path / "wide.safetensors", wide)
    context = dataclasses.replace(bench.context(tmp_path), source=source)
    result = distill.run(Distill(width=0.5, training=QUICK.model_copy(update={"epochs": 1})), source, context)
    assert result.model.pruned
    assert result.model.architecture == wide
    assert result.details["student"] == "the source, pruned and with new weights"
    assert result.details["parameters"] < 0.35 * result.details["source_parameters"]
    assert load_module(result.model)(torch.zeros(1, 1, 32, 32)).shape == (1, 4, 32, 32)


def test_what_cannot_be_narrowed_is_refused_before_it_is_trained() -> None:
    class Stubborn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Conv2d(1, 16, 1), torch.nn.Conv2d(16, 4, 1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no graph of this one")

    with pytest.raises(StageFailed, match="Stubborn cannot be made narrower: no graph of this one") as caught:
        prune_and_forget(Stubborn(), torch.zeros(1, 1, 8, 8), 0.5, "Stubborn")
    assert caught.value.code == "no_width"


def test_a_student_that_is_not_smaller_is_refused(bench: Workbench, tmp_path: Path) -> None:
    large = Architecture(library="monai", name="BasicUNet", arguments={**ARGUMENTS, "features": [16] * 6})
    with pytest.raises(StageFailed, match=r"The student has [\d,]+ parameters, and the source only") as caught:
        bench.run(Distill(student=large, training=QUICK), bench.source, tmp_path)
    assert caught.value.code == "student_too_large"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"out_channels": 3}, "output_mismatch"),
        ({"in_channels": 3}, "input_mismatch"),
        ({"features": "none"}, "invalid_arguments"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_before_it_is_trained(
    bench: Workbench, tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    student = SMALL.model_copy(update={"arguments": {**SMALL.arguments, **changes}})
    with pytest.raises(StageFailed) as caught:
        bench.run(Distill(student=student, training=QUICK.model_copy(update={"epochs": 1000})), bench.source, tmp_path)
    assert caught.value.code == code


def test_an_unknown_student_is_refused_by_name(bench: Workbench, tmp_path: Path) -> None:
    unknown = Architecture(library="monai", name="BasicUNett")
    with pytest.raises(StageFailed, match="no network named 'BasicUNett'"):
        bench.run(Distill(student=unknown, training=QUICK), bench.source, tmp_path)


def test_the_weights_are_those_of_the_best_epoch(bench: Workbench, tmp_path: Path) -> None:
    result = bench.run(Distill(student=SMALL, training=QUICK), bench.source, tmp_path)
    stored = load_file(result.model.path)
    assert set(stored) == set(BasicUNet(**SMALL.arguments).state_dict())
    assert all(torch.isfinite(value.float()).all() for value in stored.values())


def test_a_distilled_model_is_a_model_as_any_other(bench: Workbench, tmp_path: Path) -> None:
    first = bench.run(Distill(student=SMALL, training=QUICK), bench.source, tmp_path / "first").model
    runner = engines.load("torch eager").open(first, 1)
    assert runner.run(bench.samples("evaluation").inputs(0, 2)).shape == (2, 4, 32, 32)
    assert isinstance(first, Model)


# ---------------------------------------------------------------- widths

FLAT = {"spatial_dims": 2, "in_channels": 1, "out_channels": 4}
LEVELS = {"channels": [16, 32, 64], "strides": [2, 2]}
KERNELS = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
RESNET = {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [32, 64, 128, 256]}
IN_MONAI = [
    ("BasicUNet", FLAT, BasicUNet),
    ("UNet", {**FLAT, **LEVELS, "num_res_units": 1}, UNet),
    ("AttentionUnet", {**FLAT, **LEVELS}, AttentionUnet),
    ("DynUNet", {**FLAT, **KERNELS}, DynUNet),
    ("DynUNet", {**FLAT, **KERNELS, "filters": [16, 32, 64]}, DynUNet),
    ("SegResNet", {**FLAT, "init_filters": 16}, SegResNet),
    ("SwinUNETR", {**FLAT, "feature_size": 24}, SwinUNETR),
]


@pytest.mark.parametrize(("name", "arguments", "network"), IN_MONAI)
def test_monais_networks_have_a_width(name: str, arguments: dict[str, Any], network: Any) -> None:
    wide = Architecture(library="monai", name=name, arguments=arguments)
    narrow = narrower(wide, 0.5)
    assert narrow is not None
    assert parameters(narrow) < 0.35 * parameters(wide)
    built = network(**narrow.arguments).eval()
    with torch.no_grad():
        assert built(torch.zeros(1, 1, 64, 64)).shape == (1, 4, 64, 64)


@pytest.mark.parametrize(
    ("library", "name", "arguments"),
    [
        ("torchvision", "mobilenet_v2", {"num_classes": 3}),
        ("torchvision", "mobilenet_v3_small", {"num_classes": 3}),
        ("monai", "ResNet", {**RESNET, "spatial_dims": 2, "n_input_channels": 3, "num_classes": 3}),
        ("monai", "DenseNet121", {"spatial_dims": 2, "in_channels": 3, "out_channels": 3}),
    ],
)
def test_classifiers_with_a_width_keep_their_ends(library: Any, name: str, arguments: dict[str, Any]) -> None:
    wide = Architecture(library=library, name=name, arguments=arguments)
    narrow = narrower(wide, 0.5)
    assert narrow is not None
    assert parameters(narrow) < 0.62 * parameters(wide)
    with torch.no_grad():
        assert constructor(narrow)().eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_widths_are_multiples_of_eight_and_never_more_than_there_were() -> None:
    wide = Architecture(library="monai", name="BasicUNet", arguments={**FLAT, "features": [4, 8, 20, 24, 100, 8]})
    narrow = narrower(wide, 0.4)
    assert narrow is not None
    assert narrow.arguments["features"] == [4, 8, 8, 8, 40, 8]


def test_a_network_without_a_width_has_none() -> None:
    assert narrower(Architecture(library="torchvision", name="resnet18"), 0.5) is None


def test_torchvisions_resnet_is_narrowed_through_pruning() -> None:
    torch.manual_seed(0)
    network = new_module(Architecture(library="torchvision", name="resnet18", arguments={"num_classes": 3}))
    before = sum(parameter.numel() for parameter in network.parameters())
    first = network.get_parameter("conv1.weight").detach().clone()
    prune_and_forget(network, torch.zeros(1, 3, 64, 64), 0.5, "resnet18")
    assert sum(parameter.numel() for parameter in network.parameters()) < 0.3 * before
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert not torch.isin(network.get_parameter("conv1.weight"), first).any()
