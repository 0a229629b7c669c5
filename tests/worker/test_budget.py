"""How many channels each unit keeps."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import nn

from worker.budget import choose, choose_for_macs, cost_after, layer_costs
from worker.complexity import module_macs
from worker.dependency import Side, Unit, remove, survey


def unit(root: str, scores: list[float], parts: int = 1) -> Unit:
    channels = len(scores) * parts
    return Unit(root, channels, parts, (Side(root, "out", channels),), torch.tensor(scores))


def test_the_least_important_channels_go() -> None:
    assert choose([unit("a", [4, 1, 3, 2])], 0.5, "local", 1) == {"a": [1, 3]}


@pytest.mark.parametrize(
    ("channels", "ratio", "round_to", "left"),
    [
        (16, 0.5, 8, 8), (24, 0.5, 8, 16), (20, 0.5, 8, 8), (16, 0.9, 8, 8), (64, 0.3, 8, 48), (10, 0.5, 1, 5),
        (3, 0.9, 1, 1),
    ],
)  # fmt: skip
def test_what_is_left_is_the_nearest_multiple(channels: int, ratio: float, round_to: int, left: int) -> None:
    chosen = choose([unit("a", [float(index) for index in range(channels)])], ratio, "local", round_to)
    assert channels - len(chosen["a"]) == left


def test_a_unit_smaller_than_one_multiple_is_left_whole() -> None:
    assert choose([unit("a", [1, 2, 3, 4])], 0.5, "local", 8) == {}


def test_every_part_loses_the_same_positions() -> None:
    assert choose([unit("a", [2, 1], parts=3)], 0.5, "local", 1) == {"a": [1, 3, 5]}


def test_globally_the_unit_with_the_lower_scores_loses_more() -> None:
    weak, strong = unit("weak", [0.1, 0.2, 0.3, 0.4]), unit("strong", [1, 2, 3, 4])
    chosen = choose([weak, strong], 0.25, "global", 1)
    assert (len(chosen["weak"]), chosen.get("strong")) == (2, None)


def test_globally_no_unit_is_emptied() -> None:
    chosen = choose([unit("weak", [0.01] * 20), unit("strong", [1.0] * 20)], 0.5, "global", 1)
    assert len(chosen["weak"]) == 18


def test_later_steps_count_from_what_there_was_at_first() -> None:
    once_cut = unit("a", [float(index) for index in range(12)])
    assert len(choose([once_cut], 0.5, "local", 1, {"a": 16})["a"]) == 4


# ---------------------------------------------------------------- MACs


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=4, features=[16, 16, 32, 32, 64, 16]).eval()


def test_the_costs_of_the_layers_are_those_of_the_network(network: nn.Module) -> None:
    costs = layer_costs(network, torch.randn(1, 1, 32, 32))
    assert sum(cost.macs for cost in costs.values()) == module_macs(network, (1, 32, 32))


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(4, 8, 2, stride=2), nn.Conv2d(4, 4, 3, groups=4), nn.Conv3d(4, 8, 3)]
)
def test_every_kind_of_convolution_is_counted(layer: nn.Module) -> None:
    sample = torch.randn(1, 4, *([8] * (3 if isinstance(layer, nn.Conv3d) else 2)))
    holder = nn.Sequential(layer)
    assert layer_costs(holder, sample)["0"].macs == module_macs(holder, tuple(sample.shape[1:]))


def test_a_linear_layer_is_counted_at_every_place() -> None:
    assert layer_costs(nn.Sequential(nn.Linear(4, 8)), torch.randn(1, 5, 4))["0"].macs == 5 * 4 * 8


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("target", [0.75, 0.5, 0.3])
def test_the_macs_come_down_to_the_target(network: nn.Module, scope: str, target: float) -> None:
    sample = torch.randn(1, 1, 32, 32)
    units, costs = survey(network, sample, ()).units, layer_costs(network, sample)
    whole = sum(cost.macs for cost in costs.values())
    chosen = choose_for_macs(units, costs, target * whole, scope, 2)  # type: ignore[arg-type]
    assert chosen is not None
    torch.manual_seed(0)
    cut = BasicUNet(spatial_dims=2, in_channels=1, out_channels=4, features=[16, 16, 32, 32, 64, 16]).eval()
    remove(cut, sample, chosen)
    left = module_macs(cut, (1, 32, 32))
    assert left == pytest.approx(cost_after(costs, units, chosen))
    assert (target - 0.08) * whole < left <= target * whole


def test_a_target_that_no_ratio_reaches_is_told(network: nn.Module) -> None:
    sample = torch.randn(1, 1, 32, 32)
    assert choose_for_macs(survey(network, sample, ()).units, layer_costs(network, sample), 1000, "local", 8) is None
