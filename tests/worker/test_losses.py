"""The losses against their formulas, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from shared.recipe import SoftTargets, Task, Training
from worker.losses import outputs_loss, soft_dice_loss, soft_loss, task_loss, total_loss

LESION = Task(kind="segmentation", classes=["air", "tissue", "bone"], background=0)
DIGITS = Task(kind="classification", classes=["one", "two", "three"])
FINDINGS = Task(kind="multilabel", classes=["nodule", "fluid"])
STRUCTURES = Task(kind="multilabel", classes=["liver", "tumour"], per="voxel")
PLAIN = Training()


def tensors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_soft_loss_is_hintons_formula() -> None:
    student, teacher, temperature = tensors(4, 3), tensors(4, 3, seed=1), 3.0
    expected = 0.0
    for told, wanted in zip(student, teacher, strict=True):
        q = [math.exp(float(value) / temperature) for value in told]
        p = [math.exp(float(value) / temperature) for value in wanted]
        q, p = [value / sum(q) for value in q], [value / sum(p) for value in p]
        expected += sum(pi * math.log(pi / qi) for pi, qi in zip(p, q, strict=True)) / 4
    assert float(soft_loss(student, teacher, temperature)) == pytest.approx(temperature**2 * expected, rel=1e-5)


def test_a_student_that_knows_all_that_its_teacher_knows_has_no_soft_loss() -> None:
    teacher = tensors(2, 3, 8, 8)
    assert float(soft_loss(teacher + 5.0, teacher, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_the_soft_loss_of_a_segmentation_is_the_mean_over_its_pixels() -> None:
    student, teacher = tensors(2, 3, 4, 4), tensors(2, 3, 4, 4, seed=1)
    flat = [values.movedim(1, -1).reshape(-1, 3) for values in (student, teacher)]
    assert torch.allclose(soft_loss(student, teacher, 2.0), soft_loss(flat[0], flat[1], 2.0))


def test_the_gradient_of_the_soft_loss_keeps_its_size_at_any_temperature() -> None:
    """At a high temperature it nears (student - teacher) / classes, for logits of mean zero (1503.02531, eq. 4)."""
    student, teacher = tensors(1, 3), tensors(1, 3, seed=1)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    student.requires_grad_()
    soft_loss(student, teacher, 100.0).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, (student - teacher).detach() / 3, atol=0.02)


def test_alpha_weighs_the_soft_loss_against_the_labels() -> None:
    logits, teacher, labels = tensors(4, 3), tensors(4, 3, seed=1), torch.tensor([0, 1, 2, 0])
    soft, hard = soft_loss(logits, teacher, 2.0), task_loss(logits, labels, DIGITS, PLAIN)
    for alpha in (0.0, 0.3, 1.0):
        found = total_loss(logits, labels, teacher, DIGITS, PLAIN, SoftTargets(temperature=2.0, alpha=alpha))
        assert torch.allclose(found, alpha * soft + (1 - alpha) * hard)
    assert torch.allclose(total_loss(logits, labels, None, DIGITS, PLAIN, None), hard)


def test_labels_are_smoothed_but_soft_targets_are_not() -> None:
    logits, teacher, labels = tensors(4, 3), tensors(4, 3, seed=1), torch.tensor([0, 1, 2, 0])
    smooth = Training(label_smoothing=0.2)
    assert task_loss(logits, labels, DIGITS, smooth) != task_loss(logits, labels, DIGITS, PLAIN)
    only_soft = SoftTargets(alpha=1.0)
    assert torch.equal(
        total_loss(logits, labels, teacher, DIGITS, smooth, only_soft),
        total_loss(logits, labels, teacher, DIGITS, PLAIN, only_soft),
    )


def test_class_weights_weigh_the_labels_loss() -> None:
    logits, labels = tensors(4, 3), torch.tensor([0, 1, 2, 0])
    weighted = Training(class_weights=[0.0, 1.0, 0.0])
    expected = torch.nn.functional.cross_entropy(logits[1:2], labels[1:2])
    assert torch.allclose(task_loss(logits, labels, DIGITS, weighted), expected)
    masks = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(task_loss(tensors(2, 3, 8, 8), masks, LESION, weighted))


def test_weighted_and_smoothed_cross_entropy_is_pytorchs() -> None:
    logits, labels = tensors(6, 3), torch.tensor([0, 1, 2, 0, 1, 1])
    for weights in (None, [0.5, 1.0, 2.0]):
        training = Training(class_weights=weights, label_smoothing=0.1)
        weighed = None if weights is None else torch.tensor(weights)
        expected = torch.nn.functional.cross_entropy(logits, labels, weighed, label_smoothing=0.1)
        assert torch.allclose(task_loss(logits, labels, DIGITS, training), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_batch_of_classes_without_weight_teaches_nothing(label_smoothing: float) -> None:
    """PyTorch's own mean is 0 / 0 here: slices that show nothing but background would end a training."""
    training = Training(class_weights=[0.0, 1.0, 1.0], label_smoothing=label_smoothing)
    logits = tensors(4, 3).requires_grad_()
    loss = task_loss(logits, torch.zeros(4, dtype=torch.int64), DIGITS, training)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()
    volumes = task_loss(tensors(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64), LESION, training)
    assert torch.isfinite(volumes)


def test_a_perfect_segmentation_has_no_dice_loss_and_a_wrong_one_nearly_one() -> None:
    masks = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    perfect = 50.0 * torch.nn.functional.one_hot(masks, 3).movedim(-1, 1).float()
    assert float(soft_dice_loss(perfect, masks)) == pytest.approx(0.0, abs=1e-4)
    assert float(soft_dice_loss(-perfect, masks)) > 0.6
    wrong = 50.0 * torch.nn.functional.one_hot((masks + 1) % 3, 3).movedim(-1, 1).float()
    assert float(soft_dice_loss(wrong, masks)) > 0.9


def test_the_dice_loss_leaves_the_background_out() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.int64)
    masks[:, :, 4:] = 1
    logits = tensors(1, 3, 8, 8)
    everywhere = soft_dice_loss(logits, masks)
    foreground = soft_dice_loss(logits, masks, background=0)
    assert everywhere != foreground
    by_class = [soft_dice_loss(logits, masks, weights=torch.eye(3)[index]) for index in (1, 2)]
    assert torch.allclose(foreground, torch.stack(by_class).mean())


def test_the_dice_loss_is_that_of_volumes_too_and_has_gradients() -> None:
    logits = tensors(1, 3, 4, 4, 4).requires_grad_()
    masks = torch.randint(0, 3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    task_loss(logits, masks, LESION, PLAIN).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) > 0


# ---------------------------------------------------------------- several labels


def test_the_loss_of_several_labels_is_binary_cross_entropy() -> None:
    logits, labels = tensors(5, 2), torch.tensor([[1, 0], [0, 0], [1, 1], [0, 1], [1, 0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float())
    assert torch.allclose(task_loss(logits, labels, FINDINGS, PLAIN), expected)
    first = task_loss(logits, labels, FINDINGS, Training(class_weights=[1.0, 0.0]))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0].float())
    assert torch.allclose(first, expected)
    smooth = task_loss(logits, labels, FINDINGS, Training(label_smoothing=0.2))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, 0.8 * labels + 0.1)
    assert torch.allclose(smooth, expected)


def test_overlapping_structures_add_a_dice_loss_of_each_label() -> None:
    masks = torch.randint(0, 2, (2, 2, 8, 8), generator=torch.Generator().manual_seed(0))
    masks[:, 1] &= masks[:, 0]  # a tumour lies in the liver
    perfect = 50.0 * (2 * masks.float() - 1)
    assert float(task_loss(perfect, masks, STRUCTURES, PLAIN)) == pytest.approx(0.0, abs=1e-4)
    half = perfect.clone()
    half[:, 1] *= -1
    assert float(soft_dice_loss(half, masks, independent=True)) == pytest.approx(0.5, abs=0.02)
    logits = tensors(2, 2, 8, 8)
    dice = soft_dice_loss(logits, masks, independent=True)
    cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks.float())
    assert torch.allclose(task_loss(logits, masks, STRUCTURES, PLAIN), cross_entropy + dice)


def test_the_soft_loss_of_several_labels_is_that_of_two_classes_each() -> None:
    student, teacher = tensors(4, 3), tensors(4, 3, seed=1)
    pairs = [torch.stack([torch.zeros_like(values), values], dim=1) for values in (student, teacher)]  # (4, 2, 3)
    found = soft_loss(student, teacher, 2.0, independent=True)
    assert torch.allclose(found, soft_loss(pairs[0], pairs[1], 2.0))
    assert float(soft_loss(teacher, teacher, 2.0, independent=True)) == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------- no labels


def test_with_the_teacher_alone_no_labels_are_needed() -> None:
    logits, teacher = tensors(4, 3), tensors(4, 3, seed=1)
    found = total_loss(logits, None, teacher, DIGITS, PLAIN, SoftTargets(alpha=1.0))
    assert torch.equal(found, soft_loss(logits, teacher, 2.0))


def test_outputs_are_compared_in_units_of_the_teachers_spread() -> None:
    teacher = (tensors(8, 2, 4, 4), tensors(8, 5, seed=1))
    student = tuple(output + 0.1 for output in teacher)
    plain = outputs_loss(student, teacher)
    assert float(outputs_loss(teacher, teacher)) == 0.0
    large = outputs_loss(tuple(1000 * output for output in student), tuple(1000 * output for output in teacher))
    assert torch.allclose(plain, large, rtol=1e-4)


def test_an_output_that_never_varies_can_still_be_learnt() -> None:
    student = tensors(4, 2).requires_grad_()
    outputs_loss((student,), (torch.ones(4, 2),)).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
