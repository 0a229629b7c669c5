"""What moves a network's weights in training: AdamW, its schedule, and the averaged weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from shared.recipe import Training

WARM_UP_RATIO = 0.05  # of the steps of a cosine


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of weights and statistics, with a short memory at first: it starts from noise."""

    @torch.no_grad()
    def average(averaged: Any, current: Any, count: Any) -> None:
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        for old, new in zip(averaged, current, strict=True):
            if old.is_floating_point():
                old.lerp_(new, weight)
            else:
                old.copy_(new)

    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def optimizer_of(network: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW; biases and the weights of norms do not decay."""
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in learnt if parameter.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [parameter for parameter in learnt if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=training.learning_rate)


def scheduler_of(
    optimizer: torch.optim.Optimizer, training: Training, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule over all epochs of `steps` each."""
    if training.schedule == "one_cycle":
        # one more than there are, for it is moved on after the last as well
        total_steps = training.epochs * steps + 1
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps)
    num_steps = training.epochs * steps
    warm_up = max(1, round(WARM_UP_RATIO * num_steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
