"""A goal and its figures in words, as reports, headlines and the command line show them."""

from __future__ import annotations

from shared import metrics
from shared.metrics import ALL
from shared.recipe import Goal
from shared.report import GoalResult, Ratio

UNITS = {"latency": "ms", "size": "MB", "memory": "MB", "throughput": "samples/s"}


def goal_name(result: GoalResult) -> str:
    """max_drop of dice, with its target where the job has several."""
    name = f"{result.goal.kind} of {result.goal.metric}"
    return f"{name} ({result.target})" if result.target else name


def quantity(goal: Goal, value: float) -> str:
    """A figure in the goal's own unit: 2.31 points, 30 ms, 3x, 25 %."""
    if goal.is_quality:
        if ALL[goal.metric].unit == "distance":
            return f"{value:.3g}"
        number = f"{metrics.shown(goal.metric, value):.3g}"
        return f"{number} point" if number == "1" else f"{number} points"
    if goal.kind in ("at_most", "at_least"):
        return f"{value:.4g} {UNITS[goal.metric]}"
    return f"{value:.3g}x" if goal.kind == "min_speedup" else f"{100 * value:.3g} %"


def wanted(goal: Goal) -> str:
    """at most 1 point, at least 3x."""
    return f"{'at least' if goal.higher_is_better else 'at most'} {quantity(goal, goal.value)}"


def reached(result: GoalResult) -> str:
    return "not measured" if result.reached is None else quantity(result.goal, result.reached)


def outcome(result: GoalResult) -> str:
    """met; not shown, about 120 evaluation samples would settle it."""
    words = result.outcome.replace("_", " ")
    return f"{words}, {needed(result)} would settle it" if result.needed else words


def needed(result: GoalResult) -> str:
    """about 120 evaluation samples, or groups of them."""
    return f"about {result.needed:,} {'groups of ' if result.needed_unit == 'groups' else ''}evaluation samples"


def interval(ratio: Ratio) -> str:
    """3.92 to 4.08; nothing for a ratio whose interval is not known."""
    return f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio.low < ratio.high else ""
