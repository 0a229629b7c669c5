"""Good int8 passes, broken engines do not, and what an output is depends on the reference alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from shared.errors import StageFailed
from shared.evidence import CLOPPER_PEARSON
from shared.recipe import Goal, Task
from shared.report import Bound, OutputAgreement
from worker.data import Samples
from worker.evaluation.agreement import (
    CLOSE_RMS,
    MAX_GOAL_SAMPLES,
    MAX_GOAL_VALUES,
    MAX_SAMPLES,
    MAX_SMALL_SAMPLES,
    WORST_ERROR,
    Rule,
    agreement_of,
    as_metrics,
    bounds_of,
    compare,
    decisions,
    keep_reference,
    max_relative_error,
    relative_rms,
)
from worker.feed import Floats, Inputs

RAW = Task(kind="raw")
TISSUES = Task(kind="segmentation", classes=["air", "grey", "white"], background=0)
ANIMALS = Task(kind="classification", classes=["cat", "dog", "owl"])
RNG = np.random.default_rng(0)


def one(reference: npt.ArrayLike, outputs: npt.ArrayLike, task: Task = RAW, rule: Rule = "close") -> OutputAgreement:
    arrays = [np.asarray(values, dtype=np.float32) for values in (reference, outputs)]
    return agreement_of(arrays[:1], arrays[1:], task, rule).outputs[0]


def softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def blobs(sharpness: float = 8.0) -> npt.NDArray[np.floating]:
    """Logits (4, 3, 32, 32) of smooth regions."""
    rows, columns = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    shifts = RNG.uniform(0, 6, (4, 3, 1, 1))
    return sharpness * (np.sin(rows / 6 + shifts) + np.cos(columns / 7 + 2 * shifts))


# ---------------------------------------------------------------- relative RMS


def test_an_offset_gives_no_credit() -> None:
    reference = RNG.normal(0, 1, 1000)
    assert relative_rms(reference + 1000, reference + 1000.5) == pytest.approx(0.5, rel=0.05)
    assert relative_rms(reference, reference + 0.5) == pytest.approx(0.5, rel=0.05)


def test_a_sparse_map_is_judged_by_what_is_in_it() -> None:
    reference = np.zeros((1, 1, 100, 100))
    reference[0, 0, 50, 40:50] = 1
    assert relative_rms(reference, np.zeros_like(reference)) == pytest.approx(1, rel=0.01)


def test_a_reference_of_one_value_is_only_matched_by_it() -> None:
    zeros, ones = np.zeros((2, 3)), np.ones((2, 3))
    assert relative_rms(zeros, zeros) == 0
    assert relative_rms(zeros, zeros + 1e-6) == WORST_ERROR
    assert relative_rms(ones, ones * (1 + 1e-6)) < 0.01
    assert relative_rms(ones, ones * 2) > 1


# ---------------------------------------------------------------- what an output is


def test_probabilities_along_an_axis_are_decided_by_the_largest() -> None:
    chances = softmax(blobs())
    for reference in (chances, np.moveaxis(chances, 1, -1)):
        found = one(reference, reference)
        assert (found.kind, found.decisions, found.dice) == ("decisions", 1, 1)
    shifted = np.roll(chances, 4, axis=2)
    assert one(chances, shifted).decisions == pytest.approx((chances.argmax(1) == shifted.argmax(1)).mean())


def test_a_map_between_0_and_1_is_decided_at_a_half_and_its_sides_are_not_averaged() -> None:
    reference = np.zeros((2, 1, 40, 40))
    reference[:, :, 10:20, 10:20] = 0.9
    outputs = np.roll(reference, 5, axis=2)
    found = one(reference, outputs)
    assert found.kind == "decisions"
    assert found.decisions == pytest.approx(1 - 100 / 1600)
    assert found.dice == pytest.approx(0.5)  # of the positive side
    assert not found.passed


def test_whole_numbers_are_classes_themselves() -> None:
    reference = RNG.integers(0, 4, (16, 8, 8))
    assert one(reference, reference).decisions == 1
    assert one(reference, np.where(reference == 3, 2, reference)).dice < 0.9


def test_what_an_output_is_never_depends_on_what_is_compared() -> None:
    reference, outputs = RNG.normal(0, 1, (16, 4)), RNG.uniform(0, 1, (16, 4))
    assert one(reference, outputs).kind == "values"
    chances = softmax(RNG.normal(0, 1, (16, 4)))
    assert one(chances, 5 * chances - 1).kind == "decisions"


@pytest.mark.parametrize("last", [False, True])
def test_the_task_says_what_the_first_output_decides(last: bool) -> None:
    logits = blobs()
    placed = np.moveaxis(logits, 1, -1) if last else logits
    assert one(placed, placed, TISSUES).kind == "decisions"
    assert one(placed, placed).kind == "values"
    np.testing.assert_array_equal(decisions(placed.astype(np.float32), TISSUES), logits.argmax(axis=1))


def test_labels_are_decided_one_by_one() -> None:
    task = Task(kind="multilabel", classes=["organ", "lesion"], per="voxel")
    reference = np.where(RNG.random((2, 2, 8, 8)) < 0.3, 4.0, -4.0)
    flipped = reference.copy()
    flipped[0, 1] *= -1
    assert one(reference, reference, task).dice == 1
    assert one(reference, flipped, task).decisions == pytest.approx(0.75)


@pytest.mark.parametrize("last", [False, True])
def test_a_small_label_is_not_hidden_by_a_large_one(last: bool) -> None:
    task = Task(kind="multilabel", classes=["organ", "lesion"], per="voxel")
    reference = np.full((2, 2, 40, 40), -4.0)
    reference[:, 0, :30] = 4
    reference[:, 1, 2:5, 2:5] = 4
    outputs = reference.copy()
    outputs[:, 1] = -4
    if last:
        reference, outputs = np.moveaxis(reference, 1, -1), np.moveaxis(outputs, 1, -1)
    found = one(reference, outputs, task)
    assert found.dice == 0.5
    assert not found.passed


def test_one_label_may_have_no_axis() -> None:
    task = Task(kind="multilabel", classes=["nodule"])
    for shape in ((4,), (4, 1)):
        reference = np.array([-1.0, 2.0, 3.0, -2.0]).reshape(shape)
        assert one(reference, reference, task).decisions == 1
        assert one(reference, -reference, task).decisions == 0


# ---------------------------------------------------------------- close: no labels decide


def test_a_few_flipped_voxels_pass_though_the_largest_difference_is_large() -> None:
    chances = softmax(blobs(sharpness=40))
    outputs = chances.copy()
    outputs[:, :, 5, 5] = np.roll(outputs[:, :, 5, 5], 1, axis=1)
    found = one(chances, outputs, TISSUES)
    assert found.max_error > 0.9
    assert found.passed


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_noise_of_int8_passes_on_every_kind_of_output(noise: float) -> None:
    logits, points = blobs(), RNG.normal(30, 4, (16, 8))
    noisy = logits + noise * logits.std() * RNG.normal(0, 1, logits.shape)
    sigmoid = [1 / (1 + np.exp(-values)) for values in (logits, noisy)]
    assert one(logits, noisy, TISSUES).passed
    assert one(softmax(logits), softmax(noisy)).passed
    assert one(*sigmoid).passed
    assert one(points, points + noise * points.std() * RNG.normal(0, 1, points.shape)).passed


def test_noise_of_a_sixth_of_the_spread_is_refused_without_labels() -> None:
    """As symmetric int8 of the brain U-Net has in OpenVINO (.17): most decisions stay, and yet it is wrong."""
    logits = blobs(sharpness=4)
    noisy = logits + 0.17 * logits.std() * RNG.normal(0, 1, logits.shape)
    for task in (TISSUES, RAW):
        found = one(logits, noisy, task)
        assert not found.passed
        assert found.reason
    assert one(logits, noisy, TISSUES, "broken").passed  # with labels, the metric decides


def test_one_flipped_decision_of_a_saturated_softmax_passes_and_two_do_not() -> None:
    reference = np.eye(10)[RNG.integers(0, 10, 16)]
    outputs = reference.copy()
    outputs[0] = np.roll(outputs[0], 1)
    assert one(reference, outputs).passed
    outputs[1] = np.roll(outputs[1], 1)
    found = one(reference, outputs)
    assert not found.passed
    assert found.reason == "87.5 % of the decisions of output 0 equal the source model's; 90 % is accepted"


def test_lost_structures_are_refused_though_nearly_all_voxels_agree() -> None:
    reference = np.zeros((2, 1, 64, 64))
    reference[:, :, 30:36, 30:36] = 1
    outputs = reference * 0.6
    outputs[:, :, 33:] = 0
    found = one(reference, outputs)
    assert found.decisions > 0.99
    assert not found.passed


def test_values_that_differ_by_a_tenth_of_their_spread_are_the_limit() -> None:
    reference = RNG.normal(0, 1, 10_000)
    error = reference.std() * np.sign(RNG.normal(0, 1, 10_000))
    assert one(reference, reference + 0.99 * CLOSE_RMS * error).passed
    found = one(reference, reference + 1.01 * CLOSE_RMS * error)
    assert (
        found.reason
        == "output 0 differs from the source model's by an RMS error of 0.101 of its spread; 0.1 is accepted"
    )


# ---------------------------------------------------------------- broken: labels decide


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", ["broken", "close"])
@pytest.mark.parametrize("task", [RAW, ANIMALS])
def test_outputs_that_are_not_finite_never_pass(value: float, rule: Rule, task: Task) -> None:
    reference = RNG.normal(0, 1, (4, 3)).astype(np.float32)
    outputs = reference.copy()
    outputs[1, 1] = value
    found = agreement_of([reference], [outputs], task, rule)
    assert not found.passed
    assert found.reason == "output 0 has NaN or infinite values"
    assert found.model_dump_json()


def test_outputs_of_another_scale_are_not_broken_where_their_decisions_hold() -> None:
    logits = blobs()
    assert one(logits, 3 * logits, TISSUES, "broken").passed
    assert not one(logits, -logits, TISSUES, "broken").passed


def test_an_engine_that_says_one_constant_is_broken() -> None:
    reference = RNG.normal(5, 1, (16, 4))
    assert one(reference, reference + 0.5, RAW, "broken").passed
    assert not one(reference, np.full_like(reference, reference.mean()), RAW, "broken").passed
    logits = blobs()
    assert not one(logits, np.zeros_like(logits), TISSUES, "broken").passed
    assert not one(reference, np.zeros_like(reference), RAW, "broken").passed


# ---------------------------------------------------------------- several outputs, kept references


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


def images(count: int, side: int = 1) -> Samples:
    return Samples("evaluation", count, lambda index: np.full((1, side, side), index, dtype=np.float32), None)


def test_every_output_is_compared_and_the_worst_is_the_metric(tmp_path: Path) -> None:
    samples, path = images(20), tmp_path / "reference.npy"
    assert keep_reference(TwoHeads(1), samples, path)
    same = compare(TwoHeads(1), samples, path, RAW, "close")
    assert same.passed
    assert as_metrics(same) == {"rms_error": 0, "agreement": 1, "fidelity_dice": 1}
    worse = compare(TwoHeads(1.5), samples, path, RAW, "close")
    assert [output.passed for output in worse.outputs] == [True, False]
    assert as_metrics(worse)["rms_error"] == worse.outputs[1].rms_error > 0.5
    assert max_relative_error(path, TwoHeads(1.5), samples) == pytest.approx(0.5)


def test_small_outputs_are_compared_on_more_samples(tmp_path: Path) -> None:
    for side, expected in ((1, MAX_SMALL_SAMPLES), (70, MAX_SAMPLES)):
        samples, path = images(80, side), tmp_path / f"{side}.npy"
        keep_reference(TwoHeads(1), samples, path)
        assert compare(TwoHeads(1), samples, path, RAW, "close").samples == expected


def test_where_a_goal_is_of_agreement_as_many_samples_are_compared_as_their_outputs_allow(tmp_path: Path) -> None:
    goals = [Goal(metric="rms_error", kind="threshold", value=0.1)]
    for side, expected in ((1, MAX_GOAL_SAMPLES), (200, MAX_GOAL_VALUES // (200**2 + 1)), (3, 600)):
        samples, path = images(min(600, 2 * expected), side), tmp_path / f"{side}.npy"
        keep_reference(TwoHeads(1), samples, path, goals=goals)
        found = compare(TwoHeads(1), samples, path, RAW, "close").samples
        assert found == min(expected, MAX_GOAL_SAMPLES)


# ---------------------------------------------------------------- bounds


def bound_of(metric: str, found: OutputAgreement) -> Bound:
    return next(bound for bound in found.bounds if bound.metric == metric)


def test_the_bound_of_an_rms_error_holds_what_other_samples_would_show() -> None:
    """Of networks whose error varies from sample to sample; a bound may fail in one draw of twenty."""
    generator = np.random.default_rng(1)
    beyond = 0
    for _ in range(300):
        reference = generator.normal(0, 1, (40, 50))
        sizes = 0.1 * np.exp(generator.normal(0, 0.5, (40, 1)))
        found = one(reference, reference + sizes * generator.normal(0, 1, (40, 50)))
        true = 0.1 * np.exp(0.5**2)  # the root of the mean of squares that are log-normal
        beyond += bound_of("rms_error", found).bound < true
    assert beyond / 300 < 0.08


def test_the_bound_of_single_decisions_is_that_of_their_share() -> None:
    logits = softmax(RNG.normal(0, 4, (64, 3)))
    bound = bound_of("agreement", one(logits, logits, ANIMALS))
    assert (bound.value, bound.method) == (1, CLOPPER_PEARSON)
    assert bound.bound == pytest.approx(0.05 ** (1 / 64), abs=1e-4)


def test_maps_of_decisions_are_bounded_by_their_spread_over_the_samples() -> None:
    before = softmax(blobs())
    after = before.copy()
    after[0] = after[0][::-1]
    found = one(before, after, TISSUES, "broken")
    for name, value in (("agreement", found.decisions), ("fidelity_dice", found.dice)):
        assert bound_of(name, found).value == value
        assert bound_of(name, found).bound < value
    alike = one(before, before, TISSUES)
    assert {bound.bound for bound in alike.bounds} == {0.0, 1.0}


def test_samples_that_belong_together_count_as_one() -> None:
    """Ten patients of four samples each, of which one is wrong in all of his."""
    reference = RNG.normal(0, 1, (40, 5)).astype(np.float32)
    outputs = reference.copy()
    outputs[:4] += 0.5
    number = np.repeat(np.arange(10), 4)
    alone, together = (
        agreement_of([reference], [outputs], RAW, "broken", groups=groups).outputs[0] for groups in (None, number)
    )
    assert alone.rms_error == together.rms_error
    assert bound_of("rms_error", together).groups == 10
    assert bound_of("rms_error", together).bound > 1.2 * bound_of("rms_error", alone).bound
    logits = softmax(RNG.normal(0, 4, (40, 3)))
    grouped = agreement_of([logits], [logits], ANIMALS, "close", groups=number).outputs[0]
    assert bound_of("agreement", grouped).bound == pytest.approx(0.05 ** (1 / 10), abs=1e-4)


def test_a_goal_is_held_against_the_worst_output(tmp_path: Path) -> None:
    samples, path = images(20), tmp_path / "reference.npy"
    keep_reference(TwoHeads(1), samples, path)
    worse = compare(TwoHeads(1.5), samples, path, RAW, "close")
    goals = [
        Goal(metric="rms_error", kind="threshold", value=0.1),
        Goal(metric="latency", kind="min_speedup", value=2),
    ]
    [found] = bounds_of(worse, goals)
    assert found == bound_of("rms_error", worse.outputs[1]).model_copy(update={"samples": worse.samples})


def test_one_patient_shows_nothing() -> None:
    reference = RNG.normal(0, 1, (8, 5)).astype(np.float32)
    found = agreement_of([reference], [reference + 0.01], RAW, "close", groups=np.zeros(8, dtype=np.int64))
    bound = bound_of("rms_error", found.outputs[0])
    assert bound.bound > 1e30
    assert bound.method == "too few groups for a bound"


def test_a_reference_that_is_not_finite_is_told(tmp_path: Path) -> None:
    assert not keep_reference(TwoHeads(math.nan), images(3), tmp_path / "reference.npy")


def test_outputs_of_another_number_or_shape_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "reference.npy", np.zeros((2, 1, 1, 1), dtype=np.float32))
    with pytest.raises(StageFailed, match="has 2 outputs, the source model 1") as refused:
        compare(TwoHeads(1), images(2), tmp_path / "reference.npy", RAW, "broken")
    assert refused.value.code == "output_mismatch"
    with pytest.raises(StageFailed, match=r"shape \[1, 3\], the source model's \[1, 2\]"):
        one([[1, 2]], [[1, 2, 3]])


def test_an_output_of_one_value_a_sample_is_compared() -> None:
    assert one(np.arange(4) / 7, np.arange(4) / 7, RAW).passed
    assert (
        one(
            [[-1.0], [2.0], [0.5]], [[-2.0], [4.0], [1.0]], Task(kind="classification", classes=["no", "yes"])
        ).decisions
        == 1
    )
