"""A report's table, as text, CSV and Markdown: it says what was measured, and of what."""

from __future__ import annotations

import csv
import io
from typing import Any
from uuid import UUID

import pytest

from shared.recipe import Goal
from shared.report import (
    Baseline,
    Candidate,
    GoalResult,
    Latency,
    StageReport,
    TargetReport,
    judge,
    speedup_of,
    verdict_of_targets,
)
from shared.tables import COLUMNS, table, to_csv, to_markdown
from tests.shared.reports import BASELINE, INT8, MACHINE, PARITY, make_report, measured

# ---------------------------------------------------------------- the table


def test_the_table_holds_every_row_against_the_baseline() -> None:
    header, rows = table(make_report())
    assert header == [*COLUMNS, "dice", "dice lost", "hd95", "hd95 lost"]
    expected = """
        baseline       | measured              | torch eager | fp32 | 100.0 | 100.0 | 1.00 | 10.00 | 15.00 | 90.00 | +0.00 | 3.00 | +0.00
        baseline       | measured              | onnxruntime | fp32 | 100.0 | 80.0  | 1.25 | 8.00  | 12.00 | 90.00 | +0.00 | 3.00 | +0.00
        0 quantize     | dropped               | -           | -    | -     | -     | -    | -     | -     | -     | -     | -    | -
        1 build_engine | succeeded (delivered) | onnxruntime | int8 | 25.1  | 25.0  | 4.00 | 2.50  | 3.75  | 89.50 | +0.50 | 3.50 | +0.50
    """  # noqa: E501
    assert rows == [[cell.strip() for cell in line.split("|")] for line in expected.strip().splitlines()]


def test_a_metric_that_a_row_lacks_is_a_dash_and_one_that_the_baseline_lacks_no_column() -> None:
    lacking = StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=measured(auroc=0.9))
    header, rows = table(make_report(stages=[lacking], final=0))
    assert header[-4:] == ["dice", "dice lost", "hd95", "hd95 lost"]
    assert rows[-1][-4:] == ["-", "-", "-", "-"]


def test_a_gain_is_told_as_a_negative_loss() -> None:
    better = StageReport(
        position=0, kind="quantize", status="succeeded", seconds=1, measurement=measured(dice=0.91, hd95=2.0)
    )
    assert table(make_report(stages=[better], final=0))[1][-1][-4:] == ["91.00", "-1.00", "2.00", "-1.00"]


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
    assert "| min_speedup of latency | 3 | 4 | met |" in lines
    assert "- stage 0 (quantize) dropped: Dice fell by 3 points." in lines
    assert "- stage 1 candidate openvino int8: not kept, slower than onnxruntime." in lines
    assert "- stage 1 candidate onnxruntime int8: kept, the fastest." in lines
    assert "5 warm-up and 50 timed runs at batch 1 on 1 thread(s)" in text
    assert "- metrics over 40 evaluation samples" in text
    assert "- EPYC, 2 cores, 8.0 GiB" in lines
    assert "- Python 3.11.9, onnxruntime 1.32.0, torch 2.14.1" in lines
    assert "- seed 7" in lines
    for digest in ("aa" * 32, "bb" * 32, "cc" * 32):
        assert f"sha256 `{digest}`" in text
    assert f"- job `{UUID(int=7)}`" in lines


def test_goals_that_were_missed_or_not_evaluated_say_so() -> None:
    goal = Goal(metric="dice", kind="max_drop", value=0.01)
    goals = [GoalResult(goal=goal, reached=0.0312345, met=False), GoalResult(goal=goal, reached=None, met=None)]
    text = to_markdown(make_report(goals=goals, verdict="missed"))
    assert "| max_drop of dice | 0.01 | 0.03123 | missed |" in text
    assert "| max_drop of dice | 0.01 | - | not evaluated |" in text


def test_a_report_without_goals_or_incidents_has_no_empty_sections() -> None:
    plain = StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=INT8)
    text = to_markdown(make_report(goals=[], stages=[plain], final=0))
    assert "## Goals" not in text
    assert "## What happened" not in text
    assert "None" not in text


def test_a_gpu_is_named_where_there_is_one() -> None:
    assert "8.0 GiB, RTX 4090" in to_markdown(make_report(environment=MACHINE.model_copy(update={"gpu": "RTX 4090"})))


# ---------------------------------------------------------------- several targets


def _target(name: str, engine: str | None, *, evaluated: bool = True, met: bool | None = True, **changes: Any) -> Any:
    verdicts: dict[bool | None, Any] = {True: "met", False: "missed", None: "not_evaluated"}
    goal = Goal(metric="latency", kind="min_speedup", value=3)
    facts: dict[str, Any] = {
        "target": name,
        "engine": engine,
        "precision": "int8" if engine else None,
        "evaluated": evaluated,
        "engine_bytes": 251 if engine else None,
        "measurement": INT8 if engine else None,
        "parity": PARITY if engine else None,
        "candidates": [],
        "goals": [GoalResult(goal=goal, target=name, reached=4.0 if evaluated else None, met=met)],
        "verdict": verdicts[met],
        "reason": "the fastest of 2" if evaluated else "built, and not run here",
    }
    return TargetReport(**{**facts, **changes})


CPU, RTX = _target("cpu-fastest", "onnxruntime"), _target("tensorrt-rtx-8.9", "tensorrt_rtx", evaluated=False, met=None)
FAILED = _target("openvino", None, evaluated=False, met=False, goals=[])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([CPU], "met"),
        ([CPU, RTX], "met"),
        ([RTX], "not_evaluated"),
        ([CPU, FAILED], "missed"),
        ([RTX, FAILED], "missed"),
        ([CPU, _target("openvino", "openvino", met=False)], "missed"),
        ([CPU, _target("openvino", "openvino", met=None)], "not_evaluated"),
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
    assert "| min_speedup of latency (cpu-fastest) | 3 | 4 | met |" in text
    assert "| min_speedup of latency (tensorrt-rtx-8.9) | 3 | - | not evaluated |" in text
    assert "- stage 1 target tensorrt-rtx-8.9: not evaluated, built, and not run here" in text


def test_a_candidate_of_two_targets_is_told_once_and_as_kept() -> None:
    def candidate(kept: bool) -> Candidate:
        return Candidate(
            engine="openvino", precision="int8", measurement=None, parity=None, kept=kept, reason=f"kept is {kept}"
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


def test_a_speedup_is_of_the_baseline_that_was_timed_beside_it() -> None:
    beside = INT8.model_copy(update={"baseline_latency_ms": Latency(p50=7.5, p90=8, p99=9)})
    assert speedup_of(BASELINE, beside) == 3.0
    assert judge(Goal(metric="latency", kind="min_speedup", value=3.5), BASELINE, beside).met is False
    ratio = judge(Goal(metric="latency", kind="max_ratio", value=0.4), BASELINE, beside)
    assert ratio.reached == pytest.approx(1 / 3)
    stage = StageReport(position=1, kind="build_engine", status="succeeded", seconds=2, measurement=beside)
    assert table(make_report(stages=[stage]))[1][-1][5:7] == ["33.3", "3.00"]
