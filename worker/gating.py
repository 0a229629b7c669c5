"""Whether a stage's result goes on to the next stage, and whether it may be what the job delivers."""

from __future__ import annotations

from shared.errors import StageFailed
from shared.judging import judge
from shared.recipe import BuildEngine, ModelFormat, Quantize, Recipe
from shared.report import Measurement, StageReport
from worker.wording import why_missed


def gated(report: StageReport, recipe: Recipe, baseline: Measurement, unpaid: str | None = None) -> StageReport:
    """The report with its result held against the quality goals, and dropped where it misses one.

    Int8 that engines are built of later is not dropped: its forms are judged one by one, each in its own runtime.
    `unpaid` says why a result, right as it may be, is not worth having.
    Raises StageFailed (goal_missed) where the recipe says so.
    """
    assert report.measurement is not None
    _check_quantized(report, recipe)
    stage = recipe.stages[report.position]
    gate = [judge(goal, baseline, report.measurement) for goal in recipe.goals_in_force if goal.is_quality]
    report = report.model_copy(update={"gate": gate})
    missed = None if _is_judged_later(report, recipe) else _why_not_good(report, recipe) or unpaid
    if missed and stage.on_miss == "fail":
        raise StageFailed(f"stage {report.position} ({stage.kind}): {missed}", code="goal_missed")
    status = "dropped" if missed and stage.on_miss == "keep_best" else report.status
    return report.model_copy(update={"status": status, "reason": missed})


def may_be_delivered(report: StageReport, recipe: Recipe) -> bool:
    """Whether the result, which went on, may be the job's: int8 that waits to be judged may not if it is not good."""
    return not _is_judged_later(report, recipe) or _why_not_good(report, recipe) is None


def _is_judged_later(report: StageReport, recipe: Recipe) -> bool:
    is_int8 = isinstance(recipe.stages[report.position], Quantize)
    return is_int8 and any(isinstance(stage, BuildEngine) for stage in recipe.stages[report.position + 1 :])


def _why_not_good(report: StageReport, recipe: Recipe) -> str | None:
    # a network that was trained may differ as it likes: its metrics are what it is judged by
    is_network = recipe.stages[report.position].produces == ModelFormat.TORCH
    return why_missed(report.gate, None if is_network else report.agreement)


def _check_quantized(report: StageReport, recipe: Recipe) -> None:
    """Raises StageFailed (goal_missed) where int8 is a must and a build stage delivers an engine without it."""
    musts = [
        (position, stage.kind)
        for position, stage in enumerate(recipe.stages[: report.position])
        if isinstance(stage, Quantize) and stage.on_miss == "fail"
    ]
    row = report.measurement
    if report.targets and musts and row is not None and row.method.precision in ("fp32", "bf16"):
        position, kind = musts[0]
        kept = next((entry.reason for entry in report.candidates if entry.kept), "")
        best = f"the {row.method.precision} engine is {kept}"
        raise StageFailed(
            f"stage {position} ({kind}): no quantized engine is both right and the fastest; {best}", code="goal_missed"
        )
