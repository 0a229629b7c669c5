"""Channels that belong together are found and taken out of real networks, whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from shared.recipe import Architecture, ExportOnnx
from worker import stages
from worker.architectures import constructor
from worker.budget import choose
from worker.complexity import module_parameters
from worker.dependency import GRAPH_ERRORS, Importance, outputs, remove, survey, traceable
from worker.loading import load_module
from worker.rehearsal import save

MONAI: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 4}
FEATURES = [16, 16, 16, 32, 32, 16]
DYNAMIC = {
    "kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3, "filters": [16, 32, 64, 64],
}  # fmt: skip
UNET = {"channels": [16, 32, 64], "strides": [2, 2]}
GROUPS = ["group", {"num_groups": 4}]


def monai(name: str, **arguments: Any) -> Architecture:
    return Architecture(library="monai", name=name, arguments={**MONAI, **arguments})


def torchvision(name: str, classes: int = 5, **arguments: Any) -> Architecture:
    return Architecture(library="torchvision", name=name, arguments={"num_classes": classes, **arguments})


# what each is here for, the network, one input's shape, and the layers that give its outputs
NETWORKS: dict[str, tuple[Architecture, tuple[int, ...], Sequence[str]]] = {
    "residual": (torchvision("resnet18"), (3, 32, 32), ["fc"]),
    "depthwise with squeeze and excitation": (torchvision("mobilenet_v3_small"), (3, 32, 32), ["classifier.3"]),
    "two heads that are added": (
        torchvision("lraspp_mobilenet_v3_large"),
        (3, 32, 32),
        ["classifier.high_classifier", "classifier.low_classifier"],
    ),
    "depthwise, inverted": (torchvision("efficientnet_b0"), (3, 32, 32), ["classifier.1"]),
    "LayerNorm and layer scale": (torchvision("convnext_tiny"), (3, 32, 32), ["classifier.2"]),
    "group convolution": (torchvision("regnet_y_400mf"), (3, 32, 32), ["fc"]),
    "InstanceNorm": (monai("BasicUNet", features=FEATURES), (1, 32, 32), ["final_conv"]),
    "InstanceNorm, 3D": (monai("BasicUNet", spatial_dims=3, features=FEATURES), (1, 32, 32, 32), ["final_conv"]),
    "GroupNorm and concatenation": (
        monai("BasicUNet", features=FEATURES, norm=GROUPS), (1, 32, 32), ["final_conv"],
    ),
    "BatchNorm, bilinear": (
        monai("BasicUNet", features=FEATURES, norm="batch", upsample="nontrainable"), (1, 32, 32), ["final_conv"],
    ),
    "ConvTranspose and PReLU": (monai("UNet", **UNET), (1, 32, 32), ["model.2.conv"]),
    "PReLU, residual, GroupNorm": (
        monai("UNet", **UNET, num_res_units=2, norm=GROUPS),
        (1, 32, 32),
        ["model.2.0.conv", "model.2.1.conv.unit0.conv"],
    ),
    "DynUNet": (monai("DynUNet", **DYNAMIC), (1, 32, 32), ["output_block.conv.conv"]),
    "heads that run in training alone": (
        monai("DynUNet", **DYNAMIC, deep_supervision=True, res_block=True),
        (1, 32, 32),
        ["deep_supervision_heads.0.conv.conv", "output_block.conv.conv"],
    ),
    "GroupNorm, residual": (monai("SegResNet", init_filters=16), (1, 32, 32), ["conv_final.2.conv"]),
    "attention gates": (monai("AttentionUnet", **UNET), (1, 32, 32), ["model.2.conv"]),
}  # fmt: skip


# one of each way in which sizes come into a graph; exporting takes the longest of all
EXPORTED = {
    "depthwise with squeeze and excitation", "InstanceNorm, 3D", "ConvTranspose and PReLU", "GroupNorm, residual",
    "attention gates",
}  # fmt: skip


def built(architecture: Architecture) -> nn.Module:
    torch.manual_seed(0)
    return constructor(architecture)().eval()


def halved(module: nn.Module, sample: torch.Tensor, importance: Importance = "l2") -> nn.Module:
    units = survey(module, sample, (), importance).units
    remove(module, sample, choose(units, 0.5, "local", 8))
    return module.eval()


@pytest.mark.parametrize("kind", NETWORKS)
def test_half_of_the_channels_of_a_real_network_go(kind: str, tmp_path: Path) -> None:
    architecture, shape, heads = NETWORKS[kind]
    module, sample = built(architecture), torch.randn(2, *shape)
    before, expected = module_parameters(module), [tensor.shape for tensor in outputs(module(sample))]
    assert survey(module, sample[:1], ()).heads == tuple(heads)
    halved(module, sample[:1])

    # the outputs keep their shapes, and most of the weights are gone
    with torch.no_grad():
        found = outputs(module(sample))
    assert [tensor.shape for tensor in found] == expected
    assert module_parameters(module) < 0.55 * before

    # rebuilt from architecture and weights it is the same network, to the bit
    model = save(module, architecture, tmp_path / "w.safetensors")
    rebuilt = load_module(model)
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(outputs(rebuilt(sample)), found, strict=True))

    # and every one of its weights can be trained
    trained = copy.deepcopy(rebuilt).train()
    torch.stack([tensor.float().square().mean() for tensor in outputs(trained(sample))]).sum().backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained.parameters())

    # it exports
    if kind not in EXPORTED:
        return
    stages.load("export_onnx")._export(rebuilt, sample.numpy(), ExportOnnx(), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    exported = session.run(None, {session.get_inputs()[0].name: sample.numpy()})[0]
    np.testing.assert_allclose(exported, found[0].numpy(), atol=2e-4 * float(found[0].abs().max()))


def test_a_pruned_network_can_be_pruned_again(tmp_path: Path) -> None:
    architecture, shape, _ = NETWORKS["PReLU, residual, GroupNorm"]
    sample = torch.randn(1, *shape)
    module = built(architecture)
    once = load_module(save(halved(module, sample), architecture, tmp_path / "once.safetensors"))
    smaller = module_parameters(once)
    remove(once, sample, choose(survey(once, sample, ()).units, 0.5, "local", 4))
    twice = load_module(save(once, architecture, tmp_path / "twice.safetensors"))
    assert module_parameters(twice) < 0.55 * smaller
    assert torch.equal(twice(sample), once(sample))


# ---------------------------------------------------------------- units


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def test_a_unit_names_every_layer_that_its_channels_run_through() -> None:
    (unit,) = survey(chain(), torch.randn(1, 1, 8, 8), ()).units
    assert (unit.root, unit.channels, unit.parts) == ("0", 8, 1)
    assert {(side.layer, side.direction, side.channels) for side in unit.sides} >= {("0", "out", 8), ("3", "in", 8)}


def test_ignored_layers_keep_their_outputs() -> None:
    module, sample = built(torchvision("resnet18")), torch.randn(1, 3, 32, 32)
    roots = {unit.root for unit in survey(module, sample, ()).units}
    kept = {unit.root for unit in survey(module, sample, ["layer1.0.conv1", "layer2"]).units}
    assert "layer1.0.conv1" in roots - kept
    assert not any(root.startswith("layer2") for root in kept)


def weak_channel(importance: Importance, change: Any) -> int:
    """The channel of the chain that counts least once its weights were changed."""
    module, sample = chain(), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        change(module)
    module(sample).square().mean().backward()
    (unit,) = survey(module, sample[:1], (), importance).units
    return int(unit.scores.argmin())


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_small_weights_count_little(importance: Importance) -> None:
    def change(module: nn.Sequential) -> None:
        module[0].weight[5] *= 0.01
        module[1].weight[5] *= 0.01
        module[3].weight[:, 5] *= 0.01

    assert weak_channel(importance, change) == 5


def test_a_small_normalization_scale_counts_little() -> None:
    def change(module: nn.Sequential) -> None:
        module[1].weight[2] = 0.001

    assert weak_channel("batchnorm_scale", change) == 2


def test_a_channel_that_does_not_move_the_loss_counts_little() -> None:
    def change(module: nn.Sequential) -> None:
        module[3].weight[:, 6] = 0  # nothing reads it, however large its own weights
        module[0].weight[6] *= 10

    assert weak_channel("taylor", change) == 6


def test_the_scale_of_an_instance_norm_is_a_scale_too() -> None:
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        module[1].weight[3] = 0.001
    (unit,) = survey(module, torch.randn(1, 1, 8, 8), (), "batchnorm_scale").units
    assert int(unit.scores.argmin()) == 3


def test_without_a_normalization_no_unit_has_a_scale() -> None:
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    assert survey(module, torch.randn(1, 1, 8, 8), (), "batchnorm_scale").units == ()


# ---------------------------------------------------------------- stand-ins


def test_the_stand_ins_are_gone_after_use_even_after_an_error() -> None:
    module = built(monai("UNet", **UNET))
    before = dict(module.named_modules())
    with traceable(module):
        assert dict(module.named_modules()) != before
    assert dict(module.named_modules()) == before
    with pytest.raises(ZeroDivisionError), traceable(module):
        1 / 0  # noqa: B018
    assert dict(module.named_modules()) == before


def test_tracing_changes_no_output() -> None:
    module, sample = built(monai("BasicUNet", features=FEATURES)), torch.randn(1, 1, 32, 32)
    expected = module(sample)
    survey(module, sample, ())
    assert torch.equal(module(sample), expected)


def test_a_pruned_instance_norm_keeps_the_scales_of_the_channels_that_stay() -> None:
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.PReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        module[1].weight.copy_(torch.arange(8.0))
    remove(module, torch.randn(1, 1, 8, 8), {"0": [0, 2, 4]})
    assert module[1].weight.tolist() == [1, 3, 5, 6, 7]
    assert isinstance(module[1], nn.InstanceNorm2d)
    assert isinstance(module[2], nn.PReLU)


# ---------------------------------------------------------------- what cannot be followed


@pytest.mark.parametrize("name", ["swin_t", "shufflenet_v2_x0_5"])
def test_what_the_graph_cannot_follow_is_an_error_at_once(name: str) -> None:
    with pytest.raises(GRAPH_ERRORS):
        survey(built(torchvision(name)), torch.randn(1, 3, 64, 64), ())


def test_channels_that_a_reshape_leads_astray_are_told_by_their_root() -> None:
    vit = monai("ViT", img_size=32, patch_size=16, hidden_size=32, mlp_dim=64, num_layers=1, num_heads=2)
    arguments = {name: value for name, value in vit.arguments.items() if name != "out_channels"}
    module = built(vit.model_copy(update={"arguments": arguments}))
    sample = torch.randn(1, 1, 32, 32)
    lost = survey(module, sample, ()).lost
    assert lost
    assert survey(module, sample, lost).lost == ()
