"""What an earlier job made, seen with this job's goals: whether it is what this job would have made and chosen."""

from __future__ import annotations

from collections.abc import Sequence

from shared.judging import judge, judge_target, verdict_of_target
from shared.recipe import ExportOnnx, Goal, ImportOnnx, Recipe, Stage
from shared.report import Candidate, GoalResult, Measurement, StageReport, TargetReport
from worker.ranking import FITS, rank
from worker.wording import missed_words, why_missed

FOR_EARLIER_GOALS = "for an earlier job's goals: "


def has_bounds(row: Measurement, recipe: Recipe) -> bool:
    """Whether the row has what every quality goal of the recipe is judged by."""
    known = {(bound.metric, bound.kind) for bound in row.bounds}
    goals = [goal for goal in recipe.goals_in_force if goal.is_quality]
    return all(goal.metric in row.metrics and (goal.metric, goal.kind) in known for goal in goals)


def within_tolerance(report: StageReport, stage: Stage) -> bool:
    """Whether an export or import is as exact as this recipe wants it."""
    if not isinstance(stage, ExportOnnx | ImportOnnx) or report.agreement is None:
        return True
    return all(output.max_error <= stage.tolerance for output in report.agreement.outputs)


def unpaid_before(report: StageReport, recipe: Recipe) -> str | None:
    """Why an earlier result was not worth having, where that alone is why it was dropped, and still holds."""
    if report.status != "dropped" or recipe.wants_fewer_bytes or why_missed(report.gate, report.agreement):
        return None
    return report.reason


def judged_again(target: TargetReport, recipe: Recipe, baseline: Measurement) -> TargetReport:
    """The target with its own and its candidates' goals as this recipe has them, and with the verdict on them."""
    goals = judge_target(recipe.goals_in_force, baseline, target)
    verdict = verdict_of_target(target, baseline, goals)
    candidates = [_candidate_again(entry, recipe, baseline) for entry in target.candidates]
    kept = next((entry for entry in candidates if entry.kept), None)
    reason = target.reason if kept is None or not target.evaluated else kept.reason
    update = {"goals": goals, "verdict": verdict, "candidates": candidates, "reason": reason}
    return target.model_copy(update=update)


def _candidate_again(entry: Candidate, recipe: Recipe, baseline: Measurement) -> Candidate:
    if entry.measurement is None or [result.goal for result in entry.goals] == recipe.goals_in_force:
        return entry
    goals = [judge(goal, baseline, entry.measurement) for goal in recipe.goals_in_force]
    missed = missed_words([result for result in goals if result.outcome == "missed"])
    reason = FOR_EARLIER_GOALS + entry.reason.removeprefix(FOR_EARLIER_GOALS).partition("; for this job's: ")[0]
    reason += f"; for this job's: it misses {missed}" if missed else ""
    return entry.model_copy(update={"goals": goals, "reason": reason})


# ---------------------------------------------------------------- whether a choice stands


def still_chosen(report: StageReport, recipe: Recipe, baseline: Measurement) -> bool:
    """Whether a build stage's engines are those that this recipe's goals choose; True of every other stage."""
    kept = [target for target in report.targets if target.engine is not None]
    order = [_order(judge_target(recipe.goals_in_force, baseline, target), target) for target in kept]
    return order == sorted(order) and all(_is_still_chosen(target, recipe, baseline) for target in report.targets)


def _order(results: Sequence[GoalResult], target: TargetReport) -> tuple[bool, int]:
    """The target that is lowest by this is delivered; equals stay in the recipe's order."""
    return not target.evaluated, rank(results)[0]


def _is_still_chosen(target: TargetReport, recipe: Recipe, baseline: Measurement) -> bool:
    """An engine that meets every goal is still the choice unless a faster one has come to meet them as well.

    One that misses a goal is still the choice only where every right engine is known to miss as much or more.
    """
    if not _judged_by_the_same_rule(target, recipe):
        return False
    kept = next((entry for entry in target.candidates if entry.kept), None)
    goals = recipe.goals_in_force
    if kept is None or kept.measurement is None or [result.goal for result in kept.goals] == goals:
        return True  # no engine is right, or it was not at hand to be run, or it was chosen for these very goals
    assert target.measurement is not None
    results = [judge(goal, baseline, target.measurement) for goal in goals]
    if any(result.outcome == "not_evaluated" and result.goal.is_quality for result in results):
        return False
    rivals = [entry for entry in target.candidates if entry is not kept and not _is_wrong(entry)]
    if rank(results)[0] == FITS:
        return not any(_has_come_to_lead(entry, kept, goals, baseline) for entry in rivals)
    return all(_is_no_better(entry, results, baseline) for entry in rivals)


def _judged_by_the_same_rule(target: TargetReport, recipe: Recipe) -> bool:
    """Whether the candidates' outputs were refused as this recipe refuses them: broken ones only, or all but close."""
    rule = "broken" if recipe.has_quality_goal else "close"
    return all(entry.agreement is None or entry.agreement.rule == rule for entry in target.candidates)


def _is_wrong(entry: Candidate) -> bool:
    return entry.measurement is None or (entry.agreement is not None and not entry.agreement.passed)


def _has_come_to_lead(entry: Candidate, kept: Candidate, goals: Sequence[Goal], baseline: Measurement) -> bool:
    """Whether an engine that missed a goal, or was passed over for one, is faster and may meet every goal now."""
    assert entry.measurement is not None
    assert kept.measurement is not None
    met_before = entry.agreement is not None and not _missed(entry.goals)
    is_faster = entry.measurement.latency_ms.p50 < kept.measurement.latency_ms.p50
    return is_faster and not met_before and not _missed([judge(goal, baseline, entry.measurement) for goal in goals])


def _is_no_better(entry: Candidate, kept: Sequence[GoalResult], baseline: Measurement) -> bool:
    """Whether an engine was evaluated and misses at least as much of the goals as the kept one."""
    assert entry.measurement is not None
    results = [judge(one.goal, baseline, entry.measurement) for one in kept]
    known = entry.agreement is not None and all(one.outcome != "not_evaluated" for one in results)
    return known and rank(results) >= rank(kept)


def _missed(results: Sequence[GoalResult]) -> bool:
    return any(result.outcome == "missed" for result in results)
