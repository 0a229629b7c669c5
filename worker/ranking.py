"""Which of two engines comes first, speed aside: by the kind of goal that they miss, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

from shared.report import GoalResult


def rank(results: Sequence[GoalResult]) -> tuple[int, float]:
    """The lower the better: no goal is missed, or only goals of speed and size, or a quality goal; then by how much."""
    missed = [result for result in results if result.outcome == "missed"]
    quality = [result for result in missed if result.goal.is_quality]
    if quality:
        return 2, sum(shortfall(result) for result in quality)
    return (1, sum(shortfall(result) for result in missed)) if missed else (0, 0.0)


def shortfall(result: GoalResult) -> float:
    """How far a missed goal is from being met, relative to its value (0.01 at least: one point of a ratio)."""
    assert result.reached is not None
    return abs(result.reached - result.goal.value) / max(result.goal.value, 0.01)
