"""Reports: goals judged in the right direction, one verdict, and a table that says what was measured."""

from __future__ import annotations

import csv
import io
from typing import Any
from uuid import UUID

import pytest
from pydantic import ValidationError

from shared.recipe import Goal, Recipe
from shared.report import (
    ArtifactNote,
    Baseline,
    Candidate,
    Environment,
    GoalResult,
    Latency,
    Measurement,
    Method,
    Parity,
    Report,
    StageReport,
    TargetReport,
    judge,
    judge_all,
    metric_loss,
    resource,
    speedup_of,
    verdict,
    verdict_of,
    verdict_of_targets,
)
from shared.tables import COLUMNS, table, to_csv, to_markdown

RECIPE = Recipe.model_validate(
    {
        "source": {"onnx": "01990000-0000-7000-8000-000000000001"},
        "task": {"kind": "segmentation", "classes": ["other", "lesion"], "background": 0},
        "data": {"artifact": "01990000-0000-7000-8000-000000000002"},
        "stages": [{"kind": "quantize"}, {"kind": "build_engine"}],
        "seed": 7,
    }
)
MACHINE = Environment(
    machine="x86_64",
    cpu="EPYC",
    cores=2,
    memory_bytes=2**33,
    gpu=None,
    python="3.11.9",
    packages={"torch": "2.14.1", "onnxruntime": "1.32.0"},
)
PARITY = Parity(
    samples=8, max_abs_error=0.1, relative_error=0.02, agreement_ratio=0.99, tolerance=0.2, passed=True
)


def _measured(
    p50: float = 10.0,
    size_bytes: int = 1000,
    engine: str = "torch eager",
    precision: str = "fp32",
    parameters: int | None = 100,
    peak_memory_bytes: int | None = 500,
    **metrics: float,
) -> Measurement:
    method = Method(
        engine=engine,
        precision=precision,
        device="cpu: EPYC",
        threads=1,
        batch=1,
        warm_up=5,
        runs=50,
        samples=40,
        versions={},
    )
    return Measurement(
        parameters=parameters,
        macs=2000,
        size_bytes=size_bytes,
        latency_ms=Latency(p50=p50, p90=1.1 * p50, p99=1.5 * p50),
        throughput_per_second={1: 1000 / p50},
        peak_memory_bytes=peak_memory_bytes,
        metrics=metrics,
        method=method,
    )


BASELINE = _measured(dice=0.9, hd95=3.0)
INT8 = _measured(2.5, 251, "onnxruntime", "int8", dice=0.895, hd95=3.5)


def _report(**changes: Any) -> Report:
    goal = Goal(metric="latency", kind="min_speedup", value=3)
    facts: dict[str, Any] = {
        "job": UUID(int=7),
        "name": "brain-mri",
        "recipe": RECIPE,
        "source_sha256": "aa" * 32,
        "data_sha256": "bb" * 32,
        "environment": MACHINE,
        "baseline": Baseline(
            source=BASELINE,
            onnxruntime=_measured(8.0, engine="onnxruntime", dice=0.9, hd95=3.0),
            environment=MACHINE,
        ),
        "stages": [
            StageReport(position=0, kind="quantize", status="dropped", reason="Dice fell by 3 points.", seconds=1.0),
            StageReport(
                position=1,
                kind="build_engine",
                status="succeeded",
                seconds=2.0,
                measurement=INT8,
                candidates=[
                    Candidate(
                        engine="openvino",
                        precision="int8",
                        measurement=None,
                        parity=PARITY,
                        kept=False,
                        reason="slower than onnxruntime.",
                    ),
                    Candidate(
                        engine="onnxruntime",
                        precision="int8",
                        measurement=INT8,
                        parity=PARITY,
                        kept=True,
                        reason="the fastest.",
                    ),
                ],
                artifacts=[
                    ArtifactNote(role="engine", format="zip", name="engine.zip", sha256="cc" * 32, size_bytes=251)
                ],
            ),
        ],
        "final": 1,
        "goals": [GoalResult(goal=goal, reached=4.0, met=True)],
        "verdict": "met",
        "reason": "Every goal is met.",
    }
    return Report(**{**facts, **changes})


# ---------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("kind", "metric", "value", "reached", "met"),
    [
        ("max_drop", "dice", 0.006, 0.005, True),
        ("max_drop", "dice", 0.004, 0.005, False),
        ("threshold", "dice", 0.894, 0.895, True),
        ("threshold", "dice", 0.896, 0.895, False),
        ("max_drop", "hd95", 0.5, 0.5, True),
        ("max_drop", "hd95", 0.4, 0.5, False),
        ("threshold", "hd95", 3.5, 3.5, True),
        ("threshold", "hd95", 3.4, 3.5, False),
        ("min_speedup", "latency", 4.0, 4.0, True),
        ("min_speedup", "latency", 4.1, 4.0, False),
        ("max_ratio", "latency", 0.25, 0.25, True),
        ("max_ratio", "latency", 0.24, 0.25, False),
        ("max_ratio", "size", 0.251, 0.251, True),
        ("max_ratio", "size", 0.25, 0.251, False),
        ("max_ratio", "parameters", 0.5, 1.0, False),
        ("max_ratio", "memory", 1.0, 1.0, True),
        ("max_ratio", "macs", 1.0, 1.0, True),
    ],
)
def test_a_goal_is_judged_in_its_metrics_direction(
    kind: Any, metric: str, value: float, reached: float, met: bool
) -> None:
    result = judge(Goal(metric=metric, kind=kind, value=value), BASELINE, INT8)
    assert result.reached == pytest.approx(reached)
    assert result.met is met


def test_a_gain_is_a_negative_loss_and_never_misses_a_drop() -> None:
    better = _measured(dice=0.95, hd95=2.0)
    for metric, gained in (("dice", -0.05), ("hd95", -1.0)):
        result = judge(Goal(metric=metric, kind="max_drop", value=0.001), BASELINE, better)
        assert result.reached == pytest.approx(gained)
        assert result.met is True


@pytest.mark.parametrize(
    ("goal", "baseline", "result"),
    [
        (Goal(metric="dice", kind="max_drop", value=0.01), BASELINE, _measured()),
        (Goal(metric="dice", kind="max_drop", value=0.01), _measured(), INT8),
        (Goal(metric="dice", kind="threshold", value=0.8), BASELINE, _measured()),
        (Goal(metric="memory", kind="max_ratio", value=0.5), BASELINE, _measured(peak_memory_bytes=None)),
        (Goal(metric="memory", kind="max_ratio", value=0.5), _measured(peak_memory_bytes=0), INT8),
        (Goal(metric="parameters", kind="max_ratio", value=0.5), _measured(parameters=None), INT8),
    ],
)
def test_what_was_not_measured_is_neither_met_nor_missed(goal: Goal, baseline: Any, result: Any) -> None:
    judged = judge(goal, baseline, result)
    assert (judged.reached, judged.met) == (None, None)


def test_a_threshold_needs_no_baseline() -> None:
    assert judge(Goal(metric="dice", kind="threshold", value=0.8), _measured(), INT8).met is True


def test_a_loss_is_positive_where_it_got_worse() -> None:
    assert metric_loss("dice", 0.9, 0.8) == pytest.approx(0.1)
    assert metric_loss("hd95", 3.0, 4.0) == pytest.approx(1.0)


def test_resources_are_named_as_goals_name_them() -> None:
    names = ("size", "latency", "parameters", "macs", "memory")
    assert [resource(BASELINE, name) for name in names] == [1000, 10, 100, 2000, 500]


def _results(*met: bool | None) -> list[GoalResult]:
    goal = Goal(metric="dice", kind="threshold", value=0.5)
    return [GoalResult(goal=goal, reached=None, met=entry) for entry in met]


@pytest.mark.parametrize(
    ("met", "delivered", "expected"),
    [
        ((), True, "met"),
        ((), False, "missed"),
        ((True, True), True, "met"),
        ((True, False), True, "missed"),
        ((True, True), False, "missed"),
        ((True, None), True, "not_evaluated"),
        ((None, False), True, "missed"),
        ((None,), False, "missed"),
    ],
)
def test_the_verdict_is_met_only_if_everything_was_measured_and_met(
    met: tuple[bool | None, ...], delivered: bool, expected: str
) -> None:
    assert verdict(_results(*met), delivered) == expected


# ---------------------------------------------------------------- the table


def test_the_table_holds_every_row_against_the_baseline() -> None:
    header, rows = table(_report())
    assert header == [*COLUMNS, "dice", "dice lost", "hd95", "hd95 lost"]
    expected = """
        baseline       | measured              | torch eager | fp32 | 100.0 | 100.0 | 1.00 | 10.00 | 15.00 | 90.00 | +0.00 | 3.00 | +0.00
        baseline       | measured              | onnxruntime | fp32 | 100.0 | 80.0  | 1.25 | 8.00  | 12.00 | 90.00 | +0.00 | 3.00 | +0.00
        0 quantize     | dropped               | -           | -    | -     | -     | -    | -     | -     | -     | -     | -    | -
        1 build_engine | succeeded (delivered) | onnxruntime | int8 | 25.1  | 25.0  | 4.00 | 2.50  | 3.75  | 89.50 | +0.50 | 3.50 | +0.50
    """  # noqa: E501
    assert rows == [[cell.strip() for cell in line.split("|")] for line in expected.strip().splitlines()]


def test_a_metric_that_a_row_lacks_is_a_dash_and_one_that_the_baseline_lacks_no_column() -> None:
    lacking = StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=_measured(auroc=0.9))
    header, rows = table(_report(stages=[lacking], final=0))
    assert header[-4:] == ["dice", "dice lost", "hd95", "hd95 lost"]
    assert rows[-1][-4:] == ["-", "-", "-", "-"]


def test_a_gain_is_told_as_a_negative_loss() -> None:
    better = StageReport(
        position=0, kind="quantize", status="succeeded", seconds=1, measurement=_measured(dice=0.91, hd95=2.0)
    )
    assert table(_report(stages=[better], final=0))[1][-1][-4:] == ["91.00", "-1.00", "2.00", "-1.00"]


def test_without_an_onnx_baseline_there_is_one_baseline_row() -> None:
    report = _report(baseline=Baseline(source=BASELINE, onnxruntime=None, environment=MACHINE))
    assert [row[0] for row in table(report)[1]] == ["baseline", "0 quantize", "1 build_engine"]


def test_the_csv_is_the_table() -> None:
    report = _report()
    text = to_csv(report)
    header, rows = table(report)
    assert list(csv.reader(io.StringIO(text))) == [header, *rows]
    assert text.count("\r\n") == len(rows) + 1


def test_the_markdown_tells_all_of_it() -> None:
    text = to_markdown(_report())
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
    text = to_markdown(_report(goals=goals, verdict="missed"))
    assert "| max_drop of dice | 0.01 | 0.03123 | missed |" in text
    assert "| max_drop of dice | 0.01 | - | not evaluated |" in text


def test_a_report_without_goals_or_incidents_has_no_empty_sections() -> None:
    plain = StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=INT8)
    text = to_markdown(_report(goals=[], stages=[plain], final=0))
    assert "## Goals" not in text
    assert "## What happened" not in text
    assert "None" not in text


def test_speed_goals_are_judged_by_what_was_timed_in_turns() -> None:
    goals = [Goal(metric="latency", kind="min_speedup", value=3), Goal(metric="latency", kind="max_ratio", value=0.5)]
    apart = judge_all(goals, _measured(12.0), _delivered(_measured(2.0)))
    assert [result.reached for result in apart] == [6.0, pytest.approx(1 / 6)]
    in_turns = _measured(2.0).model_copy(update={"baseline_latency_ms": latency(4.0)})
    together = judge_all(goals, _measured(12.0), _delivered(in_turns))
    assert [(result.reached, result.met) for result in together] == [(2.0, False), (0.5, True)]


def test_nothing_is_reached_where_nothing_is_delivered() -> None:
    goals = [Goal(metric="latency", kind="min_speedup", value=3)]
    assert [result.met for result in judge_all(goals, _measured(), None)] == [None]
    assert verdict_of(None, judge_all(goals, _measured(), None)) == "missed"


def _delivered(measurement: Measurement) -> StageReport:
    return StageReport(position=0, kind="quantize", status="succeeded", seconds=1, measurement=measurement)


def latency(p50: float) -> Latency:
    return Latency(p50=p50, p90=p50, p99=p50)


def test_a_gpu_is_named_where_there_is_one() -> None:
    assert "8.0 GiB, RTX 4090" in to_markdown(_report(environment=MACHINE.model_copy(update={"gpu": "RTX 4090"})))


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
    rows = table(_report(stages=[stage]))[1][2:]
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
    text = to_markdown(_report(stages=[stage], goals=[*CPU.goals, *RTX.goals]))
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
    told = [line for line in to_markdown(_report(stages=[stage])).splitlines() if "candidate" in line]
    assert told == ["- stage 1 candidate openvino int8: kept, kept is True"]


def test_a_speedup_is_of_the_baseline_that_was_timed_beside_it() -> None:
    beside = INT8.model_copy(update={"baseline_latency_ms": Latency(p50=7.5, p90=8, p99=9)})
    assert speedup_of(BASELINE, beside) == 3.0
    assert judge(Goal(metric="latency", kind="min_speedup", value=3.5), BASELINE, beside).met is False
    ratio = judge(Goal(metric="latency", kind="max_ratio", value=0.4), BASELINE, beside)
    assert ratio.reached == pytest.approx(1 / 3)
    stage = StageReport(position=1, kind="build_engine", status="succeeded", seconds=2, measurement=beside)
    assert table(_report(stages=[stage]))[1][-1][5:7] == ["33.3", "3.00"]


# ---------------------------------------------------------------- the report itself


def test_a_report_survives_json() -> None:
    report = _report()
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_report_holds_no_nan(value: float) -> None:
    with pytest.raises(ValidationError):
        _measured(value)
    with pytest.raises(ValidationError):
        _measured(dice=value)


def test_fingerprints_are_equal_on_equal_machines_alone() -> None:
    assert MACHINE.fingerprint() == MACHINE.model_copy(update={"memory_bytes": 1}).fingerprint()
    for change in ({"cpu": "Xeon"}, {"cores": 4}, {"machine": "arm64"}, {"packages": {"torch": "2.13"}}):
        assert MACHINE.model_copy(update=change).fingerprint() != MACHINE.fingerprint()
