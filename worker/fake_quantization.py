"""A network that computes as its int8 will, and learns through it: values are rounded where the writers will round.

Rounded are each product's weights (s8, symmetric, one scale an output channel), its input, and its output (u8, one
scale a tensor), as worker/quantization/qdq.py has them written. Gradients pass the rounding as if it were not there
(straight-through, arXiv 1308.3432). Everything that is put in is taken out again: what is left is the same network with
weights that rounding no longer changes.

The writers fold a BatchNorm into the convolution before it. So its statistics stand still, and nothing is rounded
between the two; the weights need no folding, for a factor on a whole channel moves its scale and no rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from shared.errors import StageFailed
from worker.loading import TensorOutput

SHRINKING = 0.05  # of a range, a batch, towards the batch's own
SMALLEST_SCALE = 1e-12
CLIPS = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_"}  # whose input the writers do not round


class FakeQuantization:
    """Rounding, put into a network in place until `remove`; ranges come from `watch` and then follow the training.

    `sample` is one input (n, C, ...). `symmetric` is how TensorRT's activations are rounded. Layers that do not run in
    evaluation, or whose weights another layer computes with, stay as they are. Raises StageFailed (input_mismatch,
    nothing_to_round).
    """

    def __init__(self, network: nn.Module, sample: torch.Tensor, *, symmetric: bool = False) -> None:
        self.network = network.eval()
        self.ranges: list[Range] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._places: list[tuple[nn.Module, str]] = []
        self._rounded: list[nn.Module] = []
        products, rounded_outputs = survey(network, sample)
        if not products:
            raise StageFailed(
                "The network has no convolution or linear layer that training could make ready for int8.",
                code="nothing_to_round",
            )
        for name in products:
            layer = network.get_submodule(name)
            axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
            parametrize.register_parametrization(layer, "weight", RoundedWeight(axis))
            self._rounded.append(layer)
            self._add(layer, "range_in", symmetric)
            self._hooks.append(layer.register_forward_pre_hook(_round_input))
        for name in rounded_outputs:
            layer = network.get_submodule(name)
            self._add(layer, "range_out", symmetric)
            self._hooks.append(layer.register_forward_hook(_round_output))
        norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
        self._hooks += [layer.register_forward_pre_hook(_stand_still) for layer in norms]

    def _add(self, layer: nn.Module, place: str, symmetric: bool) -> None:
        found = Range(symmetric)
        layer.add_module(place, found)
        self.ranges.append(found)
        self._places.append((layer, place))

    @torch.no_grad()
    def watch(self, batches: Iterable[torch.Tensor]) -> None:
        """Begin the ranges anew: the smallest and the largest value of each tensor over the batches."""
        for found in self.ranges:
            found.watching = True
        for batch in batches:
            self.network.eval()(batch)
        for found in self.ranges:
            found.watching = False

    def remove(self) -> None:
        """Leave the plain network, its weights as they were rounded: the writers round them to the same values again,
        and what is left in float is as good as what was trained."""
        for hook in self._hooks:
            hook.remove()
        for layer, place in self._places:
            delattr(layer, place)
        for layer in self._rounded:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


class Range(nn.Module):
    """The range of one tensor, and its rounding to 256 steps over it.

    In training it grows at once and shrinks slowly: the writers' calibration will find the largest values too, so none
    is cut off here that will not be cut off there.
    """

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, symmetric: bool) -> None:
        super().__init__()
        self.symmetric, self.watching = symmetric, False
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.watching or self.training:
            self._follow(values.detach())
        if self.watching:
            return values
        # zero is one of the steps
        step = ((self.high - self.low) / 255).clamp_min(SMALLEST_SCALE)
        zero_point = (-self.low / step).round().clamp(0, 255).int()
        found: torch.Tensor = torch.fake_quantize_per_tensor_affine(values, step, zero_point, 0, 255)
        return found

    def _follow(self, values: torch.Tensor) -> None:
        low, high = values.min().clamp(max=0), values.max().clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        shrinking = 0.0 if self.watching else SHRINKING
        self.low.copy_(torch.minimum(torch.lerp(self.low, low, shrinking), low))
        self.high.copy_(torch.maximum(torch.lerp(self.high, high, shrinking), high))


class RoundedWeight(nn.Module):
    """A weight rounded to s8, symmetric, with one scale for each slice along `axis`."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        others = [dimension for dimension in range(weight.ndim) if dimension != self.axis]
        scale = (weight.detach().abs().amax(others) / 127).clamp_min(SMALLEST_SCALE)  # (channels,)
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        found: torch.Tensor = torch.fake_quantize_per_channel_affine(weight, scale, zeros, self.axis, -127, 127)
        return found


# Hooks hold nothing: a copy of the network (the averaged one) has its own ranges in its own layers.


def _round_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    assert isinstance(layer.range_in, Range)
    return (layer.range_in(inputs[0]), *inputs[1:])


def _round_output(layer: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    assert isinstance(layer.range_out, Range)
    found: torch.Tensor = layer.range_out(output)
    return found


def _stand_still(layer: nn.Module, _inputs: Any) -> None:
    layer.training = not layer.track_running_stats


# ---------------------------------------------------------------- where the writers round


def survey(network: nn.Module, sample: torch.Tensor) -> tuple[list[str], list[str]]:
    """Names of the products that run, and of the layers whose output is rounded: the products, or BatchNorms after one.

    Not rounded is an output that a ReLU or a clip takes, for the writers give it the range of what comes out of that,
    nor the network's own. Raises StageFailed (input_mismatch).
    """
    made: dict[str, torch.Tensor] = {}
    taken: dict[int, str] = {}  # the tensors that BatchNorms take, by identity
    hooks = []
    for name, layer in network.named_modules():
        if isinstance(layer, _ConvNd | nn.Linear | _BatchNorm):
            hooks.append(layer.register_forward_hook(_noting(name, made, taken)))
    try:
        with torch.no_grad(), _Takers() as takers:
            output = TensorOutput(network)(sample)
    except (RuntimeError, ValueError, IndexError) as error:
        raise StageFailed(
            f"The network cannot be run on inputs of shape {list(sample.shape)}: {str(error).splitlines()[0]}",
            code="input_mismatch",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    products = [name for name in made if not isinstance(network.get_submodule(name), _BatchNorm)]
    last = {name: taken.get(id(made[name]), name) for name in products}
    return products, [
        name
        for name in last.values()
        if made[name] is not output and takers.first.get(id(made[name])) not in CLIPS
    ]


def _noting(name: str, made: dict[str, torch.Tensor], taken: dict[int, str]) -> Any:
    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        made[name] = output
        if isinstance(layer, _BatchNorm):
            taken[id(inputs[0])] = name

    return note


class _Takers(TorchFunctionMode):
    """Notes the first function that makes a tensor of each tensor, by identity; what is noted stays alive."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            for value in args:
                if isinstance(value, torch.Tensor) and id(value) not in self.first:
                    self.first[id(value)] = getattr(function, "__name__", "")
                    self._alive.append(value)
        return found
