"""Metrics agree with what can be worked out by hand; what is not defined is left out, never invented."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from sklearn.metrics import (
    balanced_accuracy_score,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
)

from shared.errors import EvaluationEmpty, StageFailed
from shared.recipe import Task
from worker.data import Samples
from worker.evaluation.metrics import Evaluation, evaluate, probabilities
from worker.feed import Floats

ANIMALS = Task(kind="classification", classes=["cat", "dog", "owl"])
TISSUES = Task(kind="segmentation", classes=["air", "grey", "white"], background=0)
LESION = Task(kind="segmentation", classes=["healthy", "lesion"], background=0)


def samples_of(inputs: npt.NDArray[np.floating], targets: npt.NDArray[np.integer] | None = None) -> Samples:
    return Samples(
        "evaluation",
        len(inputs),
        lambda index: inputs[index].astype(np.float32),
        None if targets is None else lambda index: targets[index].astype(np.int64),
    )


def scores(decisions: npt.NDArray[np.integer], classes: int) -> Floats:
    """Logits whose argmax is the decision: (n, classes, ...)."""
    return np.moveaxis(10 * np.eye(classes, dtype=np.float32)[decisions], -1, 1)


ALL = ("hd95", "nsd")


def segmented(
    found: npt.NDArray[np.integer],
    truth: npt.NDArray[np.integer],
    task: Task = TISSUES,
    requested: Collection[str] = ALL,
) -> Evaluation:
    """Evaluate a model whose decisions are given, as its input."""
    samples = samples_of(found[:, None], truth)
    classes = len(task.classes)
    return evaluate(lambda inputs: scores(inputs[:, 0].astype(int), classes), samples, task, requested=requested)


# ---------------------------------------------------------------- classification


def classified(outputs: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], task: Task = ANIMALS) -> Evaluation:
    return evaluate(lambda inputs: inputs, samples_of(outputs, labels), task, batch=4)


def test_top1_is_the_share_of_right_decisions_also_by_class_and_sample() -> None:
    labels = np.array([0, 0, 1, 1, 1, 2])
    found = classified(scores(np.array([0, 1, 1, 1, 0, 2]), 3), labels)
    assert found.means["top1"] == pytest.approx(4 / 6)
    assert [found.by_class[name]["top1"] for name in ANIMALS.classes] == pytest.approx([1 / 2, 2 / 3, 1])
    assert found.scores["top1"].tolist() == [1, 0, 1, 1, 0, 1]


@pytest.fixture(scope="module")
def guessed() -> tuple[Floats, npt.NDArray[np.integer], Evaluation]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    outputs = (np.eye(3)[labels] + rng.normal(size=(200, 3))).round(1).astype(np.float32)  # rounded: with ties
    return outputs, labels, classified(outputs, labels)


def test_auroc_agrees_with_another_library(guessed: tuple[Floats, npt.NDArray[np.integer], Evaluation]) -> None:
    outputs, labels, found = guessed
    expected = [roc_auc_score(labels == index, probabilities(outputs)[:, index]) for index in range(3)]
    assert [found.by_class[name]["auroc"] for name in ANIMALS.classes] == pytest.approx(expected, abs=1e-6)
    assert found.means["auroc"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_metrics_of_decisions_agree_with_another_library(
    guessed: tuple[Floats, npt.NDArray[np.integer], Evaluation],
) -> None:
    outputs, labels, found = guessed
    decided = outputs.argmax(axis=1)
    assert found.means["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, decided))
    assert found.means["macro_f1"] == pytest.approx(f1_score(labels, decided, average="macro"))
    assert found.means["kappa"] == pytest.approx(cohen_kappa_score(labels, decided))
    owls, given = labels == 2, decided == 2
    assert found.by_class["owl"]["sensitivity"] == pytest.approx(given[owls].mean())
    assert found.by_class["owl"]["specificity"] == pytest.approx(1 - given[~owls].mean())
    assert "kappa" not in found.by_class["owl"]


def test_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    sure = np.array([[0.9, 0.1, 0.0]] * 4 + [[0.5, 0.25, 0.25]] * 4, dtype=np.float32)
    labels = np.array([0, 0, 0, 1, 0, 0, 1, 2])  # right: 3 of 4 at .9, 2 of 4 at .5
    assert classified(sure, labels).means["ece"] == pytest.approx((0.15 + 0.0) / 2, abs=1e-6)


def test_a_class_without_samples_is_not_in_the_mean() -> None:
    labels = np.array([0, 1, 0, 1])
    found = classified(scores(labels, 3), labels)
    assert found.by_class["owl"] == {"specificity": 1.0}
    assert (found.means["top1"], found.means["auroc"], found.means["sensitivity"]) == (1, 1, 1)


def test_an_auroc_of_one_class_alone_is_left_out() -> None:
    found = classified(scores(np.zeros(3, dtype=int), 3), np.zeros(3, dtype=int))
    assert found.means["top1"] == 1.0
    assert not {"auroc", "kappa"} & set(found.means)
    assert "auroc" not in found.by_class["cat"]


def test_outputs_that_are_probabilities_are_not_squeezed_again() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    once = probabilities(logits)
    np.testing.assert_allclose(once.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(probabilities(once), once)


# ---------------------------------------------------------------- segmentation


def square(*corners: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> npt.NDArray[np.integer]:
    """One mask an entry (row, column, side), of class 1; a side of 0 is an empty mask."""
    masks = np.zeros((len(corners), *size), dtype=int)
    for mask, (row, column, side) in zip(masks, corners, strict=True):
        mask[row : row + side, column : column + side] = 1
    return masks


def test_dice_and_iou_of_a_known_overlap() -> None:
    found = segmented(square((2, 0, 4)), square((0, 0, 4)), LESION)
    assert found.by_class["lesion"]["dice"] == pytest.approx(2 * 8 / 32)
    assert found.by_class["lesion"]["iou"] == pytest.approx(8 / 24)
    assert found.means["dice"] == found.by_class["lesion"]["dice"]  # the background is not in the mean


def test_an_invented_and_a_missed_lesion_cost_and_a_rightly_empty_mask_counts() -> None:
    truth, decided = square((0, 0, 0), (0, 0, 0), (2, 2, 3)), square((0, 0, 0), (2, 2, 3), (0, 0, 0))
    found = segmented(decided, truth, LESION)
    diagonal = math.sqrt(128)
    assert found.scores["dice"].tolist() == [1, 0, 0]
    assert found.scores["iou"].tolist() == [1, 0, 0]
    assert found.scores["nsd"].tolist() == [1, 0, 0]
    assert found.scores["hd95"] == pytest.approx([0, diagonal, diagonal])
    assert found.means["dice"] == pytest.approx(1 / 3)


def test_hd95_of_a_shifted_square_is_the_shift() -> None:
    found = segmented(square((11, 8, 8), size=(32, 32)), square((8, 8, 8), size=(32, 32)), LESION)
    assert found.means["hd95"] == pytest.approx(3)
    assert "hd95" not in found.by_class["healthy"]


def test_distances_are_in_millimetres_where_the_spacing_is_known() -> None:
    task = LESION.model_copy(update={"spacing": [2.0, 0.5]})
    masks = square((8, 8, 8), size=(32, 32))
    assert segmented(np.roll(masks, 3, axis=1), masks, task).means["hd95"] == pytest.approx(6)
    assert segmented(np.roll(masks, 3, axis=2), masks, task).means["hd95"] == pytest.approx(1.5)
    missed = segmented(0 * masks, masks, task).means["hd95"]
    assert missed == pytest.approx(math.hypot(64, 16))


def test_a_spacing_of_other_axes_than_the_masks_is_refused() -> None:
    task = LESION.model_copy(update={"spacing": [1.0, 1.0, 3.0]})
    with pytest.raises(StageFailed, match="3 values, but the masks have 2 axes"):
        segmented(square((0, 0, 2)), square((0, 0, 2)), task)


def test_surfaces_within_the_tolerance_are_one() -> None:
    masks = square((8, 8, 8), size=(32, 32))
    shifted = np.roll(masks, 2, axis=1)
    by_tolerance = {
        tolerance: segmented(shifted, masks, LESION.model_copy(update={"surface_tolerance": tolerance})).means["nsd"]
        for tolerance in (1.0, 2.0)
    }
    # of each surface's 28 pixels, a side of 8 is 2 away, and 2 of the next row's are 1 away
    assert by_tolerance[2.0] == 1
    assert 0.5 < by_tolerance[1.0] < 1


def test_surface_distances_agree_with_another_library() -> None:
    rng = np.random.default_rng(0)
    truth, decided = (np.kron(rng.integers(0, 3, (4, 5, 6)), np.ones((5, 5), dtype=int)) for _ in range(2))
    one_hot = [torch.from_numpy(np.moveaxis(np.eye(3)[masks], -1, 1)) for masks in (decided, truth)]
    found = segmented(decided, truth)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        expected = compute_hausdorff_distance(*one_hot, percentile=95).mean(dim=0)
        overlap = compute_surface_dice(*one_hot, class_thresholds=[1.0, 1.0]).mean(dim=0)
    assert [found.by_class[name]["hd95"] for name in ("grey", "white")] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [found.by_class[name]["nsd"] for name in ("grey", "white")] == pytest.approx(overlap.tolist(), abs=1e-5)


def test_surfaces_are_measured_on_request_alone() -> None:
    masks = square((0, 0, 4))
    assert set(segmented(masks, masks, requested=()).means) == {"dice", "iou"}
    assert set(segmented(masks, masks, requested=["nsd"]).scores) == {"dice", "iou", "nsd"}


def test_without_a_background_every_class_counts() -> None:
    task = Task(kind="segmentation", classes=["left", "right"])
    truth = square((0, 0, 0))
    truth[0, :, 4:] = 1
    found = segmented(truth, truth, task)
    assert found.means == {"dice": 1.0, "iou": 1.0, "hd95": 0.0, "nsd": 1.0}
    assert found.by_class["left"]["hd95"] == 0.0


def test_scores_are_the_same_whatever_the_batch() -> None:
    rng = np.random.default_rng(0)
    truth, decided = rng.integers(0, 3, (7, 8, 8)), rng.integers(0, 3, (7, 8, 8))
    samples = samples_of(decided[:, None], truth)
    one, three = (
        evaluate(lambda inputs: scores(inputs[:, 0].astype(int), 3), samples, TISSUES, batch=batch) for batch in (1, 3)
    )
    assert one.means == three.means
    assert one.scores["dice"].tolist() == three.scores["dice"].tolist()
    assert one.means["dice"] == pytest.approx(one.scores["dice"].mean())


def test_sixty_slices_are_evaluated_in_a_fraction_of_a_second() -> None:
    rng = np.random.default_rng(0)
    task = Task(kind="segmentation", classes=["air", "other", "grey", "white"], background=0)
    truth = np.kron(rng.integers(0, 4, (60, 12, 14)), np.ones((8, 8), dtype=int))  # (60, 96, 112)
    outputs = scores(np.roll(truth, 2, axis=1), 4)
    begin = time.process_time()
    evaluate(lambda inputs: inputs, samples_of(outputs, truth), task)
    assert time.process_time() - begin < 0.5
    begin = time.process_time()
    evaluate(lambda inputs: inputs, samples_of(outputs, truth), task, requested=ALL)
    assert time.process_time() - begin < 2


# ---------------------------------------------------------------- multilabel

FINDINGS = Task(kind="multilabel", classes=["nodule", "effusion"])
ORGANS = Task(kind="multilabel", classes=["organ", "lesion"], per="voxel")


def test_labels_of_an_image_are_independent() -> None:
    labels = np.array([[1, 1], [0, 0], [1, 0], [0, 1]])
    logits = np.array([[2.0, 1.0], [-1.0, 3.0], [-0.5, -2.0], [-3.0, 4.0]])
    found = classified(logits, labels, FINDINGS)
    assert found.by_class["nodule"]["sensitivity"] == 0.5
    assert found.by_class["nodule"]["specificity"] == 1
    assert found.by_class["nodule"]["balanced_accuracy"] == 0.75
    assert found.by_class["effusion"]["macro_f1"] == pytest.approx(4 / 5)
    assert found.by_class["nodule"]["auroc"] == roc_auc_score(labels[:, 0], logits[:, 0])
    assert found.means["sensitivity"] == 0.75
    assert "top1" not in found.means
    assert found.scores == {}


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_each_label_has_its_own_threshold(kind: Literal["logits", "probabilities"]) -> None:
    chances = np.array([[0.3, 0.3], [0.1, 0.1]])
    task = FINDINGS.model_copy(update={"thresholds": [0.2, 0.4], "scores": kind})
    outputs = np.log(chances / (1 - chances)) if kind == "logits" else chances
    found = classified(outputs, np.array([[1, 1], [0, 0]]), task)
    assert [found.by_class[name]["sensitivity"] for name in FINDINGS.classes] == [1, 0]


def test_calibration_error_of_a_label_is_that_of_its_probability() -> None:
    task = Task(kind="multilabel", classes=["nodule"], scores="probabilities")
    found = classified(np.array([[0.7], [0.7], [0.7], [0.7]]), np.array([[1], [1], [0], [0]]), task)
    assert found.means["ece"] == pytest.approx(0.2, abs=1e-6)


def test_structures_may_overlap() -> None:
    truth = np.zeros((2, 2, 6, 6), dtype=int)
    truth[:, 0, :4, :4] = 1  # the organ
    truth[0, 1, 1:3, 1:3] = 1  # a lesion inside it, in the first image
    decided = truth.copy()
    decided[1, 1, 0, 0] = 1  # a lesion that is none
    logits = np.where(decided == 1, 3.0, -3.0)
    samples = samples_of(logits, truth)
    for run in (lambda inputs: inputs, lambda inputs: np.moveaxis(inputs, 1, -1)):
        found = evaluate(run, samples, ORGANS, requested=ALL)
        assert found.by_class["organ"] == {"dice": 1.0, "iou": 1.0, "hd95": 0.0, "nsd": 1.0}
        assert found.by_class["lesion"]["dice"] == 0.5
        assert found.scores["dice"].tolist() == [1, 0.5]


def test_labels_given_as_probabilities_are_no_logits() -> None:
    with pytest.raises(StageFailed, match=r"lie between 0\.1 and 0\.9, as probabilities do; the task says logits"):
        classified(np.array([[0.1, 0.9], [0.9, 0.2]]), np.array([[0, 1], [1, 0]]), FINDINGS)


# ---------------------------------------------------------------- where the classes lie

SIGNS = Task(kind="classification", classes=["absent", "present"])


def test_classes_may_come_last() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (4, 8, 9))
    expected = segmented(np.roll(truth, 1, axis=2), truth, requested=())
    samples = samples_of(np.roll(truth, 1, axis=2)[..., None], truth)
    channels_last = evaluate(lambda inputs: np.moveaxis(scores(inputs[..., 0].astype(int), 3), 1, -1), samples, TISSUES)
    assert channels_last.means == expected.means
    assert channels_last.by_class == expected.by_class


@pytest.mark.parametrize("shape", [(-1, 1, 6, 6), (-1, 6, 6, 1), (-1, 6, 6)])
@pytest.mark.parametrize("said", ["logits", "probabilities"])
def test_one_channel_tells_two_classes(shape: tuple[int, ...], said: Literal["logits", "probabilities"]) -> None:
    truth = np.random.default_rng(0).integers(0, 2, (4, 6, 6))
    truth[0] = 0  # a batch with nothing in it
    logits = np.where(truth == 1, 3.0, -3.0)
    given = logits if said == "logits" else 1 / (1 + np.exp(-logits))
    task = LESION.model_copy(update={"scores": said})
    samples = samples_of(given[:, None], truth)
    found = evaluate(lambda inputs: inputs.reshape(shape), samples, task, requested=["hd95"], batch=1)
    assert (found.means["dice"], found.means["hd95"]) == (1, 0)


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_one_output_classifies_two_classes(shape: tuple[int, ...]) -> None:
    labels = np.array([0, 0, 1, 1, 1])
    logits = np.array([-2.0, 0.5, 0.25, 3.0, 1.0])
    found = evaluate(lambda inputs: inputs.reshape(shape), samples_of(logits[:, None], labels), SIGNS, batch=2)
    assert found.means["top1"] == pytest.approx(4 / 5)
    assert found.means["auroc"] == pytest.approx(roc_auc_score(labels, logits))


@pytest.mark.parametrize(("said", "values"), [("logits", [0.1, 0.9]), ("probabilities", [-1.0, 0.9])])
def test_scores_of_the_other_kind_than_the_task_says_are_refused(said: str, values: list[float]) -> None:
    task = SIGNS.model_copy(update={"scores": said})
    other = "logits" if said == "probabilities" else "probabilities"
    with pytest.raises(StageFailed, match=f"the task says {said}") as refused:
        evaluate(lambda inputs: inputs, samples_of(np.array(values)[:, None], np.array([0, 1])), task)
    assert f'"scores": "{other}"' in (refused.value.hint or "")


def test_a_raw_task_has_no_metrics_and_runs_nothing() -> None:
    def never(_: object) -> Floats:
        raise AssertionError("there is nothing to evaluate")

    assert evaluate(never, samples_of(np.zeros((2, 1, 2, 2))), Task(kind="raw")) == Evaluation()


def test_the_distance_in_a_volume_is_in_voxels() -> None:
    truth = np.zeros((1, 12, 12, 12), dtype=int)
    truth[0, 2:5, 4:8, 4:8] = 1
    assert segmented(np.roll(truth, 3, axis=1), truth, LESION).means["hd95"] == 3
    missed = segmented(np.zeros_like(truth), truth, LESION)
    assert missed.means["hd95"] == pytest.approx(math.sqrt(3 * 12**2))


# ---------------------------------------------------------------- bad outputs


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 1), (3, 3)])
def test_outputs_of_another_shape_are_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    samples = samples_of(np.zeros((2, 3)), np.array([0, 1]))
    with pytest.raises(StageFailed, match=r"needs \[2, 3\]") as refused:
        evaluate(lambda inputs: np.zeros(shape, dtype=np.float32), samples, ANIMALS)
    assert refused.value.code == "output_mismatch"


def test_masks_of_another_size_than_the_outputs_are_refused() -> None:
    samples = samples_of(np.zeros((2, 1, 8, 8)), np.zeros((2, 8, 8), dtype=int))
    with pytest.raises(StageFailed, match=r"needs \[2, 3, 8, 8\]"):
        evaluate(lambda inputs: np.zeros((2, 3, 4, 4), dtype=np.float32), samples, TISSUES)


def test_an_empty_evaluation_is_refused() -> None:
    with pytest.raises(EvaluationEmpty):
        evaluate(lambda inputs: inputs, samples_of(np.zeros((0, 3)), np.zeros(0, dtype=int)), ANIMALS)
