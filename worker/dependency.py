"""Which channels of a network belong together, what they are worth, and how they are taken out.

torch-pruning's dependency graph (arXiv 2301.12900) finds the layers that a channel runs through. Two layers of the
home field's networks break it: InstanceNorm, which is a pair of reshapes to autograd, and PReLU with one parameter
for all channels. While the graph is used, a BatchNorm of the same channels and a ReLU stand in for them.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch_pruning.ops import _ConcatOp, _OutputOp

from worker.shrink import WeightlessInstanceNorm, is_depthwise

Importance = Literal["l1", "l2", "batchnorm_scale", "taylor"]
GRAPH_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """Inputs or outputs of a layer that go when a unit goes: `channels` of them."""

    layer: str
    direction: Literal["in", "out"]
    channels: int


@dataclass(frozen=True)
class Unit:
    """Channels that run through several layers and can only be taken out of all of them at once.

    `root` is the layer that makes them, first in order. They come in `parts` of equal size (heads, groups of a
    convolution or of a GroupNorm) that must lose the same positions; `scores` has a value for each position of a part,
    relative to the unit's mean.
    """

    root: str
    channels: int
    parts: int
    sides: tuple[Side, ...]
    scores: torch.Tensor  # (channels / parts,)


@dataclass(frozen=True)
class Map:
    """A network's units, the layers that give its outputs, and the roots whose channels cannot be followed."""

    units: tuple[Unit, ...]
    heads: tuple[str, ...]
    lost: tuple[str, ...]


def survey(
    module: nn.Module, sample: torch.Tensor, ignored: Sequence[str], importance: Importance = "l2"
) -> Map:
    """The units that can be pruned when no output of an `ignored` layer may go; the heads are always ignored.

    `sample` is one input (1, C, ...). Taylor importance reads the gradients that the parameters hold.
    Raises what torch-pruning raises on a network that it cannot follow (GRAPH_ERRORS).
    """
    with traceable(module):
        names = {layer: name for name, layer in module.named_modules()}
        graph = _graph(module, sample)
        heads = _heads(graph, names)
        kept = [module.get_submodule(name) for name in (*ignored, *heads)]
        layers = [layer for outer in kept for layer in outer.modules()]
        score = _scorer(importance)
        found, lost = [], []
        for group in graph.get_all_groups(ignored_layers=layers, root_module_types=[_ConvNd, nn.Linear]):
            if not _is_whole(graph, group):
                lost.append(names[group[0].dep.target.module])
            elif (unit := _unit(graph, group, names, score)) is not None:
                found.append(unit)
    return Map(tuple(found), tuple(heads), tuple(lost))


def remove(module: nn.Module, sample: torch.Tensor, chosen: Mapping[str, Sequence[int]]) -> None:
    """Take the chosen channels, by the root of their unit, out of the network, in place."""
    with traceable(module):
        graph = _graph(module, sample)
        for root, channels in chosen.items():
            layer = module.get_submodule(root)
            graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(channels)).prune()
    module.eval()


# ---------------------------------------------------------------- the graph


def _graph(module: nn.Module, sample: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Maximum recursive depth", category=UserWarning)
        graph = torch_pruning.DependencyGraph().build_dependency(
            module.eval(), sample, forward_fn=_everything, verbose=False
        )
    _refuse_rolls(graph)
    _cut_broadcasts(graph)
    return graph


def _everything(module: nn.Module, sample: torch.Tensor) -> list[torch.Tensor]:
    """The network's outputs, then its layers': some run and lead to no output (deep supervision, outside training)."""
    noted: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, output: noted.append(output))
        for layer in module.modules()
        if isinstance(layer, _ConvNd | nn.Linear)
    ]
    try:
        return outputs(module(sample)) + noted
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_rolls(graph: Any) -> None:
    """Windows that are rolled and cut anew (Swin): torch-pruning would follow their channels in circles for ever."""
    for node in graph.module2node.values():
        if "RollBackward" in str(node.grad_fn):
            raise NotImplementedError("its windows are shifted, and channels cannot be followed through that")


def _cut_broadcasts(graph: Any) -> None:
    """One channel that is spread over many (an attention map) does not go when they go."""
    waiting = [node for node in graph.module2node.values() if graph.get_out_channels(node) == 1]
    for node in waiting:
        for follower in node.outputs:
            follower.dependencies = [link for link in follower.dependencies if link.target is not node]
            follower.inputs = [other for other in follower.inputs if other is not node]
            if not follower.inputs and graph.get_out_channels(follower) is None:
                waiting.append(follower)
        node.dependencies = [link for link in node.dependencies if link.target not in node.outputs]
    for node in graph.module2node.values():
        if isinstance(node.module, _ConcatOp):
            node.module.concat_sizes = None  # counted before the cut


def outputs(found: Any) -> list[torch.Tensor]:
    """Every tensor in what a network gives: a tensor, or dicts, lists and tuples of them."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, Mapping):
        found = list(found.values())
    return [tensor for entry in found or () for tensor in outputs(entry)]


def _heads(graph: Any, names: Mapping[nn.Module, str]) -> list[str]:
    """The layers with weights that are met first on every way back from an output."""
    waiting = [node for module, node in graph.module2node.items() if isinstance(module, _OutputOp) or not node.outputs]
    seen, found = set(), []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.module, _ConvNd | nn.Linear):
            found.append(names[node.module])
        else:
            waiting.extend(node.inputs)
    return sorted(found)


def _is_whole(graph: Any, group: Any) -> bool:
    """Every channel of the group is one that its layer has: where not, a reshape has led the graph astray."""
    for dependency, indices in group:
        outgoing = graph.is_out_channel_pruning_fn(dependency.handler)
        channels = (graph.get_out_channels if outgoing else graph.get_in_channels)(dependency.target)
        if channels is not None and max(indices) >= channels:
            return False
    return True


def _unit(graph: Any, group: Any, names: Mapping[nn.Module, str], score: Any) -> Unit | None:
    """None where there is nothing to choose: no weights to judge by, or parts of a single channel."""
    root = group[0].dep.target.module
    channels = len(group[0].idxs)
    sides, parts = [], 1
    for dependency, indices in group:
        layer = dependency.target.module
        if isinstance(layer, nn.Parameter) or layer not in names:
            continue
        outgoing = graph.is_out_channel_pruning_fn(dependency.handler)
        sides.append(Side(names[layer], "out" if outgoing else "in", len(indices)))
        parts = math.lcm(parts, _parts(layer))
    scores = score(group)
    if scores is None or channels % parts or channels == parts:
        return None
    return Unit(names[root], channels, parts, tuple(sides), scores.detach().view(parts, -1).mean(dim=0))


def _parts(layer: nn.Module) -> int:
    """Equal parts that the layer's channels come in."""
    if isinstance(layer, _ConvNd):
        return 1 if is_depthwise(layer) else layer.groups
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    return layer.num_heads if isinstance(layer, nn.MultiheadAttention) else 1


def _scorer(importance: Importance) -> Any:
    """Importance of every channel of a group, relative to the group's mean."""
    if importance == "taylor":
        return torch_pruning.importance.GroupTaylorImportance()
    if importance == "batchnorm_scale":
        return torch_pruning.importance.BNScaleImportance()
    return torch_pruning.importance.GroupMagnitudeImportance(p=1 if importance == "l1" else 2)


# ---------------------------------------------------------------- stand-ins


@contextlib.contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Within it, layers that the graph cannot follow are replaced by ones that it can; what was pruned stays so."""
    stand_ins: dict[nn.Module, nn.Module] = {}
    places = []
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        stand_in = stand_ins.get(layer) or _stand_in(layer)
        if stand_in is not None and name:
            stand_ins[layer] = stand_in
            places.append((name, layer))
            module.set_submodule(name, stand_in)
    try:
        yield
    finally:
        for layer, stand_in in stand_ins.items():
            _take_over(layer, stand_in)
        for name, layer in places:
            module.set_submodule(name, layer)


def _stand_in(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return nn.ReLU()
    if isinstance(layer, WeightlessInstanceNorm):
        return nn.Identity()
    if not isinstance(layer, _InstanceNorm):
        return None
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[_dimensions(layer)]
    stand_in = kind(layer.num_features, layer.eps, affine=layer.affine)
    if layer.affine:
        stand_in.weight, stand_in.bias = layer.weight, layer.bias
    if layer.track_running_stats:
        stand_in.running_mean, stand_in.running_var = layer.running_mean, layer.running_var
    return stand_in.eval()


def _dimensions(layer: _InstanceNorm) -> int:
    return 1 if isinstance(layer, nn.InstanceNorm1d) else 2 if isinstance(layer, nn.InstanceNorm2d) else 3


def _take_over(layer: nn.Module, stand_in: nn.Module) -> None:
    """Give the layer what pruning left of the BatchNorm that stood in for it."""
    if isinstance(layer, _InstanceNorm) and isinstance(stand_in, _BatchNorm):
        layer.num_features = stand_in.num_features
        if layer.affine:
            layer.weight, layer.bias = stand_in.weight, stand_in.bias
        if layer.track_running_stats:
            layer.running_mean, layer.running_var = stand_in.running_mean, stand_in.running_var
