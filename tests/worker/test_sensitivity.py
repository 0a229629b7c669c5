"""The search for layers that int8 hurts: what it judges on, in which order it tries, and when it stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from shared.recipe import Goal, Quantize
from tests.worker import nets
from tests.worker.workbench import Workbench
from worker import engines
from worker.context import StageContext
from worker.data import Samples
from worker.engines import Runner
from worker.feed import Floats, Inputs
from worker.sensitivity import Attempt, Hurt, Judge, appoint, rank, rescue

SHAPE = (1, nets.SIZE, nets.SIZE)
NO_RUNNER = cast(Runner, None)


class Shifted:
    """A network whose outputs are another's and so much more."""

    engine, precision, threads, versions = "shifted", "int8", 1, dict[str, str]()

    def __init__(self, runner: Runner, shift: float) -> None:
        self.runner, self.shift = runner, shift

    def run(self, inputs: Inputs) -> Floats:
        return self.runner.run(inputs) + np.float32(self.shift)

    def run_all(self, inputs: Inputs) -> list[Floats]:
        return [self.run(inputs)]


@pytest.fixture
def fp32(tmp_path: Path) -> Runner:
    runner: Runner = engines.load("onnxruntime").open(nets.chain(tmp_path / "net.onnx", width=4), 1)
    return runner


def ctx(bench: Workbench, part: Samples, *goals: Goal) -> StageContext:
    found = bench.context(bench.directory, goals=list(goals), stages=[Quantize()])
    return replace(found, samples=lambda name: part)


def not_asked() -> Runner:
    raise AssertionError("the source model is not run where no goal asks for it")


# ---------------------------------------------------------------- what is judged, and on what


def test_samples_that_gave_no_range_are_judged_on_where_there_are_enough(bench: Workbench, fp32: Runner) -> None:
    part = nets.noise("calibration", 40, SHAPE)
    judge = appoint(fp32, not_asked, range(20), 0.2, ctx(bench, part))
    assert judge.held_out
    assert len(judge.samples) == 20
    np.testing.assert_array_equal(judge.samples.take([0]), part.take([20]))
    all_drawn = appoint(fp32, not_asked, range(30), 0.2, ctx(bench, part))
    assert not all_drawn.held_out
    assert len(all_drawn.samples) == 40


def test_no_more_than_256_samples_are_judged_on(bench: Workbench, fp32: Runner) -> None:
    judge = appoint(fp32, not_asked, range(100), 0.2, ctx(bench, nets.noise("calibration", 1000, SHAPE)))
    assert len(judge.samples) == 256
    assert len(judge.inputs) == 16


def test_labels_move_with_their_samples(bench: Workbench, fp32: Runner) -> None:
    part = nets.noise("calibration", 40, SHAPE, labels=True)
    judge = appoint(fp32, not_asked, range(20), 0.2, ctx(bench, part))
    targets, whole = judge.samples.targets(3, 4), part.targets(23, 24)
    assert targets is not None
    assert whole is not None
    np.testing.assert_array_equal(targets, whole)


def test_fp32_itself_misses_nothing(bench: Workbench, fp32: Runner) -> None:
    judge = appoint(fp32, not_asked, [], 1e-6, ctx(bench, nets.noise("calibration", 20, SHAPE)))
    assert judge.missed(fp32.run) is None
    assert judge.error(fp32.run) == 0


def test_an_output_beyond_the_tolerance_is_missed_with_both_figures(bench: Workbench, fp32: Runner) -> None:
    judge = appoint(fp32, not_asked, [], 0.2, ctx(bench, nets.noise("calibration", 20, SHAPE)))
    far = Shifted(fp32, 0.5 * float(np.abs(judge.expected).max()))
    assert judge.missed(far.run) == "its outputs differ from fp32's by 0.5, 0.2 is accepted"
    assert judge.error(far.run) > judge.error(Shifted(fp32, 0.01).run) > 0


def test_an_output_that_is_no_number_is_the_worst_there_is(bench: Workbench, fp32: Runner) -> None:
    judge = appoint(fp32, not_asked, [], 0.2, ctx(bench, nets.noise("calibration", 20, SHAPE)))
    assert judge.missed(Shifted(fp32, np.nan).run) is not None
    assert judge.error(Shifted(fp32, np.nan).run) == np.finfo(np.float64).max


def labelled(fp32: Runner, part: Samples) -> Samples:
    return replace(part, read_target=lambda index: fp32.run(part.take([index]))[0].argmax(axis=0))


def test_a_goal_is_held_against_the_source_on_the_same_samples(bench: Workbench, fp32: Runner) -> None:
    part = labelled(fp32, nets.noise("calibration", 20, SHAPE))
    judge = appoint(fp32, lambda: fp32, [], 1.0, ctx(bench, part, Goal(metric="dice", kind="max_drop", value=0.01)))
    assert judge.source["dice"] == 1

    def upside_down(inputs: Inputs) -> Floats:
        return -0.1 * fp32.run(inputs)

    missed = replace(judge, tolerance=10.0).missed(upside_down)
    assert missed is not None
    assert "max_drop of dice is 0.01" in missed


def test_a_goal_that_fp32_misses_is_not_asked_of_int8(bench: Workbench, fp32: Runner) -> None:
    part = nets.noise("calibration", 20, SHAPE, labels=True)  # which nothing can know
    goal = Goal(metric="dice", kind="threshold", value=0.9)
    judge = appoint(fp32, lambda: fp32, [], 1.0, ctx(bench, part, goal))
    assert judge.goals == []


def test_without_labels_the_outputs_alone_are_judged(bench: Workbench, fp32: Runner) -> None:
    goal = Goal(metric="dice", kind="max_drop", value=0.01)
    judge = appoint(fp32, not_asked, [], 0.2, ctx(bench, nets.noise("calibration", 20, SHAPE), goal))
    assert judge.goals == []
    assert judge.missed(Shifted(fp32, 1e-3).run) is None


# ---------------------------------------------------------------- the search


def test_layers_are_ranked_by_the_error_that_each_makes_alone(bench: Workbench, fp32: Runner) -> None:
    judge = appoint(fp32, not_asked, [], 0.2, ctx(bench, nets.noise("calibration", 20, SHAPE)))
    shifts = {"low": 0.01, "high": 1.0, "middle": 0.1, "also low": 0.01}
    told: list[float] = []
    found = rank(list(shifts), lambda layer: Shifted(fp32, shifts[layer]).run, judge, told.append)
    assert [hurt.layer for hurt in found] == ["high", "middle", "also low", "low"]
    assert told == [0, 0.25, 0.5, 0.75]


RANKING = [Hurt("worst", 0.9), Hurt("bad", 0.5), Hurt("fair", 0.1), Hurt("good", 0.01)]


def attempts(right_from: int, speedups: list[float]) -> Callable[[tuple[str, ...]], Attempt]:
    """Attempts that miss nothing from so many float layers on, each with its speedup."""

    def attempt(in_float: tuple[str, ...]) -> Attempt:
        missed = None if len(in_float) >= right_from else "something"
        return Attempt(Path("net.onnx"), NO_RUNNER, in_float, missed, speedups[len(in_float) - 1])

    return attempt


def faster(found: Attempt) -> bool:
    return found.speedup is None or found.speedup > 1


def test_the_worst_layers_go_back_one_by_one_until_nothing_is_missed() -> None:
    tried = rescue(RANKING, 8, attempts(2, [3.0, 2.0, 1.5]), faster)
    assert [found.in_float for found in tried] == [("worst",), ("worst", "bad")]
    assert tried[-1].missed is None


def test_the_search_ends_where_int8_no_longer_pays() -> None:
    tried = rescue(RANKING, 8, attempts(3, [1.5, 0.8, 0.7]), faster)
    assert [len(found.in_float) for found in tried] == [1, 2]
    assert tried[-1].missed is not None


def test_no_more_layers_go_back_than_the_recipe_allows() -> None:
    assert len(rescue(RANKING, 2, attempts(9, [3.0] * 4), faster)) == 2


def test_one_layer_at_least_stays_in_int8() -> None:
    tried = rescue(RANKING, 100, attempts(9, [3.0] * 4), faster)
    assert tried[-1].in_float == ("worst", "bad", "fair")
    assert rescue(RANKING[:1], 100, attempts(9, [3.0]), faster) == []


def test_a_judge_is_the_same_twice(bench: Workbench, fp32: Runner) -> None:
    def judge() -> Judge:
        return appoint(fp32, not_asked, range(8), 0.2, ctx(bench, nets.noise("calibration", 40, SHAPE)))

    np.testing.assert_array_equal(judge().expected, judge().expected)
