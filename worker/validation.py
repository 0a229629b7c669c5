"""How well a network does on the samples that training keeps out: the task's leading metric, and a score a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from shared.recipe import Task
from worker.logits import Outputs
from worker.material import Material

Network = Callable[[torch.Tensor], torch.Tensor]
Reader = Callable[[torch.Tensor], Outputs]


@torch.no_grad()
def validate(network: Network, kept_out: Material, task: Task, batch: int, device: torch.device) -> float | None:
    """The task's leading metric (top1, AUROC, or mean Dice without the background), as evaluation defines it.

    None where nothing is kept out. NaN where the network puts out something else than finite numbers.
    """
    outputs, truths = [], []
    scores: list[torch.Tensor] = []
    for logits, truth in _decided(network, kept_out, batch, device):
        if not bool(torch.isfinite(logits).all()):
            return float("nan")
        if task.key == "multilabel images":
            outputs.append(logits)
            truths.append(truth)
        else:
            scores.append(_scores(logits, truth, task))
    if outputs:
        return _auroc(torch.cat(outputs), torch.cat(truths))
    return float(torch.cat(scores).mean()) if scores else None


@torch.no_grad()
def scores_by_sample(
    network: Network, kept_out: Material, task: Task, batch: int, device: torch.device
) -> list[float]:
    """One score a sample: its mean Dice, whether it is decided rightly, or the share of its labels that are."""
    found = [_scores(logits, truth, task).mean(dim=1) for logits, truth in _decided(network, kept_out, batch, device)]
    scores: list[float] = torch.cat(found).tolist()
    return scores


def _decided(
    network: Network, kept_out: Material, batch: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits (n, classes, ...) and targets, a batch at a time."""
    for start in range(0, len(kept_out), batch):
        inputs, targets = kept_out.take(range(start, min(start + batch, len(kept_out))))
        assert targets is not None
        yield network(inputs.to(device)).float(), targets.to(device)


def _scores(logits: torch.Tensor, truth: torch.Tensor, task: Task) -> torch.Tensor:
    """(n, 1) for labelled images, (n, labels) for several labels, (n, classes) for voxels, without the background."""
    if task.kind == "classification":
        return (logits.argmax(dim=1) == truth).double()[:, None]
    if task.kind == "multilabel":
        thresholds = torch.tensor(task.thresholds or [0.5] * len(task.classes), device=logits.device).logit()
        found = logits > thresholds.reshape(-1, *(1,) * (logits.ndim - 2))  # (n, labels, ...)
        if logits.ndim == 2:
            return (found == truth.bool()).double()
        return _dice(found, truth.bool())
    classes = torch.tensor([index for index in range(len(task.classes)) if index != task.background])
    classes = classes.to(logits.device).reshape(-1, *(1,) * (truth.ndim - 1))  # (classes, 1, ...)
    return _dice(logits.argmax(dim=1)[:, None] == classes, truth[:, None] == classes)


def _dice(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Dice (n, classes) of masks (n, classes, ...); 1 where both are empty."""
    both = (found & truth).flatten(2).sum(dim=2).double()
    sizes = (found.flatten(2).sum(dim=2) + truth.flatten(2).sum(dim=2)).double()
    return torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0)


def _auroc(logits: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean area under the ROC curve over the labels that some samples have and others lack; ties count half."""
    areas = []
    for scores, has_label in zip(logits.T, truth.T.bool(), strict=True):
        positive, negative = scores[has_label], scores[~has_label].sort().values
        if len(positive) and len(negative):
            below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
            areas.append(float(below.double().mean()) / (2 * len(negative)))
    return sum(areas) / len(areas) if areas else 0.5


@torch.no_grad()
def closeness(
    network: Reader, teacher: Reader, kept_out: Material, batch: int, device: torch.device
) -> float | None:
    """1 less the relative RMS difference from the teacher's outputs, at the worst of them; 1: they are equal.

    None where nothing is kept out. NaN where the network puts out something else than finite numbers.
    """
    totals: list[tuple[float, float]] = []
    for start in range(0, len(kept_out), batch):
        inputs, _ = kept_out.take(range(start, min(start + batch, len(kept_out))))
        found, wanted = (_listed(one(inputs.to(device))) for one in (network, teacher))
        squares = [
            (float((one - other).double().square().sum()), float(other.double().square().sum()))
            for one, other in zip(found, wanted, strict=True)
        ]
        before = totals or [(0.0, 0.0)] * len(squares)
        totals = [(a + c, b + d) for (a, b), (c, d) in zip(before, squares, strict=True)]
    return min(1 - math.sqrt(error / max(size, 1e-12)) for error, size in totals) if totals else None


def _listed(outputs: Outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
