"""A preset is the publisher's own numbers: what it makes of an image is what the library's transforms make of it."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torchvision.models
from PIL import Image
from pydantic import ValidationError

from shared.errors import StageFailed
from shared.recipe import Preprocessing
from worker.data import normalize, pixels
from worker.presets import resolved

TORCHVISION = [
    "ResNet18_Weights.IMAGENET1K_V1", "EfficientNet_B0_Weights.DEFAULT", "MobileNet_V3_Small_Weights.IMAGENET1K_V1",
    "ViT_B_16_Weights.IMAGENET1K_V1",
]  # fmt: skip
TIMM = ["resnet18.a1_in1k", "resnet18", "mobilenetv3_small_100", "convnext_tiny"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def picture() -> Image.Image:
    """Smooth, so that a pixel's rounding is all that two implementations may differ by."""
    rows, columns = np.mgrid[0:300, 0:420]
    channels = [rows * 255 // 300, columns * 255 // 420, (rows + columns) % 256]
    return Image.fromarray(np.stack(channels, -1).astype("uint8"))


def ours(preset: str) -> np.ndarray:
    found = resolved(Preprocessing(preset=preset))
    return normalize(pixels(picture(), found), found)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_presets_are_its_transforms(name: str) -> None:
    theirs = torchvision.models.get_weight(name).transforms()(picture()).numpy()
    np.testing.assert_allclose(ours(f"torchvision:{name}"), theirs, atol=1e-5)


@pytest.mark.parametrize("name", TIMM)
def test_timm_presets_are_its_config(name: str) -> None:
    config = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    theirs = timm.data.create_transform(**config)(picture()).numpy()
    np.testing.assert_allclose(ours(f"timm:{name}"), theirs, atol=1e-5)


def test_a_segmentation_preset_leaves_the_size_to_the_recipe() -> None:
    preset = "torchvision:LRASPP_MobileNet_V3_Large_Weights.DEFAULT"
    assert resolved(Preprocessing(preset=preset)).size is None
    found = resolved(Preprocessing(preset=preset, size=(64, 96), layout="NHWC"))
    assert (found.size, found.layout, found.channels, found.preset) == ((64, 96), "NHWC", 3, None)
    assert found.mean == [0.485, 0.456, 0.406]


def test_without_a_preset_nothing_changes() -> None:
    given = Preprocessing(mean=[3.0], size=(8, 8))
    assert resolved(given) is given


@pytest.mark.parametrize(
    ("preset", "close"),
    [
        ("torchvision:ResNet18_Weights.IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V1"),
        ("timm:resnet17", "resnet18"),
        ("torchvision:no.such", "Give mean"),
        ("torchvision:os.path", "Give mean"),
    ],
)
def test_an_unknown_preset_is_refused_with_close_names(preset: str, close: str) -> None:
    with pytest.raises(StageFailed) as refused:
        resolved(Preprocessing(preset=preset))
    assert refused.value.code == "unknown_preset"
    assert close in (refused.value.hint or "")


@pytest.mark.parametrize("preset", ["timm:hf-hub:timm/a", "resnet18", "torchvision:ResNet18_Weights", "timm:a/b"])
def test_a_preset_of_another_form_is_no_word(preset: str) -> None:
    with pytest.raises(ValidationError):
        Preprocessing(preset=preset)


def test_a_preset_and_numbers_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="says mean, scale itself"):
        Preprocessing(preset="timm:resnet18", mean=[0.5], scale=0.1)
    with pytest.raises(ValidationError, match="crop_ratio is a crop to `size`"):
        Preprocessing(crop_ratio=0.5)
