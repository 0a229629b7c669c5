"""A preset's numbers, as the publisher of the weights has written them down in the library; nothing is downloaded."""

from __future__ import annotations

import difflib
import math
from typing import Any

import timm
import torchvision.models

from shared.errors import StageFailed
from shared.recipe import Preprocessing

BYTE = 1 / 255


def resolved(preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing with numbers in the place of its preset. Raises StageFailed (unknown_preset)."""
    if preprocessing.preset is None:
        return preprocessing
    library, _, name = preprocessing.preset.partition(":")
    found = _of_torchvision(name) if library == "torchvision" else _of_timm(name)
    if preprocessing.size is not None:
        found["size"] = preprocessing.size
    return Preprocessing(layout=preprocessing.layout, channels=3, scale=BYTE, **found)


def _of_torchvision(name: str) -> dict[str, Any]:
    """`name` is a weights enum's member: torchvision.models.get_weight gives its transforms."""
    try:
        transforms = torchvision.models.get_weight(name).transforms()
    except (ValueError, AttributeError, KeyError):
        raise _unknown(f"torchvision has no weights named {name!r}", _weights_like(name)) from None
    if not hasattr(transforms, "mean"):
        raise _unknown(f"torchvision says no mean and deviation for {name!r}", [])
    found: dict[str, Any] = {"mean": list(transforms.mean), "std": list(transforms.std)}
    interpolation = transforms.interpolation.value
    if hasattr(transforms, "crop_size"):
        side = transforms.crop_size[0]
        found |= {"size": (side, side), "crop_ratio": side / transforms.resize_size[0]}
    return found | {"interpolation": interpolation if interpolation == "bicubic" else "bilinear"}


def _weights_like(name: str) -> list[str]:
    known = [
        str(member)
        for builder in torchvision.models.list_models()
        for member in torchvision.models.get_model_weights(builder)
    ]
    return difflib.get_close_matches(name, known, n=3)


def _of_timm(name: str) -> dict[str, Any]:
    """`name` is an architecture, with or without the tag of its weights; its pretrained_cfg says the rest."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None:
        close = difflib.get_close_matches(name, timm.list_models())
        raise _unknown(f"timm has no network or weights named {name!r}", close)
    height, width = config.input_size[-2:]
    return {
        "size": (height, width),
        "crop_ratio": height / math.floor(height / config.crop_pct),
        "interpolation": "bicubic" if config.interpolation == "bicubic" else "bilinear",
        "mean": list(config.mean),
        "std": list(config.std),
    }


def _unknown(detail: str, close: list[str]) -> StageFailed:
    hint = f"Close names: {', '.join(close)}." if close else "Give mean, std, scale and size instead."
    return StageFailed(f"{detail}.", hint=hint, code="unknown_preset")
