"""A pruned network is its architecture and smaller weights: every layer shrinks to the shapes that the weights have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

Shape = Sequence[int]


class WeightlessInstanceNorm(nn.Module):
    """InstanceNorm that holds no weights, and so nothing that says how many channels it is for."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.instance_norm(inputs, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def shrink(module: nn.Module, shapes: Mapping[str, Shape]) -> None:
    """Give every layer the shapes of `shapes` (by state_dict name), in place; the new weights are not filled.

    A shape that pruning cannot have made, of another rank or larger, is left to the caller's comparison.
    """
    for prefix, layer in list(module.named_modules()):
        own = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
        places = {name: f"{prefix}.{name}" if prefix else name for name in own}
        smaller = {name: shapes[place] for name, place in places.items() if _is_smaller(shapes.get(place), own[name])}
        for name, shape in smaller.items():
            _replace(layer, name, own[name].new_empty(tuple(shape)))
        if smaller:
            _settle(layer)
    for prefix, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, _InstanceNorm) and not (layer.affine or layer.track_running_stats):
            module.set_submodule(prefix, WeightlessInstanceNorm(layer.eps))


def _is_smaller(shape: Shape | None, tensor: torch.Tensor) -> bool:
    if shape is None or len(shape) != tensor.dim() or list(shape) == list(tensor.shape):
        return False
    return all(0 < found <= most for found, most in zip(shape, tensor.shape, strict=True))


def _replace(layer: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in layer._parameters:
        setattr(layer, name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    else:
        layer.register_buffer(name, tensor, persistent=name not in layer._non_persistent_buffers_set)


def _settle(layer: nn.Module) -> None:
    """Bring what a layer knows of its own size in line with its weights."""
    if isinstance(layer, _ConvNd):
        _settle_convolution(layer)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _BatchNorm | _InstanceNorm):
        kept = layer.weight if layer.affine else layer.running_mean
        assert kept is not None
        layer.num_features = len(kept)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(layer.weight)
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, nn.MultiheadAttention):
        projection = layer.q_proj_weight if layer.in_proj_weight is None else layer.in_proj_weight
        layer.embed_dim = layer.kdim = layer.vdim = projection.shape[1]
        layer.head_dim = layer.embed_dim // layer.num_heads


def _settle_convolution(layer: _ConvNd) -> None:
    first, second = layer.weight.shape[:2]
    if is_depthwise(layer):
        layer.in_channels = layer.out_channels = layer.groups = first
    elif layer.transposed:
        layer.in_channels, layer.out_channels = first, second * layer.groups
    else:
        layer.out_channels, layer.in_channels = first, second * layer.groups


def is_depthwise(layer: _ConvNd) -> bool:
    """Each channel has a kernel of its own, so groups go with channels."""
    return layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def sizes(module: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer, by name."""
    return {
        name: layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
        for name, layer in module.named_modules()
        if isinstance(layer, _ConvNd | nn.Linear)
    }
