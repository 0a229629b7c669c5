"""What training minimizes: the task's own loss on the labels, and Hinton's on a teacher's soft targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shared.recipe import SoftTargets, Task, Training


def total_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor | None,
    task: Task,
    training: Training,
    soft_targets: SoftTargets | None,
) -> torch.Tensor:
    """alpha * T^2 * KL(student_T || teacher_T) + (1 - alpha) * task loss, arXiv 1503.02531; without a teacher the last.

    `logits` and `teacher` are (n, classes, ...), `targets` (n, ...) class indices.
    """
    if teacher is None or soft_targets is None or soft_targets.alpha == 0:
        return task_loss(logits, targets, task, training)
    soft = soft_loss(logits, teacher, soft_targets.temperature)
    if soft_targets.alpha == 1:
        return soft
    return soft_targets.alpha * soft + (1 - soft_targets.alpha) * task_loss(logits, targets, task, training)


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 times the divergence of the softened distributions, averaged over samples and pixels.

    Of the teacher from the student's, in nats, so that its gradient is that of the cross-entropy with soft targets;
    T^2 keeps the gradient's size whatever the temperature (arXiv 1503.02531, section 2).
    """
    told = F.log_softmax(student / temperature, dim=1)  # (n, classes, ...)
    wanted = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(told, wanted, reduction="none", log_target=True).sum(dim=1)  # (n, ...)
    return temperature**2 * divergence.mean()


def task_loss(logits: torch.Tensor, targets: torch.Tensor, task: Task, training: Training) -> torch.Tensor:
    """Cross-entropy, weighted and smoothed as `training` says; for a segmentation soft Dice is added (2011.01045)."""
    weights = None if training.class_weights is None else logits.new_tensor(training.class_weights)  # (classes,)
    loss = F.cross_entropy(logits, targets, weights, reduction="sum", label_smoothing=training.label_smoothing)
    counted = loss.new_tensor(targets.numel()) if weights is None else weights[targets].sum()
    # a batch may hold nothing but classes of no weight
    loss = loss / torch.where(counted > 0, counted, torch.inf)
    if task.kind == "segmentation":
        loss = loss + soft_dice_loss(logits, targets, task.background, weights)
    return loss


def soft_dice_loss(
    logits: torch.Tensor, targets: torch.Tensor, background: int | None = None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """1 - Dice of probabilities and labels, counted over the whole batch, averaged over the classes but the background.

    A class that is neither in the labels nor predicted counts as found. arXiv 1606.04797.
    """
    classes = logits.shape[1]
    found = logits.softmax(dim=1).transpose(0, 1).flatten(1)  # (classes, pixels)
    truth = F.one_hot(targets.flatten(), classes).T.to(found.dtype)  # (classes, pixels)
    dice = (2 * (found * truth).sum(dim=1) + 1) / (found.sum(dim=1) + truth.sum(dim=1) + 1)  # (classes,)
    counted = torch.ones(classes, device=dice.device, dtype=dice.dtype) if weights is None else weights.to(dice.dtype)
    if background is not None:
        counted = counted.index_fill(0, torch.tensor([background], device=dice.device), 0.0)
    return (counted * (1 - dice)).sum() / counted.sum().clamp(min=1e-12)
