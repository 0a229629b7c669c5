"""Only names that a library lists are built, from JSON alone, and nothing is fetched for them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from shared.errors import StageFailed
from shared.recipe import Architecture, ModelFormat
from worker.architectures import LargeTensorsOnMeta, construct, constructor, new_module, parameters_of, registry
from worker.context import Model
from worker.loading import TensorOutput, load_module

TIMM = [
    ("resnet18", {"num_classes": 3}),
    ("mobilenetv3_small_050", {"num_classes": 3, "drop_path_rate": 0.1}),
    ("convnext_atto", {"num_classes": 3, "in_chans": 1}),
    ("vit_tiny_patch16_224", {"num_classes": 3, "img_size": 64}),
    ("efficientnet_b0", {"num_classes": 3}),
    ("swin_tiny_patch4_window7_224", {"num_classes": 3, "img_size": 64, "window_size": 4}),
]


def test_all_registries_list_only_what_builds_a_module() -> None:
    assert {"BasicUNet", "UNet", "SegResNet", "DynUNet"} <= set(registry("monai"))
    assert {"resnet18", "deeplabv3_resnet50"} <= set(registry("torchvision"))
    assert {"resnet18", "vit_tiny_patch16_224", "convnext_atto"} <= set(registry("timm"))
    assert not {"fasterrcnn_resnet50_fpn", "raft_small", "r3d_18"} & set(registry("torchvision"))


@pytest.mark.parametrize(
    ("library", "name", "arguments"),
    [
        ("torchvision", "resnet18", {"weights": "IMAGENET1K_V1"}),
        ("torchvision", "deeplabv3_resnet50", {"weights_backbone": "DEFAULT"}),
        ("monai", "EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": True}),
        ("timm", "resnet18", {"pretrained": True}),
        ("timm", "resnet18", {"pretrained_cfg": {"url": "https://example.com/weights.pth"}}),
        ("timm", "resnet18", {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}),
        ("timm", "resnet18", {"checkpoint_path": "/etc/passwd"}),
    ],
)
def test_an_argument_that_would_fetch_weights_is_refused(
    library: Any, name: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(StageFailed, match="would load weights by itself") as refused:
        constructor(Architecture(library=library, name=name, arguments=arguments))
    assert refused.value.code == "invalid_arguments"


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:/etc", "resnet18.a1_in1k", "no_such_net"])
def test_a_timm_name_is_one_of_its_list(name: str) -> None:
    with pytest.raises(StageFailed) as refused:
        constructor(Architecture(library="timm", name=name))
    assert refused.value.code == "unknown_architecture"


@pytest.mark.parametrize(("name", "arguments"), TIMM, ids=[name for name, _ in TIMM])
def test_timm_networks_are_built_and_filled_without_the_network(
    name: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    trained = timm.create_model(name, pretrained=False, **arguments).eval()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    architecture = Architecture(library="timm", name=name, arguments=arguments)
    module = TensorOutput(load_module(Model(ModelFormat.TORCH, tmp_path / "w.safetensors", architecture)))
    image = torch.rand(1, arguments.get("in_chans", 3), 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(module(image), trained(image))


def test_a_wrong_argument_of_timm_is_a_sentence() -> None:
    with pytest.raises(StageFailed, match="resnet18 cannot be built") as refused:
        new_module(Architecture(library="timm", name="resnet18", arguments={"nonsense": 1}))
    assert refused.value.code == "invalid_arguments"


def test_an_outline_holds_no_large_tensor() -> None:
    architecture = Architecture(library="timm", name="resnet18", arguments={"num_classes": 3})
    outline = construct(constructor(architecture), architecture, LargeTensorsOnMeta())
    devices = {name: tensor.device.type for name, tensor in outline.state_dict().items()}
    assert devices["layer4.1.conv2.weight"] == "meta"
    assert sum(t.nbytes for t in outline.state_dict().values() if t.device.type == "cpu") < 4 * 2**20


def test_the_constructors_arguments_are_known_by_name() -> None:
    assert "features" in parameters_of(Architecture(library="monai", name="BasicUNet"))
