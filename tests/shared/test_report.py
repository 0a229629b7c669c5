"""Reports: goals judged in the right direction, and one verdict."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from shared.recipe import Goal
from shared.report import (
    GoalResult,
    Latency,
    Measurement,
    Report,
    StageReport,
    judge,
    judge_all,
    metric_loss,
    resource,
    verdict,
    verdict_of,
)
from tests.shared.reports import BASELINE, INT8, MACHINE, make_report, measured

# ---------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("kind", "metric", "value", "reached", "met"),
    [
        ("max_drop", "dice", 0.006, 0.005, True),
        ("max_drop", "dice", 0.004, 0.005, False),
        ("threshold", "dice", 0.894, 0.895, True),
        ("threshold", "dice", 0.896, 0.895, False),
        ("max_drop", "hd95", 0.5, 0.5, True),
        ("max_drop", "hd95", 0.4, 0.5, False),
        ("threshold", "hd95", 3.5, 3.5, True),
        ("threshold", "hd95", 3.4, 3.5, False),
        ("min_speedup", "latency", 4.0, 4.0, True),
        ("min_speedup", "latency", 4.1, 4.0, False),
        ("max_ratio", "latency", 0.25, 0.25, True),
        ("max_ratio", "latency", 0.24, 0.25, False),
        ("max_ratio", "size", 0.251, 0.251, True),
        ("max_ratio", "size", 0.25, 0.251, False),
        ("max_ratio", "parameters", 0.5, 1.0, False),
        ("max_ratio", "memory", 1.0, 1.0, True),
        ("max_ratio", "macs", 1.0, 1.0, True),
    ],
)
def test_a_goal_is_judged_in_its_metrics_direction(
    kind: Any, metric: str, value: float, reached: float, met: bool
) -> None:
    result = judge(Goal(metric=metric, kind=kind, value=value), BASELINE, INT8)
    assert result.reached == pytest.approx(reached)
    assert result.met is met


def test_a_gain_is_a_negative_loss_and_never_misses_a_drop() -> None:
    better = measured(dice=0.95, hd95=2.0)
    for metric, gained in (("dice", -0.05), ("hd95", -1.0)):
        result = judge(Goal(metric=metric, kind="max_drop", value=0.001), BASELINE, better)
        assert result.reached == pytest.approx(gained)
        assert result.met is True


@pytest.mark.parametrize(
    ("goal", "baseline", "result"),
    [
        (Goal(metric="dice", kind="max_drop", value=0.01), BASELINE, measured()),
        (Goal(metric="dice", kind="max_drop", value=0.01), measured(), INT8),
        (Goal(metric="dice", kind="threshold", value=0.8), BASELINE, measured()),
        (Goal(metric="memory", kind="max_ratio", value=0.5), BASELINE, measured(peak_memory_bytes=None)),
        (Goal(metric="memory", kind="max_ratio", value=0.5), measured(peak_memory_bytes=0), INT8),
        (Goal(metric="parameters", kind="max_ratio", value=0.5), measured(parameters=None), INT8),
    ],
)
def test_what_was_not_measured_is_neither_met_nor_missed(goal: Goal, baseline: Any, result: Any) -> None:
    judged = judge(goal, baseline, result)
    assert (judged.reached, judged.met) == (None, None)


def test_a_threshold_needs_no_baseline() -> None:
    assert judge(Goal(metric="dice", kind="threshold", value=0.8), measured(), INT8).met is True


def test_a_loss_is_positive_where_it_got_worse() -> None:
    assert metric_loss("dice", 0.9, 0.8) == pytest.approx(0.1)
    assert metric_loss("hd95", 3.0, 4.0) == pytest.approx(1.0)


def test_resources_are_named_as_goals_name_them() -> None:
    names = ("size", "latency", "parameters", "macs", "memory")
    assert [resource(BASELINE, name) for name in names] == [1000, 10, 100, 2000, 500]


def _results(*met: bool | None) -> list[GoalResult]:
    goal = Goal(metric="dice", kind="threshold", value=0.5)
    return [GoalResult(goal=goal, reached=None, met=entry) for entry in met]


@pytest.mark.parametrize(
    ("met", "delivered", "expected"),
    [
        ((), True, "met"),
        ((), False, "missed"),
        ((True, True), True, "met"),
        ((True, False), True, "missed"),
        ((True, True), False, "missed"),
        ((True, None), True, "not_evaluated"),
        ((None, False), True, "missed"),
        ((None,), False, "missed"),
    ],
)
def test_the_verdict_is_met_only_if_everything_was_measured_and_met(
    met: tuple[bool | None, ...], delivered: bool, expected: str
) -> None:
    assert verdict(_results(*met), delivered) == expected


def test_speed_goals_are_judged_by_what_was_timed_in_turns() -> None:
    goals = [Goal(metric="latency", kind="min_speedup", value=3), Goal(metric="latency", kind="max_ratio", value=0.5)]
    apart = judge_all(goals, measured(12.0), _delivered(measured(2.0)))
    assert [result.reached for result in apart] == [6.0, pytest.approx(1 / 6)]
    in_turns = measured(2.0).model_copy(update={"baseline_latency_ms": latency(4.0)})
    together = judge_all(goals, measured(12.0), _delivered(in_turns))
    assert [(result.reached, result.met) for result in together] == [(2.0, False), (0.5, True)]


def test_nothing_is_reached_where_nothing_is_delivered() -> None:
    goals = [Goal(metric="latency", kind="min_speedup", value=3)]
    assert [result.met for result in judge_all(goals, measured(), None)] == [None]
    assert verdict_of(None, judge_all(goals, measured(), None)) == "missed"


def _delivered(measurement: Measurement) -> StageReport:
    return StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=measurement)


def latency(p50: float) -> Latency:
    return Latency(p50=p50, p90=p50, p99=p50)


# ---------------------------------------------------------------- the report itself


def test_a_report_survives_json() -> None:
    report = make_report()
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_report_holds_no_nan(value: float) -> None:
    with pytest.raises(ValidationError):
        measured(value)
    with pytest.raises(ValidationError):
        measured(dice=value)


def test_fingerprints_are_equal_on_equal_machines_alone() -> None:
    assert MACHINE.fingerprint() == MACHINE.model_copy(update={"memory_bytes": 1}).fingerprint()
    for change in ({"cpu": "Xeon"}, {"cores": 4}, {"machine": "arm64"}, {"packages": {"torch": "2.13"}}):
        assert MACHINE.model_copy(update=change).fingerprint() != MACHINE.fingerprint()
