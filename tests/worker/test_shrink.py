"""A pruned network is rebuilt from its architecture and the shapes of its weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared.errors import StageFailed
from shared.recipe import Architecture, ModelFormat
from worker.architectures import constructor
from worker.context import Model
from worker.loading import load_module
from worker.shrink import WeightlessInstanceNorm, is_depthwise, shrink, sizes

Shapes = dict[str, list[int]]


def shapes_of(module: nn.Module) -> Shapes:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def shrunk(larger: nn.Module, smaller: nn.Module) -> nn.Module:
    """The larger network in the shapes, and with the weights, of the smaller one."""
    shrink(larger, shapes_of(smaller))
    larger.load_state_dict(smaller.state_dict(), strict=True)
    return larger.eval()


@pytest.mark.parametrize(
    ("larger", "smaller", "inputs"),
    [
        (nn.Conv2d(6, 8, 3), nn.Conv2d(4, 5, 3), (1, 4, 8, 8)),
        (nn.Conv3d(6, 8, 3), nn.Conv3d(4, 5, 3), (1, 4, 8, 8, 8)),
        (nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2), (1, 4, 8, 8)),
        (nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(5, 5, 3, groups=5), (1, 5, 8, 8)),
        (nn.ConvTranspose2d(6, 8, 2, stride=2), nn.ConvTranspose2d(4, 5, 2, stride=2), (1, 4, 8, 8)),
        (nn.ConvTranspose2d(8, 8, 2, groups=8), nn.ConvTranspose2d(5, 5, 2, groups=5), (1, 5, 8, 8)),
        (nn.Linear(6, 8), nn.Linear(4, 5), (1, 4)),
        (nn.BatchNorm2d(8), nn.BatchNorm2d(5), (1, 5, 4, 4)),
        (nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(5, affine=False), (1, 5, 4, 4)),
        (nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(5, affine=True), (1, 5, 4, 4)),
        (
            nn.InstanceNorm2d(8, track_running_stats=True),
            nn.InstanceNorm2d(5, track_running_stats=True),
            (1, 5, 4, 4),
        ),
        (nn.GroupNorm(2, 8), nn.GroupNorm(2, 6), (1, 6, 4, 4)),
        (nn.LayerNorm(8), nn.LayerNorm(5), (1, 3, 5)),
        (nn.PReLU(8), nn.PReLU(5), (1, 5, 4, 4)),
        (nn.PReLU(1), nn.PReLU(1), (1, 5, 4, 4)),
    ],
)
def test_a_layer_of_fewer_channels_behaves_as_one_that_was_built_so(
    larger: nn.Module, smaller: nn.Module, inputs: tuple[int, ...]
) -> None:
    sample = torch.randn(*inputs)
    expected, found = smaller.eval()(sample), shrunk(larger, smaller)(sample)
    assert torch.equal(found, expected)
    assert repr(larger) == repr(smaller)


def test_attention_of_fewer_channels_keeps_its_heads() -> None:
    larger, smaller = nn.MultiheadAttention(16, 4), nn.MultiheadAttention(8, 4)
    sample = torch.randn(3, 1, 8)
    found = shrunk(larger, smaller)
    assert (larger.embed_dim, larger.head_dim, larger.num_heads) == (8, 2, 4)
    assert torch.equal(found(sample, sample, sample)[0], smaller.eval()(sample, sample, sample)[0])


def test_an_embedding_of_fewer_channels_is_one() -> None:
    larger = nn.Embedding(10, 8)
    shrunk(larger, nn.Embedding(10, 5))
    assert (larger.num_embeddings, larger.embedding_dim) == (10, 5)


def test_a_normalization_without_weights_takes_any_number_of_channels() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 1), nn.InstanceNorm2d(8, eps=1e-3))
    smaller = nn.Sequential(nn.Conv2d(1, 4, 1), nn.InstanceNorm2d(4, eps=1e-3))
    sample = torch.randn(2, 1, 5, 5)
    found = shrunk(network, smaller)
    assert isinstance(found[1], WeightlessInstanceNorm)  # type: ignore[index]
    assert torch.equal(found(sample), smaller.eval()(sample))


def test_parameters_that_no_known_layer_owns_shrink_too() -> None:
    class Scaled(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(channels, 1, 1))
            self.register_buffer("offset", torch.zeros(channels, 1, 1))

    network = Scaled(8)
    shrink(network, shapes_of(Scaled(5)))
    assert shapes_of(network) == {"scale": [5, 1, 1], "offset": [5, 1, 1]}
    assert [name for name, _ in network.named_parameters()] == ["scale"]


def test_the_shapes_of_the_whole_network_change_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    before = copy.deepcopy(network.state_dict())
    shrink(network, shapes_of(network))
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("shape", [[9, 1, 3, 3], [0, 1, 3, 3], [8, 1, 3], [8, 2, 3, 3]])
def test_a_shape_that_pruning_cannot_have_made_is_left_to_the_comparison(shape: list[int]) -> None:
    network = nn.Conv2d(1, 8, 3)
    shrink(network, {"weight": shape, "bias": [8]})
    assert shapes_of(network)["weight"] == [8, 1, 3, 3]


def test_depthwise_is_one_kernel_a_channel() -> None:
    assert is_depthwise(nn.Conv2d(8, 8, 3, groups=8))
    assert not is_depthwise(nn.Conv2d(8, 16, 3, groups=8))
    assert not is_depthwise(nn.Conv2d(8, 8, 3, groups=4))
    assert not is_depthwise(nn.Conv2d(1, 1, 3))


def test_sizes_are_told_by_layer() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Linear(4, 3))
    assert sizes(network) == {"0": 8, "2": 4, "3": 3}


# ---------------------------------------------------------------- through load_module

UNET = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3, "channels": [16, 32], "strides": [2]}
WHOLE = Architecture(library="monai", name="UNet", arguments=UNET)
HALF = Architecture(library="monai", name="UNet", arguments={**UNET, "channels": [8, 16]})


def stored(path: Path, architecture: Architecture) -> nn.Module:
    torch.manual_seed(0)
    module = constructor(architecture)().eval()
    save_file(module.state_dict(), path)
    return module


def test_a_pruned_model_is_its_architecture_and_smaller_weights(tmp_path: Path) -> None:
    half = stored(tmp_path / "w.safetensors", HALF)
    found = load_module(Model(ModelFormat.TORCH, tmp_path / "w.safetensors", WHOLE, pruned=True))
    sample = torch.randn(1, 1, 16, 16)
    assert torch.equal(found(sample), half(sample))


def test_smaller_weights_are_refused_where_the_model_is_not_pruned(tmp_path: Path) -> None:
    stored(tmp_path / "w.safetensors", HALF)
    with pytest.raises(StageFailed, match="of another shape") as refused:
        load_module(Model(ModelFormat.TORCH, tmp_path / "w.safetensors", WHOLE))
    assert refused.value.code == "weights_mismatch"


def test_larger_weights_are_refused_though_the_model_is_pruned(tmp_path: Path) -> None:
    stored(tmp_path / "w.safetensors", WHOLE)
    with pytest.raises(StageFailed, match="of another shape"):
        load_module(Model(ModelFormat.TORCH, tmp_path / "w.safetensors", HALF, pruned=True))


def test_a_network_that_is_not_pruned_keeps_its_own_normalizations(tmp_path: Path) -> None:
    stored(tmp_path / "w.safetensors", WHOLE)
    found = load_module(Model(ModelFormat.TORCH, tmp_path / "w.safetensors", WHOLE))
    assert not any(isinstance(layer, WeightlessInstanceNorm) for layer in found.modules())
