"""The sentences of a report, what a stage misses and the one for the verdict, and how a text in them is made fit."""

from __future__ import annotations

import re

from shared.report import GoalResult, Parity, StageReport

UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # shared/storable.py says why


def legible(text: str, most: int | None = None) -> str:
    """The text as the ledger can keep it: what it cannot is shown as an escape; one that is too long is cut."""
    shown = UNSTORABLE.sub(lambda found: ascii(found[0])[1:-1], text)
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


def why_missed(gate: list[GoalResult], held: Parity) -> str | None:
    """What the stage's result misses, as one sentence; None if nothing."""
    if not held.passed:
        return (
            f"its outputs differ from the source model's by {held.relative_error:.3g} of their largest value; "
            f"{held.tolerance:g} is accepted"
        )
    missed = [
        f"{result.goal.kind} of {result.goal.metric} is {result.goal.value:g}, reached {result.reached:.4g}"
        for result in gate
        if result.met is False
    ]
    return "; ".join(missed) or None


def sentence(reports: list[StageReport], final: int | None, goals: list[GoalResult]) -> str:
    """The verdict's reason: what is delivered, what it misses, and what could not be evaluated."""
    if final is None:
        return "No stage left a model that could be delivered; the source model is the best there is."
    delivered = f"The model of stage {final} ({reports[final].kind}) is delivered"
    targets = reports[final].targets
    missed = [_of(result) for result in goals if result.met is False]
    missed += [f"an engine for {target.target}" for target in targets if target.engine is None]
    unknown = [_of(result) for result in goals if result.met is None]
    unknown += [f"the engine for {one.target}" for one in targets if one.engine is not None and not one.evaluated]
    if missed:
        return f"{delivered}, but it misses: {', '.join(missed)}."
    if unknown:
        return f"{delivered}; not evaluated: {', '.join(unknown)}."
    return f"{delivered}; it meets every goal." if goals else f"{delivered}; no goal was set."


def _of(result: GoalResult) -> str:
    told = f"{result.goal.kind} of {result.goal.metric}"
    return f"{told} ({result.target})" if result.target else told
