"""A network's outputs as training reads them: logits (n, classes, ...), whatever its head gives."""

from __future__ import annotations

import torch
from torch import nn

from shared.errors import StageFailed
from shared.recipe import Task
from worker.loading import TensorOutput

Outputs = torch.Tensor | tuple[torch.Tensor, ...]  # logits, or every output of a network that decides nothing

SMALLEST_PROBABILITY = 1e-6


class Logits(nn.Module):
    """One logit a class from what the wrapped network puts out, wherever it puts its classes.

    Of a network of one channel for two classes, with or without an axis for it, the first class's logit is 0.
    Probabilities are taken back to logits: those of a softmax are recognised, others the task names. Outputs that deep
    supervision has stacked, (n, heads, classes, ...), are read at the first head.
    """

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network = TensorOutput(network)
        self.task = task

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.network(inputs).float()
        classes, independent = len(self.task.classes), self.task.kind == "multilabel"
        decides_voxels = self.task.target == "masks"
        rank = inputs.ndim if decides_voxels else 2  # of logits (n, classes, ...)
        alone = 1 if independent else 2  # classes that one channel can stand for
        if outputs.ndim == rank + 1:
            outputs = outputs[:, 0]
        elif outputs.ndim == rank - 1 and classes == alone:
            outputs = outputs.unsqueeze(1)
        elif outputs.ndim == rank and outputs.shape[1] not in (1, classes) and outputs.shape[-1] in (1, classes):
            outputs = outputs.movedim(-1, 1)
        channels = outputs.shape[1] if outputs.ndim > 1 else 0
        if independent:
            return _logit(outputs) if self.task.scores == "probabilities" else outputs
        if channels == 1 and classes == 2:
            second = _logit(outputs) if self.task.scores == "probabilities" else outputs
            outputs = torch.cat([torch.zeros_like(second), second], dim=1)
        elif channels > 1 and _are_probabilities(outputs.detach()):
            outputs = (outputs + SMALLEST_PROBABILITY).log()
        return outputs


def _logit(probabilities: torch.Tensor) -> torch.Tensor:
    """A sigmoid undone. Finite at 0 and 1, and with a gradient there, so that what was ruled out can be learnt."""
    return (probabilities + SMALLEST_PROBABILITY).log() - (1 - probabilities + SMALLEST_PROBABILITY).log()


def _are_probabilities(outputs: torch.Tensor) -> bool:
    """Whether the network ends in a softmax of its own: as evaluation tells it."""
    return bool((outputs >= 0).all()) and bool(((outputs.sum(dim=1) - 1).abs() < 1e-3).all())


class AllOutputs(nn.Module):
    """Every tensor that the wrapped network puts out, in its order: what a task without decisions learns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(output.float() for output in _tensors(self.network(inputs)) if output.is_floating_point())


def _tensors(outputs: object) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = list(outputs.values()) if isinstance(outputs, dict) else outputs
    return [tensor for part in parts for tensor in _tensors(part)] if isinstance(parts, list | tuple) else []


def checked_logits(network: Logits, inputs: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    """The logits of a batch; raises StageFailed (input_mismatch, output_mismatch) where it does not fit the network."""
    outputs = checked_outputs(network, inputs)
    assert isinstance(outputs, torch.Tensor)
    task = network.task
    classes = len(task.classes)
    if targets is None:  # (n, classes, ...): no label says what else there is
        expected = [len(inputs), classes, *outputs.shape[2:]]
    elif task.kind == "multilabel":
        expected = list(targets.shape)
    else:
        expected = [len(targets), classes, *targets.shape[1:]]
    if list(outputs.shape) != expected:
        raise _output_mismatch(f"The network puts out {list(outputs.shape)}, but the task needs {expected}.")
    return outputs


def checked_outputs(network: nn.Module, inputs: torch.Tensor) -> Outputs:
    """What the network puts out for a batch; raises StageFailed (input_mismatch) where it does not run."""
    try:
        outputs: Outputs = network(inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        if "memory" in str(error):
            raise
        raise StageFailed(
            f"The network cannot train on inputs of shape {list(inputs.shape)}: {str(error).splitlines()[0]}",
            hint="Check the network's input channels, the images' size and preprocessing.layout.",
            code="input_mismatch",
        ) from error
    return outputs


def check_same_shapes(student: Outputs, teacher: Outputs) -> None:
    """Raises StageFailed (output_mismatch) where a student cannot learn its teacher's outputs."""
    shapes = [[list(output.shape) for output in outputs] for outputs in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise _output_mismatch(f"The network puts out {shapes[0]}, its teacher {shapes[1]}.")


def _output_mismatch(message: str) -> StageFailed:
    return StageFailed(
        message, hint="Check the task's classes and the network's number of outputs.", code="output_mismatch"
    )
