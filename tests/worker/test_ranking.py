"""Engines are ranked by what they miss, and by what they may miss on other samples."""

from __future__ import annotations

from shared.evidence import CLOPPER_PEARSON
from shared.judging import judge
from shared.recipe import Goal
from shared.report import Bound, GoalResult
from tests.shared.reports import BASELINE, exactly, measured
from worker.ranking import FITS, MISSES_QUALITY, MISSES_RESOURCES, NOT_SHOWN, rank

CLOSE = Goal(metric="rms_error", kind="threshold", value=0.1)
EQUAL = Goal(metric="agreement", kind="threshold", value=0.99)
SMALL = Goal(metric="size", kind="max_ratio", value=0.5)


def results(
    value: float, limit: float, size_bytes: int = 300, goal: Goal = CLOSE, method: str = "jackknife"
) -> list[GoalResult]:
    known = Bound(metric=goal.metric, kind="threshold", value=value, bound=limit, groups=64, method=method)
    metrics = {goal.metric: value}
    row = measured(4, size_bytes, speedup=exactly(2.5), bounds=[known], **metrics)
    return [judge(one, BASELINE, row) for one in (goal, SMALL)]


def test_what_is_shown_comes_before_what_is_not_and_that_before_what_is_missed() -> None:
    found = [
        results(0.05, 0.06),
        results(0.09, 0.105),
        results(0.05, 0.06, size_bytes=900),
        results(0.11, 0.12),
        results(0.15, 0.2),
    ]
    assert [rank(one)[0] for one in found] == [FITS, NOT_SHOWN, MISSES_RESOURCES, MISSES_QUALITY, MISSES_QUALITY]
    assert sorted(found, key=rank) == found


def test_too_few_samples_to_show_equal_decisions_rank_no_engine_lower() -> None:
    """Only an engine whose outputs are the source's own would be left: int8 could never be had."""
    assert rank(results(1.0, 0.954, goal=EQUAL, method=CLOPPER_PEARSON))[0] == FITS
    assert rank(results(0.98, 0.93, goal=EQUAL, method=CLOPPER_PEARSON))[0] == MISSES_QUALITY


def test_many_decisions_a_sample_tell_of_the_engine() -> None:
    assert rank(results(0.991, 0.984, goal=EQUAL))[0] == NOT_SHOWN
