"""A narrower network of the same kind: through its constructor where that has a width, else through pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from shared.errors import StageFailed
from shared.recipe import Architecture
from worker.architectures import parameters_of
from worker.budget import choose
from worker.context import Blueprint, Graph
from worker.dependency import GRAPH_ERRORS, remove, survey

ROUND_TO = 8
SWIN_ROUND_TO = 12  # what MONAI's SwinUNETR asks of its feature_size
# Arguments that say how many channels a network has inside, none that its inputs or outputs have.
CHANNELS = ("features", "channels", "filters", "init_filters", "block_inplanes", "init_features", "growth_rate")
FACTORS = ("widen_factor", "width_mult")
TAKES_WIDTH_MULT = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")  # through **kwargs


def narrower(architecture: Blueprint, width: float) -> Architecture | None:
    """The architecture with its channels times `width`, in multiples of 8, or of what its constructor insists on.

    None if its constructor has no width.
    """
    if isinstance(architecture, Graph):
        return None
    arguments, known = architecture.arguments, parameters_of(architecture)
    defaults = {name: entry.default for name, entry in known.items()}
    changed: dict[str, Any] = {}
    for name in CHANNELS:
        value = arguments.get(name, defaults.get(name))
        if architecture.name.lower() == "dynunet" and name == "filters" and value is None:
            value = _dynunet_filters(arguments)
        if name in known and value is not None and (narrowed := _narrowed(value, width, ROUND_TO)) is not None:
            changed[name] = narrowed
    if architecture.name == "SwinUNETR":
        size = arguments.get("feature_size", defaults["feature_size"])
        changed["feature_size"] = _narrowed(size, width, SWIN_ROUND_TO)
    factor = _factor(architecture, known)
    if factor and not changed:
        given = arguments.get(factor, 1.0)
        changed[factor] = width * given if isinstance(given, int | float) else width
    if not changed:
        return None
    return architecture.model_copy(update={"arguments": {**arguments, **changed}})


def prune_and_forget(module: nn.Module, sample: torch.Tensor, width: float, name: str) -> None:
    """Take `1 - width` of the channels out of the network, in place, and give it new random weights.

    `sample` is one input (1, C, ...). Raises StageFailed: no_width.
    """
    try:
        units = survey(module, sample, ()).units
        remove(module, sample, choose(units, 1 - width, "local", ROUND_TO))
    except GRAPH_ERRORS as error:
        raise StageFailed(
            f"{name} cannot be made narrower: {(str(error) or type(error).__name__).splitlines()[0]}",
            hint="Give the student as an architecture of its own.",
            code="no_width",
        ) from error
    forget(module)


def forget(module: nn.Module) -> None:
    """New random weights, layer by layer, as each layer draws its own.

    A parameter outside of such layers (a position embedding, a layer's scale) keeps its value.
    """
    for layer in module.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            reset: Callable[[], None] | None = getattr(layer, name, None)
            if reset is not None:
                reset()
                break


def _narrowed(value: Any, width: float, round_to: int) -> Any:
    """A number of channels, or a list of them, times the width; None for what is neither."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return min(value, max(round_to, round_to * round(value * width / round_to)))
    if isinstance(value, list | tuple):
        narrowed = [_narrowed(entry, width, round_to) for entry in value]
        return None if None in narrowed else narrowed
    return None


def _factor(architecture: Architecture, known: Mapping[str, Any]) -> str | None:
    if architecture.library == "torchvision":
        return "width_mult" if architecture.name in TAKES_WIDTH_MULT else None
    return next((name for name in FACTORS if name in known), None)


def _dynunet_filters(arguments: Mapping[str, Any]) -> list[int]:
    """What DynUNet takes where no filters are given."""
    largest = 320 if arguments.get("spatial_dims") == 3 else 512
    return [min(32 * 2**level, largest) for level in range(len(arguments.get("strides", ())))]
