"""How many channels each unit of a network keeps, so that a share of its channels or of its MACs is removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from worker.dependency import Unit
from worker.loading import TensorOutput
from worker.shrink import is_depthwise

Scope = Literal["local", "global"]
Chosen = dict[str, list[int]]  # channels to remove, by the root of their unit

LEAST_KEPT_RATIO = 0.1  # of a unit, however little global ranking thinks of it
SEARCH_STEPS = 12
MOST_PRUNED_RATIO = 0.98


def choose(
    units: Sequence[Unit], ratio: float, scope: Scope, round_to: int, original: Mapping[str, int] | None = None
) -> Chosen:
    """The least important channels of every unit, so that about `ratio` of the channels are removed.

    A unit keeps a multiple of `round_to` channels and of its parts, and at least one such multiple; a unit smaller
    than that is left whole. `original` says how many channels a unit had before earlier steps; `ratio` counts from it.
    """
    before = original or {unit.root: unit.channels for unit in units}
    wanted = _kept_locally(units, ratio, before) if scope == "local" else _kept_globally(units, ratio, before)
    chosen = {}
    for unit in units:
        kept = _rounded(wanted[unit.root], unit, round_to)
        if kept < unit.channels:
            chosen[unit.root] = _least(unit, unit.channels - kept)
    return chosen


def _kept_locally(units: Sequence[Unit], ratio: float, before: Mapping[str, int]) -> dict[str, float]:
    return {unit.root: before[unit.root] * (1 - ratio) for unit in units}


def _kept_globally(units: Sequence[Unit], ratio: float, before: Mapping[str, int]) -> dict[str, float]:
    """Channels above the one threshold that leaves the wanted share of all."""
    scores = torch.cat([unit.scores for unit in units])
    weights = torch.cat([torch.full_like(unit.scores, unit.parts) for unit in units])  # channels a position stands for
    order = scores.argsort(descending=True)
    budget = (1 - ratio) * sum(before[unit.root] for unit in units)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[order] = weights[order].cumsum(0) <= budget
    by_unit = torch.split(kept, [len(unit.scores) for unit in units])
    return {
        unit.root: max(float(mask.sum()) * unit.parts, LEAST_KEPT_RATIO * before[unit.root])
        for unit, mask in zip(units, by_unit, strict=True)
    }


def _rounded(wanted: float, unit: Unit, round_to: int) -> int:
    """The nearest allowed number of channels, the larger of two that are as near."""
    step = math.lcm(round_to, unit.parts)
    return min(max(math.floor(wanted / step + 0.5), 1) * step, unit.channels)


def _least(unit: Unit, count: int) -> list[int]:
    """The `count` channels with the lowest scores, the same positions in every part."""
    positions = unit.scores.argsort(stable=True)[: count // unit.parts].tolist()
    size = unit.channels // unit.parts
    return sorted(part * size + position for part in range(unit.parts) for position in positions)


# ---------------------------------------------------------------- MACs


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one layer, and the channels that they grow with."""

    macs: int
    inputs: int
    outputs: int
    depthwise: bool


def layer_costs(module: nn.Module, sample: torch.Tensor) -> dict[str, Cost]:
    """What every convolution and linear layer costs on one sample (1, C, ...), by name."""
    found: dict[str, Cost] = {}
    hooks = []

    def watch(name: str) -> None:
        def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            cost = _cost(layer, inputs[0], output)
            used = found[name].macs if name in found else 0
            found[name] = Cost(used + cost.macs, cost.inputs, cost.outputs, cost.depthwise)

        hooks.append(module.get_submodule(name).register_forward_hook(note))

    for name, layer in module.named_modules():
        if isinstance(layer, _ConvNd | nn.Linear):
            watch(name)
    try:
        with torch.no_grad():
            TensorOutput(module)(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _cost(layer: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> Cost:
    if isinstance(layer, _ConvNd):
        spread = inputs if layer.transposed else output
        macs = spread.numel() // len(spread) * layer.weight[0].numel()
        return Cost(macs, layer.in_channels, layer.out_channels, is_depthwise(layer))
    assert isinstance(layer, nn.Linear)
    macs = output.numel() // len(output) * layer.in_features
    return Cost(macs, layer.in_features, layer.out_features, False)


def cost_after(costs: Mapping[str, Cost], units: Sequence[Unit], chosen: Mapping[str, Sequence[int]]) -> float:
    """MACs that are left of `costs` when the chosen channels are gone."""
    gone_in = dict.fromkeys(costs, 0.0)
    gone_out = dict.fromkeys(costs, 0.0)
    for unit in units:
        share = len(chosen.get(unit.root, ())) / unit.channels
        for side in unit.sides:
            if side.layer in costs:
                (gone_in if side.direction == "in" else gone_out)[side.layer] += share * side.channels
    total = 0.0
    for name, cost in costs.items():
        left_out = 1 - gone_out[name] / cost.outputs
        left_in = 1.0 if cost.depthwise else 1 - gone_in[name] / cost.inputs
        total += cost.macs * left_out * left_in
    return total


def choose_for_macs(
    units: Sequence[Unit],
    costs: Mapping[str, Cost],
    target: float,
    scope: Scope,
    round_to: int,
    original: Mapping[str, int] | None = None,
) -> Chosen | None:
    """About the fewest channels whose removal brings the MACs down to `target`; None if no ratio does.

    A search on the ratio; then, as units of one size change all together, those that can be spared the last step are.
    """
    low, high = 0.0, MOST_PRUNED_RATIO
    milder, best = Chosen(), choose(units, high, scope, round_to, original)
    if cost_after(costs, units, best) > target:
        return None
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        chosen = choose(units, middle, scope, round_to, original)
        if cost_after(costs, units, chosen) > target:
            low, milder = middle, chosen
        else:
            high, best = middle, chosen
    return _spared(units, costs, target, best, milder)


def _spared(
    units: Sequence[Unit], costs: Mapping[str, Cost], target: float, best: Chosen, milder: Chosen
) -> Chosen:
    """`best`, with `milder`'s choice for as many units as the target allows, the cheapest first."""

    def with_milder(chosen: Chosen, root: str) -> Chosen:
        others = {name: channels for name, channels in chosen.items() if name != root}
        return others | ({root: milder[root]} if root in milder else {})

    differing = [root for root in best if best[root] != milder.get(root)]
    for root in sorted(differing, key=lambda root: cost_after(costs, units, with_milder(best, root))):
        spared = with_milder(best, root)
        if cost_after(costs, units, spared) <= target:
            best = spared
    return best
