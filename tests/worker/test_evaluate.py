"""Metrics agree with what can be worked out by hand; what is not defined is left out, never invented."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from shared.errors import EvaluationEmpty, StageFailed
from shared.recipe import Task
from worker.data import Samples
from worker.evaluate import (
    PARITY_SAMPLES,
    evaluate,
    hold,
    keep_reference,
    parity,
    parity_inputs,
    probabilities,
    run_in_batches,
)
from worker.feed import Floats, Inputs

ANIMALS = Task(kind="classification", classes=["cat", "dog", "owl"])
TISSUES = Task(kind="segmentation", classes=["air", "grey", "white"], background=0)


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


def segmented(found: npt.NDArray[np.integer], truth: npt.NDArray[np.integer], task: Task = TISSUES):  # type: ignore[no-untyped-def]
    """Evaluate a model whose decisions are given, as its input."""
    samples = samples_of(found[:, None], truth)
    return evaluate(lambda inputs: scores(inputs[:, 0].astype(int), len(task.classes)), samples, task)


# ---------------------------------------------------------------- classification


def test_top1_is_the_share_of_right_decisions_also_by_class() -> None:
    labels = np.array([0, 0, 1, 1, 1, 2])
    outputs = scores(np.array([0, 1, 1, 1, 0, 2]), 3)
    metrics, by_class = evaluate(lambda inputs: inputs, samples_of(outputs, labels), ANIMALS, batch=4)
    assert metrics["top1"] == pytest.approx(4 / 6)
    assert [by_class[name]["top1"] for name in ANIMALS.classes] == pytest.approx([1 / 2, 2 / 3, 1])


def test_auroc_agrees_with_another_library() -> None:
    rng = np.random.default_rng(0)
    labels, outputs = rng.integers(0, 3, 200), rng.normal(size=(200, 3)).astype(np.float32)
    metrics, by_class = evaluate(lambda inputs: inputs, samples_of(outputs, labels), ANIMALS)
    expected = [roc_auc_score(labels == index, probabilities(outputs)[:, index]) for index in range(3)]
    assert [by_class[name]["auroc"] for name in ANIMALS.classes] == pytest.approx(expected, abs=1e-5)
    assert metrics["auroc"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_class_without_samples_has_no_metrics_and_is_not_in_the_mean() -> None:
    labels = np.array([0, 1, 0, 1])
    metrics, by_class = evaluate(lambda inputs: inputs, samples_of(scores(labels, 3), labels), ANIMALS)
    assert by_class["owl"] == {}
    assert metrics == {"top1": 1.0, "auroc": 1.0}


def test_an_auroc_of_one_class_alone_is_left_out() -> None:
    labels = np.zeros(3, dtype=int)
    metrics, by_class = evaluate(lambda inputs: inputs, samples_of(scores(labels, 3), labels), ANIMALS)
    assert metrics == {"top1": 1.0}
    assert by_class["cat"] == {"top1": 1.0}


def test_outputs_that_are_probabilities_are_not_squeezed_again() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    once = probabilities(logits)
    np.testing.assert_allclose(once.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(probabilities(once), once)


# ---------------------------------------------------------------- segmentation


def test_dice_and_iou_of_a_known_overlap() -> None:
    truth = np.zeros((1, 8, 8), dtype=int)
    truth[0, :4, :4] = 1  # 16 pixels
    found = np.zeros_like(truth)
    found[0, 2:6, :4] = 1  # 16 pixels, 8 of them right
    metrics, by_class = segmented(found, truth)
    assert by_class["grey"]["dice"] == pytest.approx(2 * 8 / 32)
    assert by_class["grey"]["iou"] == pytest.approx(8 / 24)
    assert by_class["white"] == {}
    assert metrics["dice"] == by_class["grey"]["dice"]  # the background and what is nowhere are not in the mean


def test_hd95_of_a_shifted_square_is_the_shift() -> None:
    truth = np.zeros((1, 32, 32), dtype=int)
    truth[0, 8:16, 8:16] = 1
    metrics, by_class = segmented(np.roll(truth, 3, axis=1), truth)
    assert metrics["hd95"] == pytest.approx(3)
    assert "hd95" not in by_class["air"]


def test_a_class_that_the_model_misses_altogether_counts_the_diagonal() -> None:
    truth = np.zeros((2, 30, 40), dtype=int)
    truth[:, 5:10, 5:10] = 1
    found = truth.copy()
    found[1] = 0
    metrics, _ = segmented(found, truth)
    assert metrics["hd95"] == pytest.approx((0 + 50) / 2)
    assert metrics["dice"] == pytest.approx((1 + 0) / 2)


def test_an_evaluation_without_any_foreground_has_no_means() -> None:
    empty = np.zeros((2, 8, 8), dtype=int)
    metrics, by_class = segmented(empty, empty)
    assert metrics == {}
    assert by_class["air"] == {"dice": 1.0, "iou": 1.0}


def test_without_a_background_every_class_counts() -> None:
    task = Task(kind="segmentation", classes=["left", "right"])
    truth = np.zeros((1, 8, 8), dtype=int)
    truth[0, :, 4:] = 1
    metrics, by_class = segmented(truth, truth, task)
    assert metrics == {"dice": 1.0, "iou": 1.0, "hd95": 0.0}
    assert by_class["left"]["hd95"] == 0.0


def test_perfect_decisions_have_perfect_metrics_whatever_the_batch() -> None:
    truth = np.random.default_rng(0).integers(0, 3, (7, 8, 8))
    metrics, _ = segmented(truth, truth)
    assert metrics == {"dice": 1.0, "iou": 1.0, "hd95": 0.0}


def test_sixty_slices_are_evaluated_within_two_seconds() -> None:
    rng = np.random.default_rng(0)
    task = Task(kind="segmentation", classes=["air", "other", "grey", "white"], background=0)
    truth = np.kron(rng.integers(0, 4, (60, 12, 14)), np.ones((8, 8), dtype=int))  # (60, 96, 112)
    segmented(truth[:1], truth[:1], task)
    begin = time.process_time()
    segmented(np.roll(truth, 2, axis=1), truth, task)
    assert time.process_time() - begin < 2


# ---------------------------------------------------------------- where the classes lie

SIGNS = Task(kind="classification", classes=["absent", "present"])
LESION = Task(kind="segmentation", classes=["healthy", "lesion"], background=0)


def test_classes_may_come_last() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (4, 8, 9))
    expected = segmented(np.roll(truth, 1, axis=2), truth)
    samples = samples_of(np.roll(truth, 1, axis=2)[..., None], truth)
    channels_last = evaluate(lambda inputs: np.moveaxis(scores(inputs[..., 0].astype(int), 3), 1, -1), samples, TISSUES)
    assert channels_last == expected


@pytest.mark.parametrize("shape", [(-1, 1, 6, 6), (-1, 6, 6, 1), (-1, 6, 6)])
@pytest.mark.parametrize("said", ["logits", "probabilities"])
def test_one_channel_tells_two_classes(shape: tuple[int, ...], said: Literal["logits", "probabilities"]) -> None:
    truth = np.random.default_rng(0).integers(0, 2, (4, 6, 6))
    truth[0] = 0  # a batch with nothing in it
    logits = np.where(truth == 1, 3.0, -3.0)
    given = logits if said == "logits" else 1 / (1 + np.exp(-logits))
    task = LESION.model_copy(update={"scores": said})
    metrics, _ = evaluate(lambda inputs: inputs.reshape(shape), samples_of(given[:, None], truth), task, batch=1)
    assert (metrics["dice"], metrics["hd95"]) == (1, 0)


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_one_output_classifies_two_classes(shape: tuple[int, ...]) -> None:
    labels = np.array([0, 0, 1, 1, 1])
    logits = np.array([-2.0, 0.5, 0.25, 3.0, 1.0])
    metrics, _ = evaluate(lambda inputs: inputs.reshape(shape), samples_of(logits[:, None], labels), SIGNS, batch=2)
    assert metrics["top1"] == pytest.approx(4 / 5)
    assert metrics["auroc"] == pytest.approx(roc_auc_score(labels, logits))


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

    assert evaluate(never, samples_of(np.zeros((2, 1, 2, 2))), Task(kind="raw")) == ({}, {})


def test_the_distance_in_a_volume_is_in_voxels() -> None:
    truth = np.zeros((1, 12, 12, 12), dtype=int)
    truth[0, 2:5, 4:8, 4:8] = 1
    metrics, _ = segmented(np.roll(truth, 3, axis=1), truth, LESION)
    assert metrics["hd95"] == 3
    missed, _ = segmented(np.zeros_like(truth), truth, LESION)
    assert missed["hd95"] == pytest.approx(math.sqrt(3 * 12**2))


def test_agreement_is_of_decisions_wherever_the_classes_lie() -> None:
    first = scores(np.array([[[0, 1], [2, 2]]]), 3)  # (1, 3, 2, 2)
    second = scores(np.array([[[0, 1], [2, 0]]]), 3)
    last = [np.ascontiguousarray(np.moveaxis(one, 1, -1)) for one in (first, second)]
    assert parity(first, second, 1, TISSUES).agreement_ratio == 0.75
    assert parity(*last, 1, TISSUES).agreement_ratio == 0.75
    one_channel = np.array([[-1.0], [2.0], [0.5], [-3.0]], dtype=np.float32)
    assert parity(one_channel, -one_channel, 9, SIGNS).agreement_ratio == 0
    assert parity(one_channel, one_channel * 2, 9, SIGNS).agreement_ratio == 1
    flat = np.ones(4, dtype=np.float32)
    assert parity(flat, flat, 1, Task(kind="raw")).passed


# ---------------------------------------------------------------- several outputs


class TwoHeads:
    """A runner of two outputs: the images times two, and their means times `slope`."""

    engine, precision, threads = "heads", "fp32", 1
    versions: ClassVar[dict[str, str]] = {}

    def __init__(self, slope: float) -> None:
        self.slope = np.float32(slope)

    def run(self, inputs: Inputs) -> Floats:
        return self.run_all(inputs)[0]

    def run_all(self, inputs: Inputs) -> list[Floats]:
        assert isinstance(inputs, np.ndarray)
        return [inputs * 2, inputs.mean(axis=(1, 2, 3))[:, None] * self.slope]


def test_every_output_is_held_and_the_worst_is_told(tmp_path: Path) -> None:
    samples, raw = samples_of(np.arange(20.0).reshape(20, 1, 1, 1)), Task(kind="raw")
    keep_reference(TwoHeads(1), samples, tmp_path / "reference.npy")
    assert hold(TwoHeads(1), samples, tmp_path / "reference.npy", 0.1, raw).max_abs_error == 0
    worse = hold(TwoHeads(1.5), samples, tmp_path / "reference.npy", 0.1, raw)
    assert not worse.passed
    assert worse.relative_error == pytest.approx(0.5)
    assert worse.samples == PARITY_SAMPLES


def test_another_number_of_outputs_is_no_parity(tmp_path: Path) -> None:
    samples = samples_of(np.zeros((2, 1, 1, 1)))
    np.save(tmp_path / "reference.npy", np.zeros((2, 1, 1, 1), dtype=np.float32))
    with pytest.raises(StageFailed, match="has 2 outputs, the source model 1"):
        hold(TwoHeads(1), samples, tmp_path / "reference.npy", 0.1, Task(kind="raw"))


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


# ---------------------------------------------------------------- parity


def test_parity_is_relative_to_the_largest_output() -> None:
    reference = np.array([[1.0, -8.0], [2.0, 3.0]], dtype=np.float32)
    found = parity(reference, reference + np.float32(0.4), tolerance=0.06)
    assert found.samples == 2
    assert found.max_abs_error == pytest.approx(0.4, abs=1e-6)
    assert found.relative_error == pytest.approx(0.05, abs=1e-6)
    assert found.agreement_ratio == 1.0
    assert found.passed
    assert not parity(reference, reference + np.float32(0.4), tolerance=0.04).passed


def test_agreement_is_the_share_of_equal_decisions() -> None:
    reference = scores(np.zeros((1, 2, 2), dtype=int), 3)
    outputs = scores(np.array([[[0, 0], [0, 2]]]), 3)
    assert parity(reference, outputs, tolerance=1).agreement_ratio == 0.75


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_never_pass(value: float) -> None:
    reference, outputs = np.ones((1, 2), dtype=np.float32), np.array([[1, value]], dtype=np.float32)
    found = parity(reference, outputs, tolerance=1)
    assert not found.passed
    assert math.isfinite(found.relative_error)
    assert found.model_dump_json()


def test_a_baseline_of_zeros_is_only_matched_by_zeros() -> None:
    zeros = np.zeros((1, 2), dtype=np.float32)
    assert parity(zeros, zeros, tolerance=0.1).passed
    assert not parity(zeros, zeros + 1, tolerance=0.1).passed


def test_parity_needs_one_shape() -> None:
    with pytest.raises(StageFailed, match="the baseline's"):
        parity(np.zeros((1, 2), dtype=np.float32), np.zeros((1, 3), dtype=np.float32), tolerance=1)


def test_parity_is_held_on_samples_of_the_whole_part() -> None:
    inputs = parity_inputs(samples_of(np.arange(64.0).reshape(64, 1, 1, 1)))
    np.testing.assert_array_equal(inputs.ravel(), np.arange(0, 64, 64 / PARITY_SAMPLES))
    np.testing.assert_array_equal(run_in_batches(lambda batch: batch * 2, inputs, batch=5), inputs * 2)
