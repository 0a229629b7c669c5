"""Which of two engines comes first, speed aside: by the kind of goal that they miss, and by how much."""

from __future__ import annotations

from collections.abc import Sequence

from shared.evidence import CLOPPER_PEARSON
from shared.report import GoalResult

FITS, NOT_SHOWN, MISSES_RESOURCES, MISSES_QUALITY = range(4)


def rank(results: Sequence[GoalResult]) -> tuple[int, float]:
    """Lower is better: first engines that miss no goal, then those whose agreement goal is not shown, then those that
    miss a goal of speed or size, then those that miss a quality goal; ties by how much is missed.

    A share with one decision a sample may stay unshown: that says how small the data set is, nothing of the engine.
    """
    missed = [result for result in results if result.outcome == "missed"]
    quality = [result for result in missed if result.goal.is_quality]
    if quality:
        return MISSES_QUALITY, sum(shortfall(result) for result in quality)
    if missed:
        return MISSES_RESOURCES, sum(shortfall(result) for result in missed)
    return (NOT_SHOWN if unshown(results) else FITS), 0.0


def unshown(results: Sequence[GoalResult]) -> list[GoalResult]:
    """Goals of agreement that an engine may well miss on other samples, though it meets them on these."""
    return [
        result
        for result in results
        if result.outcome == "not_shown" and result.goal.of_agreement and result.method != CLOPPER_PEARSON
    ]


def shortfall(result: GoalResult) -> float:
    """How far a missed goal is from being met, relative to its value (0.01 at least: one point of a ratio)."""
    assert result.reached is not None
    return abs(result.reached - result.goal.value) / max(result.goal.value, 0.01)
