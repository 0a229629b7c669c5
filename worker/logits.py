"""A network's outputs as training reads them: logits (n, classes, ...), whatever its head gives."""

from __future__ import annotations

import torch
from torch import nn

from shared.errors import StageFailed
from shared.recipe import Task
from worker.loading import TensorOutput


class Logits(nn.Module):
    """One logit a class from what the wrapped network puts out, wherever it puts its classes.

    Of a network of one channel for two classes, with or without an axis for it, the first class's logit is 0.
    Probabilities are taken back to logits. Outputs that deep supervision has stacked, (n, heads, classes, ...), are
    read at the first head.
    """

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network = TensorOutput(network)
        self.task = task

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.network(inputs).float()
        classes = len(self.task.classes)
        rank = inputs.ndim if self.task.kind == "segmentation" else 2  # of logits (n, classes, ...)
        if outputs.ndim == rank + 1:
            outputs = outputs[:, 0]
        elif outputs.ndim == rank - 1 and classes == 2:
            outputs = outputs.unsqueeze(1)
        elif outputs.ndim == rank and outputs.shape[1] not in (1, classes) and outputs.shape[-1] in (1, classes):
            outputs = outputs.movedim(-1, 1)
        channels = outputs.shape[1] if outputs.ndim > 1 else 0
        if channels == 1 and classes == 2:
            second = outputs.logit(eps=1e-6) if self.task.scores == "probabilities" else outputs
            outputs = torch.cat([torch.zeros_like(second), second], dim=1)
        elif channels > 1 and _are_probabilities(outputs.detach()):
            outputs = (outputs + 1e-6).log()
        return outputs


def _are_probabilities(outputs: torch.Tensor) -> bool:
    """Whether the network ends in a softmax of its own: as evaluation tells it."""
    return bool((outputs >= 0).all()) and bool(((outputs.sum(dim=1) - 1).abs() < 1e-3).all())


def checked_logits(network: Logits, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The logits of a batch; raises StageFailed (input_mismatch, output_mismatch) where it does not fit the network."""
    try:
        outputs: torch.Tensor = network(inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        if "memory" in str(error):
            raise
        raise StageFailed(
            f"The network cannot train on inputs of shape {list(inputs.shape)}: {str(error).splitlines()[0]}",
            hint="Check the network's input channels, the images' size and preprocessing.layout.",
            code="input_mismatch",
        ) from error
    expected = [len(targets), len(network.task.classes), *targets.shape[1:]]
    if list(outputs.shape) != expected:
        raise StageFailed(
            f"The network puts out {list(outputs.shape)}, but the task needs {expected}.",
            hint="Check the task's classes and the network's number of outputs.",
            code="output_mismatch",
        )
    return outputs
