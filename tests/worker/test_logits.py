"""Logits as training reads them: one a class on the second axis, whatever the network's head gives."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from shared.errors import StageFailed
from shared.recipe import Task
from worker.logits import AllOutputs, Logits, check_same_shapes, checked_logits

LESION = Task(kind="segmentation", classes=["tissue", "lesion"], background=0)
TISSUES = Task(kind="segmentation", classes=["air", "other", "grey", "white"], background=0)
DIGITS = Task(kind="classification", classes=["one", "two", "three"])
FINDINGS = Task(kind="multilabel", classes=["nodule", "fluid"])
STRUCTURES = Task(kind="multilabel", classes=["liver", "tumour"], per="voxel")
IMAGES = torch.zeros(2, 1, 6, 5)
LABELS, MASKS = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 6, 5, dtype=torch.int64)


class Says(nn.Module):
    """A network that puts out one thing."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.outputs


def read(outputs: torch.Tensor, task: Task) -> torch.Tensor:
    found: torch.Tensor = Logits(Says(outputs), task)(IMAGES)
    return found


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_logits_stay_as_they_are() -> None:
    for outputs, task in ((drawn(2, 3), DIGITS), (drawn(2, 4, 6, 5), TISSUES)):
        assert torch.equal(read(outputs, task), outputs)


def test_classes_on_the_last_axis_are_brought_to_the_second() -> None:
    outputs = drawn(2, 4, 6, 5)
    assert torch.equal(read(outputs.movedim(1, -1), TISSUES), outputs)


@pytest.mark.parametrize("scores", ["logits", "probabilities"])
@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 6, 5, 1), (2, 6, 5)])
def test_one_channel_is_the_second_of_two_classes(
    shape: tuple[int, ...], scores: Literal["logits", "probabilities"]
) -> None:
    second = drawn(2, 6, 5)
    told = (second.sigmoid() if scores == "probabilities" else second).reshape(shape)
    found = read(told, LESION.model_copy(update={"scores": scores}))
    assert found.shape == (2, 2, 6, 5)
    assert not found[:, 0].any()
    assert torch.allclose(found[:, 1], second, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 1), (2,)])
def test_one_number_a_sample_is_the_second_of_two_classes(shape: tuple[int, ...]) -> None:
    task = Task(kind="classification", classes=["well", "ill"])
    assert torch.equal(read(torch.tensor([3.0, -1.0]).reshape(shape), task), torch.tensor([[0.0, 3.0], [0.0, -1.0]]))


@pytest.mark.parametrize(("shape", "task"), [((2, 3), DIGITS), ((2, 4, 6, 5), TISSUES)])
def test_a_softmax_at_the_networks_end_is_undone(shape: tuple[int, ...], task: Task) -> None:
    """Else a temperature would be applied to probabilities, and all soft targets would be nearly the same."""
    logits = drawn(*shape)
    found = read(logits.softmax(dim=1), task)
    assert torch.allclose((found / 4).softmax(dim=1), (logits / 4).softmax(dim=1), atol=1e-4)


def test_a_class_that_a_softmax_has_ruled_out_can_be_learnt_again() -> None:
    outputs = torch.tensor([[1.0, 0.0, 0.0]]).requires_grad_()
    nn.functional.cross_entropy(read(outputs, DIGITS), torch.tensor([1])).backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()
    assert outputs.grad[0, 1] < 0


def test_what_deep_supervision_has_stacked_is_read_at_its_first_head() -> None:
    stacked = drawn(2, 3, 4, 6, 5)
    assert torch.equal(read(stacked, TISSUES), stacked[:, 0])


@pytest.mark.parametrize(
    ("shape", "task", "targets"),
    [((2, 5), DIGITS, LABELS), ((2,), DIGITS, LABELS), ((2, 3, 6, 5), TISSUES, MASKS), ((2, 4, 3, 5), TISSUES, MASKS)],
)
def test_outputs_that_no_class_can_be_read_from_are_refused(
    shape: tuple[int, ...], task: Task, targets: torch.Tensor
) -> None:
    with pytest.raises(StageFailed, match="but the task needs") as caught:
        checked_logits(Logits(Says(drawn(*shape)), task), IMAGES, targets)
    assert caught.value.code == "output_mismatch"


# ---------------------------------------------------------------- several labels


@pytest.mark.parametrize(("shape", "task"), [((2, 2), FINDINGS), ((2, 2, 6, 5), STRUCTURES)])
def test_each_of_several_labels_has_a_logit_and_no_softmax(shape: tuple[int, ...], task: Task) -> None:
    outputs = drawn(*shape)
    assert torch.equal(read(outputs, task), outputs)
    told = task.model_copy(update={"scores": "probabilities"})
    assert torch.allclose(read(outputs.sigmoid(), told), outputs, atol=1e-4)
    # two sigmoids that happen to add up to 1 are no softmax
    assert torch.equal(read(outputs.softmax(dim=1), task), outputs.softmax(dim=1))


def test_a_single_label_may_lack_its_axis() -> None:
    outputs = drawn(2, 6, 5)
    task = Task(kind="multilabel", classes=["liver"], per="voxel")
    assert torch.equal(read(outputs, task), outputs[:, None])


def test_labels_on_the_last_axis_are_brought_to_the_second() -> None:
    outputs = drawn(2, 2, 6, 5)
    assert torch.equal(read(outputs.movedim(1, -1), STRUCTURES), outputs)


def test_a_label_that_a_sigmoid_has_ruled_out_can_be_learnt_again() -> None:
    outputs = torch.tensor([[0.0, 1.0]]).requires_grad_()
    told = FINDINGS.model_copy(update={"scores": "probabilities"})
    loss = nn.functional.binary_cross_entropy_with_logits(read(outputs, told), torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()
    assert outputs.grad[0, 0] < 0 < outputs.grad[0, 1]


def test_several_labels_need_as_many_outputs() -> None:
    network = Logits(Says(drawn(2, 3, 6, 5)), STRUCTURES)
    with pytest.raises(StageFailed, match=r"puts out \[2, 3, 6, 5\], but the task needs \[2, 2, 6, 5\]"):
        checked_logits(network, IMAGES, torch.zeros(2, 2, 6, 5, dtype=torch.int64))


# ---------------------------------------------------------------- nothing is decided


def test_all_outputs_are_learnt_where_nothing_is_decided() -> None:
    class Detector(nn.Module):
        def forward(self, inputs: torch.Tensor) -> dict[str, object]:
            return {"boxes": drawn(2, 4), "scores": [drawn(2, 1), drawn(2, 2)], "count": torch.ones(2).int()}

    found = AllOutputs(Detector())(IMAGES)
    assert [list(output.shape) for output in found] == [[2, 4], [2, 1], [2, 2]]
    check_same_shapes(found, found)
    with pytest.raises(StageFailed, match="its teacher") as caught:
        check_same_shapes(found, found[:2])
    assert caught.value.code == "output_mismatch"
