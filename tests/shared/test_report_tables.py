"""A report's table, as text, CSV and Markdown: it says what was measured, and of what."""

from __future__ import annotations

import csv
import io
from typing import Any
from uuid import UUID

import pytest

from shared.judging import verdict_of_targets
from shared.recipe import Goal, Task
from shared.report import (
    Baseline,
    Candidate,
    GoalResult,
    Latency,
    Measurement,
    Ratio,
    Report,
    StageReport,
    TargetReport,
)
from shared.tables import COLUMNS, table, to_csv, to_markdown
from tests.shared.reports import BASELINE, INT8, MACHINE, RECIPE, agreement, bound, make_report, measured

# ---------------------------------------------------------------- the table


def test_the_table_holds_every_row_against_the_baseline() -> None:
    header, rows = table(make_report())
    assert header == [*COLUMNS, "dice", "dice lost"]
    expected = """
        baseline       | measured              | torch eager | fp32 | 100.0 | 100.0 | 1.00 | - | 10.00 | 15.00 | 90.00 |
        baseline       | measured              | onnxruntime | fp32 | 100.0 | 80.0  | 1.25 | - | 8.00  | 12.00 | 90.00 | +0.00
        0 quantize     | dropped               | -           | -    | -     | -     | -    | - | -     | -     | -     | -
        1 build_engine | succeeded (delivered) | onnxruntime | int8 | 25.1  | 25.0  | 4.00 | - | 2.50  | 3.75  | 89.50 | +0.50
    """  # noqa: E501
    assert rows == [[cell.strip() for cell in line.split("|")] for line in expected.strip().splitlines()]


def test_goals_bring_their_metrics_and_what_is_not_asked_for_stays_out() -> None:
    goal = Goal(metric="hd95", kind="max_drop", value=1)
    results = [GoalResult(goal=goal, reached=0.5, outcome="met")]
    header, rows = table(make_report(goals=results))
    assert header[-4:] == ["dice", "dice lost", "hd95", "hd95 lost"]
    assert rows[-1][-4:] == ["89.50", "+0.50", "3.50", "+0.50"]


def test_a_metric_that_a_row_lacks_is_a_dash_and_one_that_the_baseline_lacks_no_column() -> None:
    lacking = StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=measured(auroc=0.9))
    header, rows = table(make_report(stages=[lacking], final=0))
    assert header[-2:] == ["dice", "dice lost"]
    assert rows[-1][-2:] == ["-", "-"]


def test_a_gain_is_told_as_a_negative_loss() -> None:
    better = StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=measured(dice=0.91))
    assert table(make_report(stages=[better], final=0))[1][-1][-2:] == ["91.00", "-1.00"]


def _with_row(row: Measurement, **changes: Any) -> Report:
    stage = StageReport(position=1, kind="build_engine", status="succeeded", seconds=2, measurement=row)
    return make_report(**{"stages": [stage], **changes})


def test_intervals_and_p99_have_a_column_where_they_are_known() -> None:
    sure = INT8.model_copy(
        update={
            "speedup": Ratio(value=4, low=3.9, high=4.1),
            "speedup_over_onnxruntime": Ratio(value=3.2, low=3.1, high=3.3),
            "latency_ms": Latency(p50=2.5, p90=3, p99=4.25),
        }
    )
    header, rows = table(_with_row(sure))
    shown = dict(zip(header, rows[-1], strict=True))
    assert (shown["speedup"], shown["speedup 95 %"]) == ("4.00", "3.90 to 4.10")
    assert shown["over ONNX Runtime fp32"] == "3.20"
    assert shown["p99 ms"] == "4.25"
    assert dict(zip(header, rows[0], strict=True))["p99 ms"] == "-"
    assert not {"speedup 95 %", "p99 ms"} & set(table(make_report())[0])


def test_without_a_task_closeness_to_the_source_has_the_column() -> None:
    raw = RECIPE.model_copy(update={"task": Task(kind="raw")})
    header, rows = table(_with_row(measured(agreement=0.97, rms_error=0.08), recipe=raw, goals=[]))
    assert header[-1] == "rms_error"
    assert [row[-1] for row in rows] == ["-", "-", "8.00"]
    goal = GoalResult(goal=Goal(metric="agreement", kind="threshold", value=0.9), reached=0.97, outcome="met")
    header, rows = table(_with_row(measured(agreement=0.97, rms_error=0.08), recipe=raw, goals=[goal]))
    assert (header[-1], rows[-1][-1]) == ("agreement", "97.00")


def test_without_an_onnx_baseline_there_is_one_baseline_row() -> None:
    report = make_report(baseline=Baseline(source=BASELINE, onnxruntime=None, environment=MACHINE))
    assert [row[0] for row in table(report)[1]] == ["baseline", "0 quantize", "1 build_engine"]


def test_the_csv_is_the_table() -> None:
    report = make_report()
    text = to_csv(report)
    header, rows = table(report)
    assert list(csv.reader(io.StringIO(text))) == [header, *rows]
    assert text.count("\r\n") == len(rows) + 1


def test_the_markdown_tells_all_of_it() -> None:
    text = to_markdown(make_report())
    lines = text.splitlines()
    assert lines[0] == "# brain-mri: met"
    assert "Every goal is met." in lines
    assert "| --- | --- |" in text
    assert "| 1 build_engine | succeeded (delivered) | onnxruntime | int8 | 25.1 | 25.0 | 4.00 |" in text
    assert "| min_speedup of latency | at least 3x | 4x | - | met |" in lines
    assert "- stage 0 (quantize) dropped: Dice fell by 3 points." in lines
    assert "- stage 1 candidate openvino int8: not kept, slower than onnxruntime." in lines
    assert "- stage 1 candidate onnxruntime int8: kept, the fastest." in lines
    assert "at least 5 warm-up and 50 timed runs of the baseline at batch 1 on 1 thread(s)" in text
    assert "- metrics over 40 evaluation samples" in text
    assert "- EPYC, 2 cores, 8.0 GiB" in lines
    assert "- Python 3.11.9, onnxruntime 1.32.0, torch 2.14.1" in lines
    assert "- seed 7" in lines
    for digest in ("aa" * 32, "bb" * 32, "cc" * 32):
        assert f"sha256 `{digest}`" in text
    assert f"- job `{UUID(int=7)}`" in lines


def test_goals_that_were_not_met_say_how_and_what_would_settle_them() -> None:
    goal = Goal(metric="dice", kind="max_drop", value=0.01)
    goals = [
        GoalResult(goal=goal, reached=0.0312345, bound=0.04, outcome="missed"),
        GoalResult(goal=goal, reached=0.002, bound=0.0153, needed=1234, outcome="not_shown"),
        GoalResult(goal=goal, reached=None, outcome="not_evaluated"),
        GoalResult(goal=Goal(metric="latency", kind="at_most", value=30), reached=28.123, outcome="met"),
        GoalResult(goal=Goal(metric="size", kind="max_ratio", value=0.3), reached=0.251, outcome="met"),
        GoalResult(goal=Goal(metric="throughput", kind="at_least", value=100), reached=99.5, outcome="missed"),
    ]
    lines = to_markdown(make_report(goals=goals, verdict="missed")).splitlines()
    for line in (
        "| goal | wanted | reached | 95 % bound | outcome |",
        "| max_drop of dice | at most 1 point | 3.12 points | 4 points | missed |",
        "| max_drop of dice | at most 1 point | 0.2 points | 1.53 points "
        "| not shown, about 1,234 evaluation samples would settle it |",
        "| max_drop of dice | at most 1 point | not measured | - | not evaluated |",
        "| at_most of latency | at most 30 ms | 28.12 ms | - | met |",
        "| max_ratio of size | at most 30 % | 25.1 % | - | met |",
        "| at_least of throughput | at least 100 samples/s | 99.5 samples/s | - | missed |",
        "With 95 % confidence the true figure is no worse than the bound; a goal is met if its bound is inside.",
    ):
        assert line in lines


def test_a_bound_is_told_with_its_method() -> None:
    row = INT8.model_copy(update={"bounds": [bound(0.005, 0.012)]})
    lines = to_markdown(_with_row(row)).splitlines()
    assert "- bound of dice (max_drop): bootstrap-t over samples, from 40 independent samples or groups" in lines


def test_goals_that_were_assumed_and_warnings_are_said() -> None:
    text = to_markdown(make_report(goals_assumed=True, warnings=["Stage 0 (prune): the teacher was of no use."]))
    assert "The recipe names no goal; these were assumed." in text
    assert "- warning: Stage 0 (prune): the teacher was of no use." in text


def test_a_report_without_goals_or_incidents_has_no_empty_sections() -> None:
    plain = StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=INT8)
    text = to_markdown(make_report(goals=[], stages=[plain], final=0))
    assert "## Goals" not in text
    assert "## What happened" not in text
    assert "None" not in text


def test_a_gpu_is_named_where_there_is_one() -> None:
    assert "8.0 GiB, RTX 4090" in to_markdown(make_report(environment=MACHINE.model_copy(update={"gpu": "RTX 4090"})))


# ---------------------------------------------------------------- several targets


def _target(name: str, engine: str | None, verdict: Any = "met", **changes: Any) -> TargetReport:
    goal = Goal(metric="latency", kind="min_speedup", value=3)
    evaluated = engine is not None and verdict != "not_evaluated"
    outcome = "missed" if verdict == "missed" else "met" if evaluated else "not_evaluated"
    facts: dict[str, Any] = {
        "target": name,
        "engine": engine,
        "precision": "int8" if engine else None,
        "evaluated": evaluated,
        "engine_bytes": 251 if engine else None,
        "measurement": INT8 if engine else None,
        "agreement": agreement() if engine else None,
        "candidates": [],
        "goals": [GoalResult(goal=goal, target=name, reached=4.0 if evaluated else None, outcome=outcome)],
        "verdict": verdict,
        "reason": "the fastest of 2" if evaluated else "built, and not run here",
    }
    return TargetReport(**{**facts, **changes})


CPU, RTX = _target("cpu-fastest", "onnxruntime"), _target("tensorrt-rtx-8.9", "tensorrt_rtx", "not_evaluated")
FAILED = _target("openvino", None, "missed", goals=[])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([CPU], "met"),
        ([CPU, RTX], "met"),
        ([RTX], "not_evaluated"),
        ([CPU, FAILED], "missed"),
        ([RTX, FAILED], "missed"),
        ([CPU, _target("openvino", "openvino", "missed")], "missed"),
        ([CPU, _target("openvino", "openvino", "not_evaluated", evaluated=True)], "not_evaluated"),
        ([CPU, _target("openvino", "openvino", "not_shown")], "not_shown"),
        ([CPU, _target("openvino", "openvino", "no_gain")], "no_gain"),
        ([_target("cpu-fastest", "openvino", "not_shown"), _target("openvino", "openvino", "no_gain"), RTX], "no_gain"),
    ],
)
def test_the_verdict_is_of_every_target_that_was_evaluated(targets: list[TargetReport], expected: str) -> None:
    assert verdict_of_targets(targets) == expected


def test_each_target_has_a_row_and_one_that_was_not_run_says_whose_figures_they_are() -> None:
    stage = StageReport(
        position=1, kind="build_engine", status="succeeded", seconds=2, measurement=INT8, targets=[CPU, RTX, FAILED]
    )
    rows = table(make_report(stages=[stage]))[1][2:]
    assert [row[:4] for row in rows] == [
        ["1 build_engine cpu-fastest", "succeeded (delivered)", "onnxruntime", "int8"],
        [
            "1 build_engine tensorrt-rtx-8.9",
            "succeeded (delivered), not evaluated: figures of its ONNX",
            "onnxruntime",
            "int8",
        ],
        ["1 build_engine openvino", "failed", "-", "-"],
    ]


def test_the_markdown_names_the_target_of_each_goal_and_its_verdict() -> None:
    stage = StageReport(
        position=1, kind="build_engine", status="succeeded", seconds=2, measurement=INT8, targets=[CPU, RTX]
    )
    text = to_markdown(make_report(stages=[stage], goals=[*CPU.goals, *RTX.goals]))
    assert "| min_speedup of latency (cpu-fastest) | at least 3x | 4x | - | met |" in text
    assert "| min_speedup of latency (tensorrt-rtx-8.9) | at least 3x | not measured | - | not evaluated |" in text
    assert "- stage 1 target tensorrt-rtx-8.9: not evaluated, built, and not run here" in text


def test_a_candidate_of_two_targets_is_told_once_and_as_kept() -> None:
    def candidate(kept: bool) -> Candidate:
        return Candidate(
            engine="openvino", precision="int8", measurement=None, agreement=None, kept=kept, reason=f"kept is {kept}"
        )

    targets = [
        CPU.model_copy(update={"candidates": [candidate(kept=False)]}),
        _target("openvino", "openvino", candidates=[candidate(kept=True)]),
    ]
    stage = StageReport(
        position=1, kind="build_engine", status="succeeded", seconds=2, measurement=INT8, targets=targets
    )
    told = [line for line in to_markdown(make_report(stages=[stage])).splitlines() if "candidate" in line]
    assert told == ["- stage 1 candidate openvino int8: kept, kept is True"]
