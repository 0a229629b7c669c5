"""The leading metric on what training keeps out, against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shared.recipe import Task
from worker.data import Samples
from worker.material import Material
from worker.validation import closeness, scores_by_sample, validate

CPU = torch.device("cpu")


def material(inputs: Any, targets: Any) -> Material:
    """Samples whose images are the logits that `as_they_are` puts out."""
    found = np.asarray(inputs, dtype=np.float32)
    truth = None if targets is None else np.asarray(targets)
    read_target = None if truth is None else lambda index: truth[index]
    return Material(Samples("train", len(found), lambda index: found[index], read_target), range(len(found)))


def as_they_are(inputs: torch.Tensor) -> torch.Tensor:
    return inputs


def test_images_are_scored_by_right_decisions() -> None:
    task = Task(kind="classification", classes=["a", "b", "c"])
    kept_out = material([[3, 0, 1], [0, 1, 2], [1, 5, 0]], [0, 1, 1])
    assert validate(as_they_are, kept_out, task, 2, CPU) == pytest.approx(2 / 3)
    assert scores_by_sample(as_they_are, kept_out, task, 2, CPU) == [1.0, 0.0, 1.0]


def test_masks_are_scored_by_dice_without_the_background_and_an_invented_structure_costs() -> None:
    task = Task(kind="segmentation", classes=["air", "liver", "tumour"], background=0)
    truth = np.array([[[0, 1], [1, 1]], [[0, 0], [1, 1]]])
    found = np.array([[[0, 1], [1, 0]], [[0, 2], [1, 1]]])
    logits = np.moveaxis(np.eye(3)[found], -1, 1)  # (n, classes, H, W)
    kept_out = material(logits, truth)
    # liver .8 and 1; tumour: in neither 1, invented 0
    assert scores_by_sample(as_they_are, kept_out, task, 1, CPU) == pytest.approx([(0.8 + 1) / 2, (1 + 0) / 2])
    assert validate(as_they_are, kept_out, task, 2, CPU) == pytest.approx((0.8 + 1 + 1 + 0) / 4)


def test_overlapping_structures_are_scored_by_dice_above_their_thresholds() -> None:
    truth = np.array([[[[1, 1]], [[0, 1]]]])  # (1, labels, 1, 2)
    logits = np.array([[[[2.0, 1.0]], [[1.0, 2.0]]]])
    task = Task(kind="multilabel", per="voxel", classes=["liver", "tumour"])
    assert validate(as_they_are, material(logits, truth), task, 1, CPU) == pytest.approx((1 + 2 / 3) / 2)
    strict = task.model_copy(update={"thresholds": [0.5, 0.8]})  # a logit of 1 is .73
    assert validate(as_they_are, material(logits, truth), strict, 1, CPU) == pytest.approx(1.0)


def test_several_labels_of_images_are_scored_by_the_area_under_their_curves() -> None:
    task = Task(kind="multilabel", classes=["nodule", "fluid", "never"])
    logits = [[3, 1, 0], [2, 0, 0], [2, 2, 0], [0, 3, 0]]
    labels = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]
    # nodule: 3 > 2, 3 > 0, 2 = 2, 2 > 0; fluid: 0 < 1, 0 < 3, 2 > 1, 2 < 3; of the third there is none
    expected = (3.5 / 4 + 1 / 4) / 2
    assert validate(as_they_are, material(logits, labels), task, 3, CPU) == pytest.approx(expected)
    assert scores_by_sample(as_they_are, material(logits, labels), task, 3, CPU)[0] == pytest.approx(2 / 3)


def test_outputs_that_are_no_numbers_are_reported() -> None:
    task = Task(kind="classification", classes=["a", "b"])
    found = validate(lambda inputs: inputs * torch.nan, material([[1, 2]], [0]), task, 1, CPU)
    assert found is not None
    assert np.isnan(found)


def test_closeness_is_that_of_the_worst_output() -> None:
    kept_out = material([[3.0, 4.0], [0.0, 0.0]], None)

    def student(inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inputs, inputs * 0.9

    def teacher(inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inputs, inputs

    assert closeness(student, teacher, kept_out, 1, CPU) == pytest.approx(0.9)
    assert closeness(teacher, teacher, kept_out, 2, CPU) == 1.0
