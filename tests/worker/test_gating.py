"""What goes on, what is dropped, and what ends a job."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import StageFailed
from shared.recipe import Recipe
from shared.report import Candidate, StageReport, TargetReport
from tests.shared.reports import BASELINE, RECIPE, agreement, measured
from worker.gating import gated, may_be_delivered

ONE_POINT = [{"metric": "dice", "kind": "max_drop", "value": 0.01}]


def recipe(*stages: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({**RECIPE.model_dump(), "stages": list(stages), "goals": ONE_POINT})


def left(position: int, kind: str, dice: float, **changes: Any) -> StageReport:
    row = measured(engine="onnxruntime", precision=changes.pop("precision", "int8"), dice=dice)
    found = {"position": position, "kind": kind, "status": "succeeded", "seconds": 1.0, "measurement": row}
    return StageReport.model_validate({**found, "agreement": agreement(), **changes})


QUANTIZE, BUILD = {"kind": "quantize"}, {"kind": "build_engine"}


def test_int8_that_misses_a_goal_is_dropped_where_nothing_is_built_of_it() -> None:
    result = gated(left(0, "quantize", 0.6), recipe(QUANTIZE), BASELINE)
    assert result.status == "dropped"
    assert result.reason == "max_drop of dice: 30 points, at most 1 point wanted"


def test_int8_that_misses_a_goal_in_one_runtime_goes_on_where_engines_are_built_of_its_forms() -> None:
    words = recipe(QUANTIZE, BUILD)
    result = gated(left(0, "quantize", 0.6), words, BASELINE)
    assert (result.status, result.reason) == ("succeeded", None)
    assert [goal.outcome for goal in result.gate] == ["missed"]
    assert not may_be_delivered(result, words)  # should no engine be right, the model before it is the job's


def test_int8_that_is_good_may_be_delivered_itself() -> None:
    words = recipe(QUANTIZE, BUILD)
    assert may_be_delivered(gated(left(0, "quantize", 0.895), words, BASELINE), words)


def test_outputs_that_are_wrong_are_dropped_whatever_the_metric_says() -> None:
    result = gated(left(0, "quantize", 0.9, agreement=agreement(passed=False)), recipe(QUANTIZE), BASELINE)
    assert result.status == "dropped"
    assert "outputs are not those of the network it was made of" in (result.reason or "")


def test_a_result_that_is_not_worth_having_is_dropped_with_the_reason() -> None:
    result = gated(left(0, "quantize", 0.9), recipe(QUANTIZE), BASELINE, unpaid="it does not pay")
    assert (result.status, result.reason) == ("dropped", "it does not pay")


def test_continue_goes_on_and_fail_ends_the_job() -> None:
    assert gated(left(0, "quantize", 0.6), recipe({**QUANTIZE, "on_miss": "continue"}), BASELINE).status == "succeeded"
    with pytest.raises(StageFailed, match=r"stage 0 \(quantize\): max_drop of dice") as ended:
        gated(left(0, "quantize", 0.6), recipe({**QUANTIZE, "on_miss": "fail"}), BASELINE)
    assert ended.value.code == "goal_missed"


def engine(precision: str) -> StageReport:
    row = measured(engine="openvino", precision=precision, dice=0.9)
    kept = Candidate(
        engine="openvino",
        precision=precision,
        measurement=row,
        agreement=agreement(),
        kept=True,
        reason="the fastest of 3",
    )
    target = TargetReport(
        target="cpu-fastest",
        engine="openvino",
        precision=precision,
        evaluated=True,
        engine_bytes=10,
        measurement=row,
        agreement=agreement(),
        candidates=[kept],
        goals=[],
        verdict="met",
        reason="the fastest of 3",
    )
    return left(1, "build_engine", 0.9, measurement=row, candidates=[kept], targets=[target])


def test_where_int8_is_a_must_a_float_engine_ends_the_job() -> None:
    words = recipe({**QUANTIZE, "on_miss": "fail"}, BUILD)
    with pytest.raises(StageFailed, match=r"stage 0 \(quantize\): no quantized engine .* the fastest of 3"):
        gated(engine("bf16"), words, BASELINE)
    assert gated(engine("int8+bf16"), words, BASELINE).status == "succeeded"
    assert gated(engine("bf16"), recipe(QUANTIZE, BUILD), BASELINE).status == "succeeded"
