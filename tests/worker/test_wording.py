"""Texts as the ledger and the report can keep them, and the headline that a job ends with."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from shared.evidence import TOO_FEW
from shared.judging import judge_all
from shared.recipe import Goal, Recipe, Task
from shared.report import Baseline, Bound, GoalResult, Measurement, Ratio, StageReport, TargetReport
from shared.storable import why_not_storable
from tests.shared.reports import BASELINE, INT8, MACHINE, RECIPE, agreement, bound, measured
from worker.wording import headline, legible, warnings_of, why_missed


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é and 😀\n", "plain, é and 😀\n"),
        ("e\0vil", "e\\x00vil"),
        ("\ud83d alone \udfff", "\\ud83d alone \\udfff"),
    ],
)
def test_what_cannot_be_kept_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert legible(text) == shown
    assert why_not_storable(shown) is None


@pytest.mark.parametrize(
    ("text", "shown"), [("12345", "12345"), ("123456", "1234…"), ("\0" * 9, "\\x00…"), ("", "")]
)
def test_what_is_too_long_ends_in_an_ellipsis(text: str, shown: str) -> None:
    assert legible(text, 5) == shown


# ---------------------------------------------------------------- what a stage misses


def test_a_broken_engine_is_told_before_its_goals() -> None:
    drop = Goal(metric="dice", kind="max_drop", value=0.01)
    missed = [GoalResult(goal=drop, reached=0.0231, outcome="missed")]
    assert why_missed(missed, agreement()) == "max_drop of dice: 2.31 points, at most 1 point wanted"
    assert why_missed(missed, agreement(passed=False)) == (
        "its outputs are not those of the network it was made of: its decisions are not the source model's"
    )
    assert why_missed([GoalResult(goal=drop, reached=0.001, bound=0.02, outcome="not_shown")], agreement()) is None


# ---------------------------------------------------------------- the headline

DROP = Goal(metric="dice", kind="max_drop", value=0.01)
FAST = Goal(metric="latency", kind="min_speedup", value=3)
SURELY_FASTER = Ratio(value=4, low=3.9, high=4.1)
AS_FAST = Ratio(value=1, low=0.98, high=1.02)
FLOAT = measured(10, 1000, "openvino", "fp32", speedup=AS_FAST, dice=0.9, bounds=[bound(0, 0)])


def stage(
    position: int, kind: str, status: Literal["succeeded", "dropped", "cached", "skipped"] = "succeeded", **facts: Any
) -> StageReport:
    return StageReport(position=position, kind=kind, status=status, seconds=1, **facts)


def built(row: Measurement, *others: TargetReport, position: int = 1) -> StageReport:
    target = TargetReport(
        target="cpu-fastest", engine=row.method.engine, precision=row.method.precision, evaluated=True,
        engine_bytes=row.size_bytes, measurement=row, agreement=agreement(), candidates=[], goals=[], verdict="met",
        reason="the fastest of 3",
    )  # fmt: skip
    return stage(position, "build_engine", measurement=row, targets=[target, *others])


def said(
    reports: list[StageReport],
    final: int | None,
    goals: list[Goal] | None = None,
    recipe: Recipe = RECIPE,
    doubts: list[str] | None = None,
) -> str:
    baseline = Baseline(source=BASELINE, onnxruntime=None, environment=MACHINE, doubts=doubts or [])
    recipe = recipe.model_copy(update={"goals": [DROP] if goals is None else goals})
    delivered = None if final is None else reports[final]
    results = judge_all(recipe.goals_in_force, BASELINE, delivered)
    return headline(recipe, baseline, reports, final, results)


def test_a_met_job_says_so_in_one_sentence() -> None:
    int8 = INT8.model_copy(update={"speedup": SURELY_FASTER})
    assert said([stage(0, "quantize"), built(int8)], 1) == (
        "The model of stage 1 (build_engine) is delivered; it meets every goal."
    )


def test_a_missed_goal_is_told_with_what_was_reached() -> None:
    goals = [Goal(metric="latency", kind="min_speedup", value=5), Goal(metric="size", kind="max_ratio", value=0.2)]
    assert said([stage(0, "quantize"), built(INT8)], 1, goals) == (
        "The model of stage 1 (build_engine) is delivered, but it misses min_speedup of latency: 4x, at least 5x "
        "wanted; max_ratio of size: 25.1 %, at most 20 % wanted."
    )


def test_what_is_not_shown_is_told_with_what_would_settle_it() -> None:
    unsure = measured(
        2.5, 251, "openvino", "int8", speedup=SURELY_FASTER, dice=0.898, bounds=[bound(0.002, 0.0153)]
    )
    text = said([stage(0, "quantize"), built(unsure)], 1)
    assert text.startswith(
        "The model of stage 1 (build_engine) is delivered; its figures lie inside every goal, but that is not shown: "
        "max_drop of dice is 0.2 points, but may be 1.53 points (at most 1 point wanted; about "
    )
    assert text.endswith(" evaluation samples would settle it).")


def test_no_loss_at_all_cannot_be_shown_by_any_number_of_samples() -> None:
    row = measured(2.5, 251, "openvino", "int8", speedup=SURELY_FASTER, dice=0.9, bounds=[bound(0, 0.004)])
    text = said([stage(0, "quantize"), built(row)], 1, [Goal(metric="dice", kind="max_drop", value=0)])
    assert "(at most 0 points wanted; no number of samples would show it)" in text


CLOSE = Goal(metric="rms_error", kind="threshold", value=0.1)


@pytest.mark.parametrize(
    ("method", "limit", "samples", "words"),
    [
        ("jackknife", 0.12, 16, "5 points, but may be 12 points (at most 10 points wanted; no more than 16 samples "),
        (TOO_FEW, 3e38, 40, "on too few independent samples to say how sure that is (at most 10 points wanted)."),
    ],
)
def test_closeness_that_is_not_shown_says_why(method: str, limit: float, samples: int, words: str) -> None:
    known = Bound(
        metric="rms_error", kind="threshold", value=0.05, bound=limit, groups=16, samples=samples, method=method
    )
    row = measured(2.5, 251, "openvino", "int8", speedup=SURELY_FASTER, rms_error=0.05, bounds=[known])
    assert words in said([stage(0, "quantize"), built(row)], 1, [CLOSE])


def test_a_speedup_that_is_not_sure_is_told_with_its_lower_end() -> None:
    row = measured(2.5, 251, "openvino", "int8", speedup=Ratio(value=3.1, low=2.9, high=3.3), dice=0.9)
    assert "min_speedup of latency is 3.1x, but may be 2.9x (at least 3x wanted)." in said(
        [stage(0, "quantize"), built(row)], 1, [FAST]
    )


def test_what_is_not_faster_is_called_so_whatever_the_goals() -> None:
    slower = INT8.model_copy(update={"speedup": Ratio(value=1.02, low=0.97, high=1.07)})
    for goals in ([DROP], [], [Goal(metric="size", kind="max_ratio", value=0.1)]):
        assert (
            "It is not faster than your own model: 1.02x (95 %: 0.97 to 1.07; from 1.05x on it is called faster)."
            in said([stage(0, "quantize"), built(slower)], 1, goals)
        )


def test_a_job_that_gains_nothing_says_so_once() -> None:
    dropped = stage(0, "quantize", "dropped", reason="every form is wrong.")
    assert said([dropped, built(FLOAT)], 1) == (
        "The model of stage 1 (build_engine) is delivered; it meets every goal. Nothing is gained: it is not 5 % "
        "smaller than your own model, and not faster: 1.00x (95 %: 0.98 to 1.02; from 1.05x on it is called faster). "
        "1 of 2 stages was dropped (quantize: every form is wrong): the model is your own, unchanged."
    )


def test_each_of_several_engines_that_is_not_faster_is_named() -> None:
    faster = INT8.model_copy(update={"speedup": SURELY_FASTER})
    slower = INT8.model_copy(update={"speedup": AS_FAST})
    [other] = built(slower).targets
    [useless] = built(FLOAT).targets
    others = (
        other.model_copy(update={"target": "onnxruntime"}), useless.model_copy(update={"target": "openvino"})
    )  # fmt: skip
    text = said([stage(0, "quantize"), built(faster, *others)], 1)
    assert "The engine for onnxruntime is not faster than your own model: 1.00x" in text
    assert "Nothing is gained by the engine for openvino: it is not 5 % smaller than your own model, and not" in text
    assert "cpu-fastest" not in text


def test_int8_that_was_made_and_not_chosen_is_told() -> None:
    bf16 = FLOAT.model_copy(
        update={"speedup": SURELY_FASTER, "method": FLOAT.method.model_copy(update={"precision": "bf16"})}
    )
    assert said([stage(0, "quantize"), built(bf16)], 1) == (
        "The model of stage 1 (build_engine) is delivered; it meets every goal. "
        "No int8 engine was both right and the fastest: the model is your own, in bf16."
    )


def test_a_pruned_model_is_not_called_unchanged() -> None:
    words = {"kind": "prune", "training": None}
    stages = [words, {"kind": "export_onnx"}, {"kind": "quantize"}, {"kind": "build_engine"}]
    source = {
        "architecture": {"library": "monai", "name": "BasicUNet"}, "weights": "01990000-0000-7000-8000-000000000001"
    }  # fmt: skip
    recipe = Recipe.model_validate({**RECIPE.model_dump(), "source": source, "stages": stages})
    faster = FLOAT.model_copy(update={"speedup": SURELY_FASTER})
    kept = [stage(0, "prune"), stage(1, "export_onnx"), stage(2, "quantize", "dropped", reason="it is wrong")]
    text = said([*kept, built(faster, position=3)], 3, recipe=recipe)
    assert text.endswith("1 of 4 stages was dropped (quantize: it is wrong).")


def test_several_dropped_stages_are_counted_and_named() -> None:
    reports = [stage(0, "quantize", "dropped", reason="it is wrong"), stage(1, "build_engine", "skipped", reason="no")]
    assert said(reports, None) == (
        "Nothing is delivered: no stage left a model that is right, so your own is the best there is. "
        "2 of 2 stages were dropped (quantize: it is wrong; build_engine: no)."
    )


def test_an_engine_that_could_not_be_built_or_run_is_named() -> None:
    nothing: dict[str, Any] = dict.fromkeys(("engine_bytes", "measurement", "agreement"))
    failed = TargetReport(
        target="openvino", engine=None, precision=None, evaluated=False, candidates=[], goals=[], verdict="missed",
        reason="no engine is right", **nothing,
    )  # fmt: skip
    assert "is delivered, but there is no engine for openvino." in said([stage(0, "quantize"), built(INT8, failed)], 1)
    elsewhere = failed.model_copy(
        update={"target": "tensorrt-rtx-8.9", "engine": "tensorrt_rtx", "verdict": "not_evaluated"}
    )
    text = said([stage(0, "quantize"), built(INT8, elsewhere)], 1)
    assert "is delivered; not evaluated: the engine for tensorrt-rtx-8.9." in text


def test_goals_that_were_assumed_are_told() -> None:
    assert said([stage(0, "quantize"), built(INT8)], 1, []).endswith(
        "The recipe names no goal, so a loss of at most 1 point of dice was assumed."
    )
    raw = RECIPE.model_copy(update={"task": Task(kind="raw")})
    text = said([stage(0, "quantize"), built(INT8)], 1, [], raw)
    assert text.startswith(
        "The model of stage 1 (build_engine) is delivered; its outputs are close to your model's."
    )
    assert text.endswith("so closeness to the source model's outputs was assumed.")


def test_doubts_of_the_source_model_end_the_headline() -> None:
    doubt = "The source model takes every sample for 'a'. Check preprocessing."
    assert said([stage(0, "quantize"), built(INT8)], 1, doubts=[doubt]).endswith(f" {doubt}")


def test_a_row_that_was_never_timed_says_so() -> None:
    untimed = INT8.model_copy(update={"speedup": None})
    assert "How fast it is was not measured." in said([stage(0, "quantize"), built(untimed)], 1)


def test_warnings_of_a_training_name_their_stage_and_come_once() -> None:
    useless = {"teacher_warning": "the teacher is no better than the labels alone"}
    reports = [stage(0, "export_onnx"), stage(1, "prune", details={"training": [useless, useless, {}]})]
    assert warnings_of(reports) == ["Stage 1 (prune): the teacher is no better than the labels alone"]
    assert warnings_of([stage(0, "distill", details=useless)]) == [
        "Stage 0 (distill): the teacher is no better than the labels alone"
    ]
