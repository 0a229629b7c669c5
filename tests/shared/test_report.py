"""Reports: goals judged in the right direction and with their bounds, and one verdict."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from shared.figures import needed
from shared.judging import judge, judge_all, resource, speedup_of, verdict, verdict_of
from shared.recipe import Goal
from shared.report import Bound, GoalResult, Latency, Measurement, Ratio, Report, StageReport
from tests.shared.reports import BASELINE, INT8, MACHINE, bound, exactly, make_report, measured

# ---------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("kind", "metric", "value", "reached", "outcome"),
    [
        ("max_drop", "dice", 0.006, 0.005, "met"),
        ("max_drop", "dice", 0.004, 0.005, "missed"),
        ("threshold", "dice", 0.894, 0.895, "met"),
        ("threshold", "dice", 0.896, 0.895, "missed"),
        ("max_drop", "hd95", 0.5, 0.5, "met"),
        ("max_drop", "hd95", 0.4, 0.5, "missed"),
        ("threshold", "hd95", 3.5, 3.5, "met"),
        ("threshold", "hd95", 3.4, 3.5, "missed"),
        ("min_speedup", "latency", 4.0, 4.0, "met"),
        ("min_speedup", "latency", 4.1, 4.0, "missed"),
        ("max_ratio", "latency", 0.25, 0.25, "met"),
        ("max_ratio", "latency", 0.24, 0.25, "missed"),
        ("max_ratio", "size", 0.251, 0.251, "met"),
        ("max_ratio", "size", 0.25, 0.251, "missed"),
        ("max_ratio", "parameters", 0.5, 1.0, "missed"),
        ("max_ratio", "memory", 1.0, 1.0, "met"),
        ("max_ratio", "macs", 1.0, 1.0, "met"),
        ("at_most", "latency", 2.5, 2.5, "met"),
        ("at_most", "latency", 2.4, 2.5, "missed"),
        ("at_most", "size", 0.00026, 0.000251, "met"),
        ("at_most", "size", 0.00025, 0.000251, "missed"),
        ("at_most", "memory", 0.0005, 0.0005, "met"),
        ("at_least", "throughput", 400, 400, "met"),
        ("at_least", "throughput", 401, 400, "missed"),
    ],
)
def test_a_goal_is_judged_in_its_metrics_direction(
    kind: Any, metric: str, value: float, reached: float, outcome: str
) -> None:
    result = judge(Goal(metric=metric, kind=kind, value=value), BASELINE, INT8)
    assert result.reached == pytest.approx(reached)
    assert result.outcome == outcome


def test_a_gain_is_a_negative_loss_and_never_misses_a_drop() -> None:
    better = measured(dice=0.95, hd95=2.0)
    for metric, gained in (("dice", -0.05), ("hd95", -1.0)):
        result = judge(Goal(metric=metric, kind="max_drop", value=0.001), BASELINE, better)
        assert result.reached == pytest.approx(gained)
        assert result.outcome == "met"


@pytest.mark.parametrize(
    ("goal", "baseline", "result"),
    [
        (Goal(metric="dice", kind="max_drop", value=0.01), BASELINE, measured()),
        (Goal(metric="dice", kind="max_drop", value=0.01), measured(), INT8),
        (Goal(metric="dice", kind="threshold", value=0.8), BASELINE, measured()),
        (Goal(metric="rms_error", kind="threshold", value=0.1), BASELINE, INT8),
        (Goal(metric="latency", kind="min_speedup", value=2), BASELINE, measured()),
        (Goal(metric="latency", kind="max_ratio", value=0.5), BASELINE, measured()),
        (Goal(metric="memory", kind="max_ratio", value=0.5), BASELINE, measured(peak_memory_bytes=None)),
        (Goal(metric="memory", kind="at_most", value=0.5), BASELINE, measured(peak_memory_bytes=None)),
        (Goal(metric="memory", kind="max_ratio", value=0.5), measured(peak_memory_bytes=0), INT8),
        (Goal(metric="parameters", kind="max_ratio", value=0.5), measured(parameters=None), INT8),
        (
            Goal(metric="throughput", kind="at_least", value=1),
            BASELINE,
            INT8.model_copy(update={"throughput_per_second": {}}),
        ),
    ],
)
def test_what_was_not_measured_is_neither_met_nor_missed(goal: Goal, baseline: Any, result: Any) -> None:
    judged = judge(goal, baseline, result)
    assert (judged.reached, judged.outcome) == (None, "not_evaluated")


def test_a_threshold_needs_no_baseline() -> None:
    assert judge(Goal(metric="dice", kind="threshold", value=0.8), measured(), INT8).outcome == "met"


def test_closeness_to_the_source_is_judged_without_labels() -> None:
    found = measured(agreement=0.97, fidelity_dice=0.96, rms_error=0.08)
    for metric, inside, outside in (("agreement", 0.96, 0.98), ("fidelity_dice", 0.95, 0.97), ("rms_error", 0.1, 0.05)):
        outcomes = [
            judge(Goal(metric=metric, kind="threshold", value=value), measured(), found).outcome
            for value in (inside, outside)
        ]
        assert outcomes == ["met", "missed"]


def test_resources_are_named_as_goals_name_them() -> None:
    names = ("size", "latency", "parameters", "macs", "memory")
    assert [resource(BASELINE, name) for name in names] == [1000, 10, 100, 2000, 500]


# ---------------------------------------------------------------- three answers

DROP = Goal(metric="dice", kind="max_drop", value=0.01)
FLOOR = Goal(metric="dice", kind="threshold", value=0.88)


@pytest.mark.parametrize(
    ("goal", "known", "outcome"),
    [
        (DROP, bound(0.005, 0.009), "met"),
        (DROP, bound(0.005, 0.011), "not_shown"),
        (DROP, bound(0.011, 0.02), "missed"),
        (FLOOR, bound(0.895, 0.885, "threshold"), "met"),
        (FLOOR, bound(0.895, 0.875, "threshold"), "not_shown"),
        (FLOOR, bound(0.875, 0.86, "threshold"), "missed"),
    ],
)
def test_a_goal_is_met_only_if_its_bound_lies_inside(goal: Goal, known: Bound, outcome: str) -> None:
    result = judge(goal, BASELINE, measured(dice=0.895, bounds=[known]))
    assert (result.outcome, result.reached, result.bound) == (outcome, known.value, known.bound)
    assert (result.needed is not None) == (outcome == "not_shown")


def test_a_bound_belongs_to_one_kind_of_goal() -> None:
    found = measured(dice=0.895, bounds=[bound(0.895, 0.5, "threshold")])
    result = judge(DROP, BASELINE, found)
    assert (result.reached, result.bound, result.outcome) == (pytest.approx(0.005), None, "met")


def test_what_is_not_shown_says_how_many_samples_would_settle_it() -> None:
    found = measured(dice=0.895, bounds=[bound(0.005, 0.02)])
    count = judge(DROP, BASELINE, found).needed
    assert count is not None
    assert count > 40
    wider = judge(DROP.model_copy(update={"value": 0.015}), BASELINE, found).needed
    assert wider is not None
    assert wider < count


def test_groups_of_samples_are_what_settles_it_where_the_data_names_them() -> None:
    by_patient = bound(0.005, 0.02).model_copy(update={"groups": 8})
    result = judge(DROP, BASELINE, measured(dice=0.895, bounds=[by_patient]))
    assert (result.needed_unit, needed(result)) == ("groups", f"about {result.needed} groups of evaluation samples")
    by_sample = judge(DROP, BASELINE, measured(dice=0.895, bounds=[bound(0.005, 0.02)]))
    assert (by_sample.needed_unit, needed(by_sample)) == ("samples", f"about {by_sample.needed} evaluation samples")


@pytest.mark.parametrize(("samples", "groups", "unit"), [(40, 40, "samples"), (40, 8, "groups"), (16, 16, None)])
def test_closeness_is_settled_by_more_samples_only_if_more_would_be_compared(
    samples: int, groups: int, unit: str | None
) -> None:
    """The evaluation part has 40 samples; outputs may be compared on fewer of them."""
    goal = Goal(metric="rms_error", kind="threshold", value=0.1)
    known = Bound(
        metric="rms_error", kind="threshold", value=0.05, bound=0.12, groups=groups, samples=samples, method="jackknife"
    )
    result = judge(goal, BASELINE, measured(rms_error=0.05, bounds=[known]))
    assert result.outcome == "not_shown"
    assert (result.needed is None, result.compared) == ((True, 16) if unit is None else (False, None))
    assert unit is None or result.needed_unit == unit


def test_a_loss_on_the_limit_is_inside_whatever_its_rounding() -> None:
    before, after = measured(dice=0.95), measured(dice=0.94)
    assert 0.95 - 0.94 > 0.01, "as floating-point numbers go"
    assert judge(DROP, before, after).outcome == "met"


def test_nothing_may_be_lost_if_a_goal_says_so() -> None:
    nothing = Goal(metric="dice", kind="max_drop", value=0)
    assert judge(nothing, BASELINE, measured(dice=0.9, bounds=[bound(0, 0)])).outcome == "met"
    assert judge(nothing, BASELINE, measured(dice=0.899, bounds=[bound(0.001, 0.002)])).outcome == "missed"
    unsure = judge(nothing, BASELINE, measured(dice=0.9, bounds=[bound(0, 0.004)]))
    assert (unsure.outcome, unsure.needed) == ("not_shown", None), "no number of samples shows that nothing is lost"


def test_a_speedup_is_judged_by_the_lower_end_of_its_interval() -> None:
    found = measured(speedup=Ratio(value=3.1, low=2.9, high=3.3))
    for kind, inside, unsure, outside in (("min_speedup", 2.8, 3.0, 3.2), ("max_ratio", 0.36, 0.33, 0.3)):
        outcomes = [
            judge(Goal.model_validate({"metric": "latency", "kind": kind, "value": value}), BASELINE, found).outcome
            for value in (inside, unsure, outside)
        ]
        assert outcomes == ["met", "not_shown", "missed"]


def test_figures_without_a_ratio_are_those_of_the_source_that_was_timed_beside() -> None:
    beside = measured(2.0).model_copy(update={"baseline_latency_ms": Latency(p50=5, p90=6)})
    assert speedup_of(beside) == Ratio(value=2.5, low=2.5, high=2.5)
    assert speedup_of(measured(2.0)) is None


# ---------------------------------------------------------------- the verdict


def _results(*outcomes: Any) -> list[GoalResult]:
    return [GoalResult(goal=FLOOR, reached=None, outcome=outcome) for outcome in outcomes]


@pytest.mark.parametrize(
    ("outcomes", "delivered", "expected"),
    [
        ((), INT8, "met"),
        ((), None, "missed"),
        (("met", "met"), INT8, "met"),
        (("met", "missed"), INT8, "missed"),
        (("met", "met"), None, "missed"),
        (("met", "not_shown"), INT8, "not_shown"),
        (("missed", "not_shown"), INT8, "missed"),
        (("not_evaluated", "not_shown"), INT8, "not_evaluated"),
        (("met", "not_evaluated"), INT8, "not_evaluated"),
        (("not_evaluated", "missed"), INT8, "missed"),
        (("not_evaluated",), None, "missed"),
    ],
)
def test_the_verdict_is_met_only_if_everything_was_measured_and_met(
    outcomes: Any, delivered: Measurement | None, expected: str
) -> None:
    assert verdict(_results(*outcomes), BASELINE, delivered) == expected


@pytest.mark.parametrize(
    ("size_bytes", "speedup", "expected"),
    [
        (1000, exactly(1), "no_gain"),
        (1000, None, "no_gain"),
        (960, exactly(1.04), "no_gain"),
        (950, exactly(0.5), "met"),  # smaller, though slower
        (2000, exactly(1.05), "met"),  # faster, though larger
        (1000, Ratio(value=1.2, low=1.04, high=1.4), "no_gain"),  # not surely faster
    ],
)
def test_what_is_neither_smaller_nor_faster_is_no_gain(size_bytes: int, speedup: Ratio | None, expected: str) -> None:
    delivered = measured(size_bytes=size_bytes, speedup=speedup)
    assert verdict(_results("met"), BASELINE, delivered) == expected
    assert verdict(_results("missed"), BASELINE, delivered) == "missed", "a missed goal is said first"


def test_speed_goals_are_judged_by_what_was_timed_in_turns() -> None:
    goals = [Goal(metric="latency", kind="min_speedup", value=3), Goal(metric="latency", kind="max_ratio", value=0.5)]
    in_turns = measured(2.0).model_copy(update={"baseline_latency_ms": Latency(p50=4, p90=4)})
    together = judge_all(goals, measured(12.0), _delivered(in_turns))
    assert [(result.reached, result.outcome) for result in together] == [(2.0, "missed"), (0.5, "met")]


def test_nothing_is_reached_where_nothing_is_delivered() -> None:
    goals = [Goal(metric="latency", kind="min_speedup", value=3)]
    results = judge_all(goals, measured(), None)
    assert [result.outcome for result in results] == ["not_evaluated"]
    assert verdict_of(measured(), None, results) == "missed"


def _delivered(measurement: Measurement) -> StageReport:
    return StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=measurement)


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
