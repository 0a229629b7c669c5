"""What an earlier job made, seen with new goals: kept where nothing better qualifies, and made again elsewhere."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from shared.judging import judge, judge_target, verdict_of_target
from shared.recipe import ExportOnnx, Goal, ImportOnnx, Recipe, Task
from shared.report import Agreement, Bound, Candidate, Measurement, OutputAgreement, StageReport, TargetReport
from tests.shared.reports import BASELINE, RECIPE, agreement, bound, exactly, measured
from worker.rejudging import has_bounds, judged_again, still_chosen, unpaid_before, within_tolerance

ONE_POINT = [Goal(metric="dice", kind="max_drop", value=0.01)]


def asking(goals: list[Goal], task: Task = RECIPE.task) -> Recipe:
    return RECIPE.model_copy(update={"goals": goals, "task": task})


def drop(value: float) -> list[Goal]:
    return [Goal(metric="dice", kind="max_drop", value=value)]


def row(p50: float, dice: float, size_bytes: int = 250, **more: Any) -> Measurement:
    known = [bound(0.9 - dice, 0.9 - dice)]
    return measured(p50, size_bytes, "openvino", "int8", speedup=exactly(10 / p50), bounds=known, dice=dice, **more)


def candidate(
    form: str, found: Measurement | None, goals: list[Goal], *, kept: bool = False, agreed: Agreement | None
) -> Candidate:
    return Candidate(
        engine="openvino",
        precision="int8",
        form=form,
        measurement=found,
        agreement=agreed,
        goals=[] if found is None else [judge(goal, BASELINE, found) for goal in goals],
        kept=kept,
        reason="the fastest of 3" if kept else "1.30 times the latency of openvino int8",
    )


def build_of(*candidates: Candidate, goals: list[Goal], name: str = "cpu-fastest") -> TargetReport:
    kept = next(entry for entry in candidates if entry.kept)
    target = TargetReport(
        target=name, engine="openvino", precision="int8", evaluated=True, engine_bytes=250,
        measurement=kept.measurement, agreement=kept.agreement, candidates=list(candidates), goals=[], verdict="met",
        reason=kept.reason,
    )  # fmt: skip
    results = judge_target(goals, BASELINE, target)
    return target.model_copy(update={"goals": results, "verdict": verdict_of_target(target, BASELINE, results)})


def stage_of(*targets: TargetReport) -> StageReport:
    return StageReport(
        position=1, kind="build_engine", status="succeeded", seconds=1, measurement=targets[0].measurement,
        targets=list(targets),
    )  # fmt: skip


def earlier(
    kept: Measurement,
    *rivals: tuple[Measurement | None, Agreement | None],
    goals: list[Goal] = ONE_POINT,
    rule: Literal["broken", "close"] = "broken",
) -> StageReport:
    """A build stage that kept one engine beside rivals, for the goals of its job."""
    others = [candidate(str(number), *rival[:1], goals, agreed=rival[1]) for number, rival in enumerate(rivals)]
    chosen = candidate("kept", kept, goals, kept=True, agreed=agreement(rule=rule))
    return stage_of(build_of(chosen, *others, goals=goals))


RIGHT, WRONG = agreement(), agreement(passed=False)
KEPT = row(4, 0.895)


# ---------------------------------------------------------------- whether a choice stands


def test_the_same_goals_choose_the_same_engine() -> None:
    missing_as_well = earlier(row(4, 0.88), (row(5, 0.885), RIGHT))
    for report in (earlier(KEPT, (row(3.9, 0.895), RIGHT)), missing_as_well):
        assert still_chosen(report, asking(ONE_POINT), BASELINE)


def test_a_loosened_goal_keeps_the_engine_where_no_faster_one_comes_to_qualify() -> None:
    slower_missed = earlier(KEPT, (row(6, 0.88), RIGHT))
    faster_still_misses = earlier(KEPT, (row(3, 0.8), RIGHT))
    faster_is_wrong = earlier(KEPT, (row(3, 0.88), WRONG))
    failed_to_build = earlier(KEPT, (None, None))
    for report in (slower_missed, faster_still_misses, faster_is_wrong, failed_to_build):
        assert still_chosen(report, asking(drop(0.05)), BASELINE)


def test_a_loosened_goal_builds_again_where_a_faster_engine_comes_to_qualify() -> None:
    report = earlier(KEPT, (row(3, 0.88), RIGHT))
    assert still_chosen(report, asking(drop(0.015)), BASELINE)
    assert not still_chosen(report, asking(drop(0.03)), BASELINE)


def test_an_engine_that_was_as_fast_and_larger_before_is_no_reason_to_build_again() -> None:
    report = earlier(KEPT, (row(3.95, 0.895, size_bytes=400), RIGHT))
    assert still_chosen(report, asking(drop(0.05)), BASELINE)


def test_a_faster_engine_that_was_never_evaluated_for_its_size_is_built_again_once_it_fits() -> None:
    size = Goal(metric="size", kind="at_most", value=0.0003)
    larger = Goal(metric="size", kind="at_most", value=0.0005)
    report = earlier(KEPT, (row(3, 0.9, size_bytes=400), None), goals=[*ONE_POINT, size])
    assert still_chosen(report, asking([*ONE_POINT, size]), BASELINE)
    assert not still_chosen(report, asking([*ONE_POINT, larger]), BASELINE)
    assert still_chosen(report, asking([*drop(0.02), size]), BASELINE)


def test_a_tightened_goal_keeps_an_engine_that_meets_it() -> None:
    assert still_chosen(earlier(KEPT, (row(6, 0.9), RIGHT)), asking(drop(0.006)), BASELINE)


def test_a_tightened_goal_builds_again_where_another_engine_may_miss_less() -> None:
    tightened = asking(drop(0.002))
    assert not still_chosen(earlier(KEPT, (row(6, 0.9), RIGHT)), tightened, BASELINE)
    assert not still_chosen(earlier(KEPT, (row(6, 0.9), None)), tightened, BASELINE), "it was not evaluated"
    assert still_chosen(earlier(KEPT, (row(6, 0.89), RIGHT)), tightened, BASELINE), "it misses by more"
    assert still_chosen(earlier(KEPT, (row(6, 0.9), WRONG)), tightened, BASELINE)


def test_a_goal_of_what_was_not_evaluated_builds_again() -> None:
    new = [*ONE_POINT, Goal(metric="iou", kind="threshold", value=0.7)]
    assert not still_chosen(earlier(KEPT), asking(new), BASELINE)
    assert still_chosen(earlier(row(4, 0.895, iou=0.8)), asking(new), BASELINE)


def test_another_rule_of_what_is_right_builds_again() -> None:
    """Without a quality goal outputs must be close; with one they must not be broken, and the metric decides."""
    raw = Task(kind="raw")
    close = earlier(measured(4, speedup=exactly(2.5), rms_error=0.3), goals=[], rule="close")
    assert still_chosen(close, asking([], raw), BASELINE)
    with_goal = asking([Goal(metric="rms_error", kind="threshold", value=0.4)], raw)
    assert not still_chosen(close, with_goal, BASELINE)


def test_a_first_goal_is_held_against_the_engines_of_a_job_without() -> None:
    fast = Goal(metric="latency", kind="min_speedup", value=2)
    faster = fast.model_copy(update={"value": 3})
    raw = Task(kind="raw")
    slower = (measured(5, speedup=exactly(2)), agreement(rule="close"))
    report = earlier(measured(4, speedup=exactly(2.5)), slower, goals=[], rule="close")
    assert still_chosen(report, asking([fast], raw), BASELINE)
    assert still_chosen(report, asking([faster], raw), BASELINE), "the rival misses by more"


def test_the_target_that_is_delivered_first_stays_the_first() -> None:
    best, other = row(4, 0.89), row(6, 0.9)
    goals = drop(0.02)
    first = build_of(candidate("a", best, goals, kept=True, agreed=RIGHT), goals=goals, name="openvino")
    second = build_of(candidate("b", other, goals, kept=True, agreed=RIGHT), goals=goals, name="onnxruntime")
    assert still_chosen(stage_of(first, second), asking(drop(0.03)), BASELINE)
    assert not still_chosen(stage_of(first, second), asking(drop(0.005)), BASELINE), "now the second is delivered"


def test_an_engine_that_was_not_run_and_every_other_stage_stand() -> None:
    elsewhere = Candidate(
        engine="tensorrt_rtx", precision="fp16", measurement=None, agreement=None, kept=True, reason="not run here"
    )
    report = earlier(KEPT)
    target = report.targets[0].model_copy(update={"evaluated": False, "candidates": [elsewhere]})
    assert still_chosen(stage_of(target), asking(drop(0.5)), BASELINE)
    assert still_chosen(report.model_copy(update={"targets": []}), asking(drop(0.0001)), BASELINE)


# ---------------------------------------------------------------- what the new report says


def test_goals_verdict_and_reasons_are_those_of_this_job() -> None:
    report = earlier(KEPT, (row(6, 0.88), RIGHT))
    loosened = judged_again(report.targets[0], asking(drop(0.03)), BASELINE)
    assert [result.goal.value for result in loosened.goals] == [0.03]
    assert loosened.verdict == "met"
    assert [[result.outcome for result in entry.goals] for entry in loosened.candidates] == [["met"], ["met"]]
    assert loosened.reason == "for an earlier job's goals: the fastest of 3"
    tightened = judged_again(loosened, asking(drop(0.002)), BASELINE)
    assert tightened.verdict == "missed"
    assert tightened.reason == (
        "for an earlier job's goals: the fastest of 3; for this job's: it misses max_drop of dice: 0.5 points, "
        "at most 0.2 points wanted"
    )
    again = judged_again(tightened, asking(drop(0.03)), BASELINE)
    assert again.reason == loosened.reason, "an earlier job's reason is not told twice"


def test_the_same_goals_leave_a_target_as_it_was() -> None:
    target = earlier(KEPT, (row(6, 0.88), RIGHT)).targets[0]
    assert judged_again(target, asking(ONE_POINT), BASELINE) == target


@pytest.mark.parametrize(
    ("goals", "known"),
    [
        (drop(0.3), True),
        ([Goal(metric="dice", kind="threshold", value=0.5)], False),
        ([Goal(metric="hd95", kind="max_drop", value=1)], False),
        ([Goal(metric="rms_error", kind="threshold", value=1)], False),
        ([Goal(metric="latency", kind="min_speedup", value=2)], True),
    ],
)
def test_a_row_is_enough_if_it_has_what_every_quality_goal_is_judged_by(goals: list[Goal], known: bool) -> None:
    assert has_bounds(KEPT, asking(goals)) is known


def test_closeness_to_the_source_is_judged_by_a_bound_as_well() -> None:
    close = [Goal(metric="rms_error", kind="threshold", value=1)]
    assert not has_bounds(measured(rms_error=0.1), asking(close))
    known = Bound(metric="rms_error", kind="threshold", value=0.1, bound=0.12, groups=64, method="jackknife")
    assert has_bounds(measured(rms_error=0.1, bounds=[known]), asking(close))


def test_an_engine_whose_closeness_the_new_goal_does_not_show_is_chosen_again() -> None:
    known = Bound(metric="rms_error", kind="threshold", value=0.09, bound=0.105, groups=64, method="jackknife")
    kept = measured(4, speedup=exactly(2.5), rms_error=0.09, bounds=[known])
    raw = Task(kind="raw")
    loose, tight = ([Goal(metric="rms_error", kind="threshold", value=value)] for value in (0.2, 0.1))
    slower = measured(6, speedup=exactly(1.7))
    report = earlier(kept, (slower, None), goals=loose)
    assert still_chosen(report, asking([Goal(metric="rms_error", kind="threshold", value=0.15)], raw), BASELINE)
    assert not still_chosen(report, asking(tight, raw), BASELINE)


def test_an_export_stands_if_it_is_as_exact_as_wanted() -> None:
    def exported(error: float) -> StageReport:
        output = OutputAgreement(name="y", kind="values", rms_error=0, cosine=1, max_error=error, passed=True)
        found = Agreement(samples=8, rule="broken", outputs=[output])
        return StageReport(position=0, kind="export_onnx", status="succeeded", seconds=1, agreement=found)

    for stage in (ExportOnnx(tolerance=1e-4), ImportOnnx(tolerance=1e-4)):
        assert within_tolerance(exported(5e-5), stage)
        assert not within_tolerance(exported(5e-4), stage)
    assert within_tolerance(exported(5e-4), RECIPE.stages[0])


def test_int8_that_did_not_pay_stays_dropped_unless_fewer_bytes_are_wanted() -> None:
    unpaid = StageReport(
        position=0, kind="quantize", status="dropped", seconds=1, measurement=KEPT, agreement=RIGHT,
        gate=[judge(ONE_POINT[0], BASELINE, KEPT)], reason="it does not pay: 1.20 times fp32's latency in onnxruntime",
    )  # fmt: skip
    assert unpaid_before(unpaid, asking(drop(0.02))) == unpaid.reason
    assert unpaid_before(unpaid, asking([Goal(metric="size", kind="at_most", value=1)])) is None
    worse = row(4, 0.5)
    missed = unpaid.model_copy(update={"gate": [judge(ONE_POINT[0], BASELINE, worse)], "measurement": worse})
    assert unpaid_before(missed, asking(drop(0.5))) is None
    assert unpaid_before(unpaid.model_copy(update={"status": "succeeded"}), asking([])) is None
