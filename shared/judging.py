"""Goals and verdicts: every figure of a report held against what the recipe asks, from the report's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shared import metrics
from shared.evidence import CLOPPER_PEARSON, TOO_FEW, groups_needed
from shared.recipe import Goal
from shared.report import Bound, GoalResult, Measurement, Outcome, Ratio, StageReport, TargetReport, Verdict

ROUNDING = 1e-9  # of floating-point figures: one point lost of 0.95 is 0.010000000000000009
SMALLER = 0.95
FASTER = 1.05  # a speedup whose interval lies above this is called faster


def judge(goal: Goal, baseline: Measurement, result: Measurement) -> GoalResult:
    """Hold one goal against a measurement and the baseline."""
    reached, bound, groups = _reached(goal, baseline, result)
    if reached is None:
        return GoalResult(goal=goal, reached=None, outcome="not_evaluated")
    outcome: Outcome = "missed"
    needed = None
    known = _bound_of(goal, result)
    method, samples = (None, None) if known is None else (known.method, known.samples)
    unit: Literal["samples", "groups"] = "samples" if groups in (None, samples or result.method.samples) else "groups"
    compared = None if samples is None or samples >= result.method.samples else samples
    if _inside(goal, reached):
        outcome = "met" if bound is None or _inside(goal, bound) else "not_shown"
        can_be_settled = method != TOO_FEW and compared is None and _has_room(goal, reached)
        if bound is not None and groups is not None and outcome == "not_shown" and can_be_settled:
            like = "top1" if method == CLOPPER_PEARSON else goal.metric  # a share of decisions, one a sample
            needed = groups_needed(reached, bound, goal.value, groups, like)
    return GoalResult(
        goal=goal,
        reached=reached,
        bound=bound,
        method=method,
        compared=compared,
        needed=needed,
        needed_unit=unit,
        outcome=outcome,
    )


def _inside(goal: Goal, value: float) -> bool:
    room = value - goal.value if goal.higher_is_better else goal.value - value
    return room >= -ROUNDING


def _has_room(goal: Goal, value: float) -> bool:
    """Whether a value inside the goal keeps away from its limit: on it, no number of samples brings a bound inside."""
    return abs(value - goal.value) > ROUNDING


def _reached(
    goal: Goal, baseline: Measurement, result: Measurement
) -> tuple[float | None, float | None, int | None]:
    """What was reached, its bound on the worse side, and the number of groups behind a quality bound."""
    if goal.is_quality:
        return _quality(goal, baseline, result)
    if goal.kind == "min_speedup":
        ratio = speedup_of(result)
        return (None, None, None) if ratio is None else (ratio.value, ratio.low, None)
    if goal.metric == "throughput":
        return max(result.throughput_per_second.values(), default=None), None, None
    if goal.kind == "at_most":
        value = resource(result, goal.metric)
        return (value if value is None or goal.metric == "latency" else value / 1e6), None, None
    if goal.metric == "latency":
        ratio = speedup_of(result)
        return (None, None, None) if ratio is None else (1 / ratio.value, 1 / ratio.low, None)
    before, value = resource(baseline, goal.metric), resource(result, goal.metric)
    return (value / before if value is not None and before else None), None, None


def _quality(
    goal: Goal, baseline: Measurement, result: Measurement
) -> tuple[float | None, float | None, int | None]:
    bound = _bound_of(goal, result)
    if bound is not None:
        return bound.value, bound.bound, bound.groups
    value, before = result.metrics.get(goal.metric), baseline.metrics.get(goal.metric)
    if value is None or (goal.kind == "max_drop" and before is None):
        return None, None, None
    lost = value if before is None or goal.kind == "threshold" else metrics.loss_of(goal.metric, before, value)
    return lost, None, None


def _bound_of(goal: Goal, result: Measurement) -> Bound | None:
    return next((one for one in result.bounds if (one.metric, one.kind) == (goal.metric, goal.kind)), None)


def speedup_of(result: Measurement) -> Ratio | None:
    """How much faster than the source model; 1 for the source model itself, None where it was not timed beside it."""
    if result.speedup is not None:
        return result.speedup
    if result.baseline_latency_ms is None:
        return None
    ratio = result.baseline_latency_ms.p50 / result.latency_ms.p50
    return Ratio(value=ratio, low=ratio, high=ratio)


def resource(measurement: Measurement, name: str) -> float | None:
    """A measurement's figure by the name that goals use: size, latency, parameters, macs or memory."""
    if name == "latency":
        return measurement.latency_ms.p50
    field = {"size": "size_bytes", "memory": "peak_memory_bytes"}.get(name, name)
    value = getattr(measurement, field)
    return None if value is None else float(value)


def judge_all(goals: Sequence[Goal], baseline: Measurement, delivered: StageReport | None) -> list[GoalResult]:
    """Every goal held against what is delivered, of every target where several were built.

    Nothing was reached if nothing is delivered.
    """
    if delivered is None or delivered.measurement is None:
        return [GoalResult(goal=goal, reached=None, outcome="not_evaluated") for goal in goals]
    if not delivered.targets:
        return [judge(goal, baseline, delivered.measurement) for goal in goals]
    several = len(delivered.targets) > 1
    return [
        result.model_copy(update={"target": target.target if several else None})
        for target in delivered.targets
        for result in judge_target(goals, baseline, target)
    ]


def judge_target(goals: Sequence[Goal], baseline: Measurement, target: TargetReport) -> list[GoalResult]:
    """Every goal held against one target's engine; none without one, and not evaluated if it could not be run."""
    if target.engine is None or target.measurement is None:
        return []
    if not target.evaluated:
        return [GoalResult(goal=goal, reached=None, outcome="not_evaluated") for goal in goals]
    return [judge(goal, baseline, target.measurement) for goal in goals]


# ---------------------------------------------------------------- the verdict


def verdict_of(baseline: Measurement, delivered: StageReport | None, goals: Sequence[GoalResult]) -> Verdict:
    """The job's verdict: that of its targets where engines were built, or of its goals."""
    if delivered is not None and delivered.targets:
        return verdict_of_targets(delivered.targets)
    return verdict(goals, baseline, None if delivered is None else delivered.measurement)


def verdict(goals: Sequence[GoalResult], baseline: Measurement, delivered: Measurement | None) -> Verdict:
    """`met` only if something is delivered, every goal was measured and met, and the result is smaller or faster."""
    outcomes = {result.outcome for result in goals}
    if delivered is None or "missed" in outcomes:
        return "missed"
    if "not_evaluated" in outcomes:
        return "not_evaluated"
    if not gains(baseline, delivered):
        return "no_gain"
    return "not_shown" if "not_shown" in outcomes else "met"


def gains(baseline: Measurement, delivered: Measurement) -> bool:
    """Whether the result is faster than the source model, or has at most 95 % of its size."""
    return is_faster(delivered) or delivered.size_bytes <= SMALLER * baseline.size_bytes


def is_faster(delivered: Measurement) -> bool:
    ratio = speedup_of(delivered)
    return ratio is not None and ratio.low >= FASTER


def verdict_of_target(target: TargetReport, baseline: Measurement, goals: Sequence[GoalResult]) -> Verdict:
    """One target's own verdict: missed without an engine, not evaluated where its engine could not be run."""
    if target.engine is not None and not target.evaluated:
        return "not_evaluated"
    return verdict(goals, baseline, None if target.engine is None else target.measurement)


def verdict_of_targets(targets: Sequence[TargetReport]) -> Verdict:
    """The worst of the targets that were evaluated; one whose engine could not be run is left out where others were."""
    verdicts = {target.verdict for target in targets if target.evaluated or target.verdict == "missed"}
    worst: tuple[Verdict, ...] = ("missed", "not_evaluated", "no_gain", "not_shown", "met")
    return next((one for one in worst if one in verdicts), "not_evaluated")
