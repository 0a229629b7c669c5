"""What training minimizes: the task's own loss on the labels, and Hinton's on a teacher's soft targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from shared.recipe import SoftTargets, Task, Training


def total_loss(
    logits: torch.Tensor,
    targets: torch.Tensor | None,
    teacher: torch.Tensor | None,
    task: Task,
    training: Training,
    soft_targets: SoftTargets | None,
) -> torch.Tensor:
    """alpha * T^2 * KL(student_T || teacher_T) + (1 - alpha) * task loss, arXiv 1503.02531; without a teacher the last.

    `logits` and `teacher` are (n, classes, ...); `targets` (n, ...) class indices or (n, labels, ...) of 0 and 1, or
    None where alpha is 1.
    """
    if teacher is None or soft_targets is None or soft_targets.alpha == 0:
        assert targets is not None
        return task_loss(logits, targets, task, training)
    soft = soft_loss(logits, teacher, soft_targets.temperature, independent=task.kind == "multilabel")
    if targets is None or soft_targets.alpha == 1:
        return soft
    return soft_targets.alpha * soft + (1 - soft_targets.alpha) * task_loss(logits, targets, task, training)


def soft_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, *, independent: bool = False
) -> torch.Tensor:
    """T^2 times the divergence of the softened distributions, averaged over samples and pixels.

    Of the teacher from the student's, in nats, so that its gradient is that of the cross-entropy with soft targets;
    T^2 keeps the gradient's size whatever the temperature (arXiv 1503.02531, section 2). `independent` labels have a
    distribution of two each, and are averaged over as well.
    """
    student, teacher = student / temperature, teacher / temperature  # (n, classes, ...)
    if independent:
        wanted = teacher.sigmoid()
        # cross-entropy less the teacher's own entropy
        divergence = F.binary_cross_entropy_with_logits(student, wanted, reduction="none")
        divergence = divergence - F.binary_cross_entropy_with_logits(teacher, wanted, reduction="none")
        return temperature**2 * divergence.mean()
    found, wanted = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=1)  # (n, ...)
    return temperature**2 * divergence.mean()


def outputs_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Smooth L1 between outputs that are no decisions, in units of the teacher's spread, averaged over the outputs.

    The spread is that of each channel over the batch, so that small channels count as much as large ones.
    """
    losses = []
    for found, wanted in zip(student, teacher, strict=True):
        others = [axis for axis in range(wanted.ndim) if axis != 1]
        spread = wanted.std(dim=others, correction=0, keepdim=True)  # (1, channels, 1, ...)
        # a channel that hardly varies is measured by the whole output's spread
        floor = (0.01 * wanted.std(correction=0)).clamp(min=1e-6)
        losses.append(F.smooth_l1_loss(found / spread.clamp(min=floor), wanted / spread.clamp(min=floor)))
    return torch.stack(losses).mean()


def task_loss(logits: torch.Tensor, targets: torch.Tensor, task: Task, training: Training) -> torch.Tensor:
    """Cross-entropy, weighted and smoothed as `training` says; of voxels plus soft Dice (2011.01045).

    Of independent labels the cross-entropy is binary.
    """
    weights = None if training.class_weights is None else logits.new_tensor(training.class_weights)  # (classes,)
    if task.kind == "multilabel":
        loss = _binary_cross_entropy(logits, targets, weights, training.label_smoothing)
        return loss + soft_dice_loss(logits, targets, weights=weights, independent=True) if targets.ndim > 2 else loss
    loss = F.cross_entropy(logits, targets, weights, reduction="sum", label_smoothing=training.label_smoothing)
    counted = loss.new_tensor(targets.numel()) if weights is None else weights[targets].sum()
    # a batch may hold nothing but classes of no weight
    loss = loss / torch.where(counted > 0, counted, torch.inf)
    if task.kind == "segmentation":
        loss = loss + soft_dice_loss(logits, targets, task.background, weights)
    return loss


def _binary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    """Averaged over samples and pixels, and over the labels by their weights; `targets` (n, labels, ...) of 0 and 1."""
    wanted = targets.to(logits.dtype) * (1 - smoothing) + smoothing / 2
    by_label = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").transpose(0, 1).flatten(1).mean(1)
    return by_label.mean() if weights is None else (weights * by_label).sum() / weights.sum()


def soft_dice_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    background: int | None = None,
    weights: torch.Tensor | None = None,
    *,
    independent: bool = False,
) -> torch.Tensor:
    """1 - Dice of probabilities and labels, counted over the whole batch, averaged over the classes but the background.

    A class that is neither in the labels nor predicted counts as found. `independent` labels are (n, labels, ...) of
    0 and 1, and have a sigmoid each. arXiv 1606.04797.
    """
    classes = logits.shape[1]
    if independent:
        found = logits.sigmoid().transpose(0, 1).flatten(1)  # (labels, pixels)
        truth = targets.transpose(0, 1).flatten(1).to(found.dtype)  # (labels, pixels)
    else:
        found = logits.softmax(dim=1).transpose(0, 1).flatten(1)  # (classes, pixels)
        truth = F.one_hot(targets.flatten(), classes).T.to(found.dtype)  # (classes, pixels)
    dice = (2 * (found * truth).sum(dim=1) + 1) / (found.sum(dim=1) + truth.sum(dim=1) + 1)  # (classes,)
    counted = torch.ones(classes, device=dice.device, dtype=dice.dtype) if weights is None else weights.to(dice.dtype)
    if background is not None:
        counted = counted.index_fill(0, torch.tensor([background], device=dice.device), 0.0)
    return (counted * (1 - dice)).sum() / counted.sum().clamp(min=1e-12)
