"""Four networks of libraries, trained here once with a fixed seed on one thread: two of digits, two of a brain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from monai.networks.nets import BasicUNet
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from benchmarks.foreign import brain
from benchmarks.foreign.pictures import Pictures, digits
from benchmarks.foreign.small_nets import export

SEED = 7
MOBILENET_SIDE = 64
VIT: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "depth": 6,
    "embed_dim": 96,
    "num_heads": 3,
}
UNET: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "features": [16, 16, 32, 64, 64, 16]}
Step = Callable[[np.random.Generator], torch.Tensor]


# ---------------------------------------------------------------- digits


def wide_digits(part: str) -> Pictures:
    """Digits as a network for photographs takes them: (N, 3, 64, 64), 0..255."""
    found = digits(part)
    images = torch.from_numpy(found.images).float()
    wide = functional.interpolate(images, (MOBILENET_SIDE, MOBILENET_SIDE), mode="bilinear", antialias=True)
    return Pictures(wide.round().byte().expand(-1, 3, -1, -1).contiguous().numpy(), found.targets)


def mobilenet(work: Path) -> Path:
    """Weights of torchvision's mobilenet_v3_small with ten classes."""
    network = _seeded(lambda: torchvision.models.mobilenet_v3_small(num_classes=10))
    return _trained(network, work / "mobilenet_v3_small.safetensors", _digit_step(network, wide_digits("train")), 700)


def vit(work: Path) -> Path:
    """Weights of a small timm ViT: 49 patches of 4 x 4, six blocks."""
    network = _seeded(lambda: timm.create_model("vit_tiny_patch16_224", **VIT))
    return _trained(network, work / "vit.safetensors", _digit_step(network, digits("train")), 1400)


def scaled(images: torch.Tensor) -> torch.Tensor:
    """What the jobs' preprocessing does: (value / 255 - 0.13) / 0.31."""
    return (images.float() / 255 - 0.13) / 0.31


def _digit_step(network: nn.Module, train: Pictures) -> Step:
    assert train.targets is not None
    images, labels = torch.from_numpy(train.images), torch.from_numpy(train.targets)

    def step(random: np.random.Generator) -> torch.Tensor:
        chosen = torch.from_numpy(random.choice(len(images), 64, replace=False))
        most = images.shape[-1] // 12
        shift = [int(amount) for amount in random.integers(-most, most + 1, 2)]
        return functional.cross_entropy(network(scaled(images[chosen].roll(shift, (2, 3)))), labels[chosen])

    return step


# ---------------------------------------------------------------- brain


def softmax_unet(work: Path) -> Path:
    """MONAI's BasicUNet 3D with its default norm (instance) and a softmax head, as ONNX."""
    network = _seeded(lambda: BasicUNet(**UNET, out_channels=len(brain.CLASSES)))

    def step(random: np.random.Generator) -> torch.Tensor:
        images, masks = _brain_batch(random, 3, brain.BLOCK, several_labels=False)
        return functional.cross_entropy(network(images), masks.long())

    weights = _trained(network, work / "softmax_unet.safetensors", step, 300, learning_rate=3e-3)
    return _exported(network, weights, nn.Softmax(dim=1), work / "softmax_unet.onnx")


def sigmoid_unet(work: Path) -> Path:
    """The same with BatchNorm and three sigmoid outputs, as ONNX."""
    network = _seeded(lambda: BasicUNet(**UNET, out_channels=len(brain.LABELS), norm="batch"))

    def step(random: np.random.Generator) -> torch.Tensor:
        images, masks = _brain_batch(random, 4, (32, 32, 32), several_labels=True)
        scores, wanted = network(images), masks.float()
        found, axes = scores.sigmoid(), (0, 2, 3, 4)
        overlap = 2 * (found * wanted).sum(axes) / (found.sum(axes) + wanted.sum(axes) + 1)  # (labels,): fluid is rare
        loss: torch.Tensor = functional.binary_cross_entropy_with_logits(scores, wanted) + 1 - overlap.mean()
        return loss

    weights = _trained(network, work / "sigmoid_unet.safetensors", step, 300, learning_rate=3e-3)
    return _exported(network, weights, nn.Sigmoid(), work / "sigmoid_unet.onnx")


def _brain_batch(
    random: np.random.Generator, count: int, block: tuple[int, ...], several_labels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    found = brain.training_blocks(random, count, block, several_labels)
    assert found.targets is not None
    images, masks = torch.from_numpy(found.images).float() / 255, torch.from_numpy(found.targets)
    if random.random() < 0.5:  # left and right
        images, masks = images.flip(-2), masks.flip(-2)
    return images * float(random.uniform(0.85, 1.15)), masks


def _exported(network: nn.Module, weights: Path, head: nn.Module, path: Path) -> Path:
    network.load_state_dict(load_file(weights))
    return export(nn.Sequential(network, head).eval(), (1, *brain.BLOCK), ["probabilities"], path)


# ---------------------------------------------------------------- both


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The network with the same first weights each time."""
    torch.manual_seed(SEED)
    return build()


def _trained(network: nn.Module, path: Path, step: Step, num_steps: int, learning_rate: float = 1.5e-3) -> Path:
    """AdamW with a one-cycle schedule, if the weights are not there yet."""
    if path.exists():
        return path
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps)
    network.train()
    for position in range(num_steps):
        optimizer.zero_grad()
        loss = step(random)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if position % 50 == 0 or position == num_steps - 1:
            print(f"training {path.stem}: step {position + 1} of {num_steps}, loss {loss.item():.4f}", flush=True)
    torch.set_num_threads(threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return path
