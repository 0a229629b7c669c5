"""What int8 lost is told by every output, by the metric where there are labels, and on samples that gave no range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.recipe import Task
from tests.worker import nets
from tests.worker.workbench import TISSUES
from worker import engines
from worker.data import Samples
from worker.engines import Runner
from worker.feed import Floats, Inputs
from worker.quantization.quality import CLOSE, GOOD, Quality, quality_check

SHAPE = (1, nets.SIZE, nets.SIZE)
RAW = Task(kind="raw")


class Altered:
    """A network with two outputs, of which one or the other is another network's and so much more."""

    engine, precision, threads, versions = "altered", "int8", 1, dict[str, str]()

    def __init__(self, runner: Runner, *shifts: float) -> None:
        self.runner, self.shifts = runner, shifts

    def run(self, inputs: Inputs) -> Floats:
        return self.run_all(inputs)[0]

    def run_all(self, inputs: Inputs) -> list[Floats]:
        outputs = self.runner.run(inputs)
        return [outputs + np.float32(shift) for shift in self.shifts]


@pytest.fixture
def network(tmp_path: Path) -> Runner:
    runner: Runner = engines.load("onnxruntime").open(nets.chain(tmp_path / "net.onnx", width=4), 1)
    return runner


def calibration(count: int) -> Samples:
    return nets.noise("calibration", count, SHAPE)


def labelled_by(network: Runner, part: Samples) -> Samples:
    """The network's own decisions for labels: it loses nothing, and whatever decides otherwise does."""
    return replace(part, read_target=lambda index: network.run(part.take([index]))[0].argmax(axis=0))


# ---------------------------------------------------------------- on what it is judged


def test_samples_that_gave_no_range_are_judged_on_where_there_are_enough(network: Runner) -> None:
    part = calibration(40)
    check = quality_check(network, part, range(20), RAW)
    assert check.origin == "calibration samples that gave no range"
    np.testing.assert_array_equal(check.samples.take([0]), part.take([20]))
    assert quality_check(network, part, range(30), RAW).origin == "calibration samples"


@pytest.mark.parametrize(("task", "labels", "expected"), [(RAW, False, 16), (TISSUES, True, 64)])
def test_the_number_of_samples_has_a_limit(network: Runner, task: Task, labels: bool, expected: int) -> None:
    part = calibration(200)
    check = quality_check(network, labelled_by(network, part) if labels else part, range(100), task)
    assert len(check.samples) == expected
    assert len(check.inputs) == 16
    assert check.num_passes == 16 + (64 if labels else 0)


def test_labels_move_with_their_samples(network: Runner) -> None:
    part = labelled_by(network, calibration(40))
    check = quality_check(network, part, range(20), TISSUES)
    targets, whole = check.samples.targets(3, 4), part.targets(23, 24)
    assert targets is not None
    assert whole is not None
    np.testing.assert_array_equal(targets, whole)


def test_kept_out_train_samples_stand_in_where_calibration_has_no_labels(network: Runner) -> None:
    kept_out = labelled_by(network, nets.noise("train", 20, SHAPE))
    check = quality_check(network, calibration(40), range(20), TISSUES, kept_out)
    assert check.origin == "train samples"
    assert check.metric == 1
    own = labelled_by(network, calibration(40))
    assert quality_check(network, own, range(20), TISSUES, kept_out).samples.part == "calibration"


# ---------------------------------------------------------------- what counts


def test_the_network_itself_loses_nothing(network: Runner) -> None:
    check = quality_check(network, labelled_by(network, calibration(20)), [], TISSUES)
    assert check.of(network) == Quality((0.0,), 0.0, 0.0)
    assert check.error(network, 8) == 0


def test_a_second_output_counts_as_much_as_the_first(network: Runner) -> None:
    whole = Altered(network, 0.0, 0.0)
    check = quality_check(whole, labelled_by(network, calibration(20)), [], TISSUES)
    second = check.of(Altered(network, 0.0, 5.0))
    assert second.loss == 0
    assert second.errors[0] == 0 < GOOD.rms_error < second.errors[1]
    assert not second.reaches(GOOD)
    assert check.error(Altered(network, 0.0, 5.0), 8) > 0


def test_an_output_that_is_no_number_reaches_nothing(network: Runner) -> None:
    check = quality_check(network, labelled_by(network, calibration(20)), [], TISSUES)
    assert not check.of(Altered(network, np.nan)).reaches(GOOD)


def quality(*errors: float, loss: float | None = None, grain: float = 0.0) -> Quality:
    return Quality(errors, loss, grain)


@pytest.mark.parametrize(
    ("found", "levels"),
    [
        (quality(0.02), [GOOD, CLOSE]),
        (quality(0.05), [GOOD]),
        (quality(0.2), []),
        (quality(0.4, loss=0.0), [GOOD, CLOSE]),  # a softmax head: single elements differ, no decision that counts
        (quality(0.4, loss=0.005), [GOOD]),
        (quality(0.02, loss=0.05), []),
        (quality(0.005, loss=0.02), [GOOD, CLOSE]),  # so close that the loss is chance
        (quality(1.5, loss=0.0), []),
        (quality(0.4, 0.2, loss=0.0), []),
        (quality(0.05, loss=0.02, grain=0.03), [GOOD, CLOSE]),  # one sample of 33
    ],
)
def test_the_metric_decides_where_there_are_labels_and_closeness_elsewhere(
    found: Quality, levels: Sequence[object]
) -> None:
    assert [level for level in (GOOD, CLOSE) if found.reaches(level)] == levels


def test_better_is_what_reaches_more_then_what_loses_less() -> None:
    worst, fair = quality(0.5, loss=0.02), quality(0.05, loss=0.02)
    good, best = quality(0.1, loss=0.005), quality(0.2, loss=0.0)
    assert sorted([worst, fair, good, best], key=lambda one: one.rank) == [best, good, fair, worst]
