"""What a job tells: every figure with its method, every stage against the baseline, and one verdict."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from shared.recipe import LOWER_IS_BETTER, Goal, Recipe

Verdict = Literal["met", "missed", "not_evaluated"]
StageOutcome = Literal["succeeded", "dropped", "failed", "cached", "skipped"]


class Lines(BaseModel):
    """Base of the report's parts: immutable, nothing unknown, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(Lines):
    """How a measurement was taken: without it a number says nothing."""

    engine: str = Field(examples=["torch eager", "onnxruntime", "openvino"])
    precision: str = Field(examples=["fp32", "int8", "fp16"])
    device: str = Field(examples=["cpu: AMD EPYC 9R14"])
    threads: int
    batch: int = Field(description="Batch size that latency_ms and peak_memory_bytes were measured at.")
    warm_up: int
    runs: int
    samples: int = Field(description="Evaluation samples behind the metrics.")
    versions: dict[str, str]


class Latency(Lines):
    """Milliseconds a batch, by percentile over the runs."""

    p50: float
    p90: float
    p99: float


class Measurement(Lines):
    """One model on one engine: how large, how fast, how right.

    `metrics` are the task's means in 0..1 (hd95 in pixels); `class_metrics` the same by class name; a metric that is
    not defined on the evaluation set is left out. `peak_memory_bytes` is what running it added to a fresh process.
    """

    parameters: int | None
    macs: int | None = Field(description="Multiply-accumulates of one sample.")
    size_bytes: int
    latency_ms: Latency
    throughput_per_second: dict[int, float] = Field(description="Samples a second, by batch size.")
    peak_memory_bytes: int | None
    metrics: dict[str, float]
    class_metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    method: Method


class Parity(Lines):
    """Agreement of a model's raw outputs with the baseline's, on real samples."""

    samples: int
    max_abs_error: float
    relative_error: float = Field(description="max |difference| / max |baseline|")
    agreement_ratio: float = Field(description="Share of decisions (argmax) that are the same, 0..1.")
    tolerance: float = Field(description="Largest relative_error that is accepted.")
    passed: bool


class GoalResult(Lines):
    """One goal, what it asked and what was reached."""

    goal: Goal
    reached: float | None = Field(description="In the goal's own unit; null if it could not be measured.")
    met: bool | None


class Candidate(Lines):
    """An engine that a build stage measured, kept or not, and why."""

    engine: str
    precision: str
    measurement: Measurement | None
    parity: Parity | None
    kept: bool
    reason: str


class ArtifactNote(Lines):
    """A file that a stage leaves, by digest."""

    role: str = Field(examples=["model", "engine", "report", "log"])
    format: str
    name: str
    sha256: str
    size_bytes: int


class StageReport(Lines):
    """What one stage did to the model, measured; `model_format` and `details` say what it left."""

    position: int
    kind: str
    status: StageOutcome
    reason: str | None = None
    seconds: float
    measurement: Measurement | None = None
    parity: Parity | None = None
    gate: list[GoalResult] = Field(default_factory=list)
    candidates: list[Candidate] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict, description="What is particular to the stage: opset, …")
    artifacts: list[ArtifactNote] = Field(default_factory=list)


class Environment(Lines):
    """The machine and the libraries that the figures belong to."""

    machine: str
    cpu: str
    cores: int
    memory_bytes: int
    gpu: str | None
    python: str
    packages: dict[str, str]

    def fingerprint(self) -> str:
        """Measurements compare only between equal fingerprints."""
        return f"{self.machine}/{self.cpu}/{self.cores}/{sorted(self.packages.items())}"


class Baseline(Lines):
    """The source model as it came: eager fp32 where it is PyTorch, and its ONNX in ONNX Runtime."""

    source: Measurement
    onnxruntime: Measurement | None
    environment: Environment


class SideBySide(Lines):
    """The source model and the delivered one, timed in alternation at the job's end: what speed goals are judged on."""

    baseline_ms: Latency
    delivered_ms: Latency

    @property
    def speedup(self) -> float:
        return self.baseline_ms.p50 / self.delivered_ms.p50


class Report(Lines):
    """The whole account of one job. `final` is the position of the stage whose model is delivered, if any is."""

    job: UUID
    name: str
    recipe: Recipe
    source_sha256: str
    data_sha256: str
    environment: Environment
    baseline: Baseline
    stages: list[StageReport]
    final: int | None
    side_by_side: SideBySide | None = None
    goals: list[GoalResult]
    verdict: Verdict
    reason: str = Field(description="One sentence for the verdict.")


# ---------------------------------------------------------------- comparing


def metric_loss(metric: str, baseline: float, value: float) -> float:
    """What was lost against the baseline, positive if worse, in the metric's own unit."""
    return value - baseline if metric in LOWER_IS_BETTER else baseline - value


def judge(goal: Goal, baseline: Measurement, result: Measurement) -> GoalResult:
    """Hold one goal against a measurement and the baseline that was measured beside it."""
    reached = _reached(goal, baseline, result)
    if reached is None:
        return GoalResult(goal=goal, reached=None, met=None)
    higher_is_better = goal.kind == "min_speedup" or (
        goal.kind == "threshold" and goal.metric not in LOWER_IS_BETTER
    )
    met = reached >= goal.value if higher_is_better else reached <= goal.value
    return GoalResult(goal=goal, reached=reached, met=met)


def _reached(goal: Goal, baseline: Measurement, result: Measurement) -> float | None:
    if goal.is_quality:
        value, before = result.metrics.get(goal.metric), baseline.metrics.get(goal.metric)
        if value is None or (goal.kind == "max_drop" and before is None):
            return None
        return value if before is None or goal.kind == "threshold" else metric_loss(goal.metric, before, value)
    if goal.kind == "min_speedup":
        return baseline.latency_ms.p50 / result.latency_ms.p50
    before, value = resource(baseline, goal.metric), resource(result, goal.metric)
    return value / before if value is not None and before else None


def resource(measurement: Measurement, name: str) -> float | None:
    """A measurement's figure by the name that goals use: size, latency, parameters, macs or memory."""
    if name == "latency":
        return measurement.latency_ms.p50
    field = {"size": "size_bytes", "memory": "peak_memory_bytes"}.get(name, name)
    value = getattr(measurement, field)
    return None if value is None else float(value)


def judge_all(
    goals: Sequence[Goal], baseline: Measurement, result: Measurement | None, together: SideBySide | None
) -> list[GoalResult]:
    """Every goal held against what is delivered, speed by the figures that were taken in alternation.

    Nothing was reached if nothing is delivered.
    """
    if result is None:
        return [GoalResult(goal=goal, reached=None, met=None) for goal in goals]
    if together is not None:
        baseline = baseline.model_copy(update={"latency_ms": together.baseline_ms})
        result = result.model_copy(update={"latency_ms": together.delivered_ms})
    return [judge(goal, baseline, result) for goal in goals]


def verdict(goals: list[GoalResult], delivered: bool) -> Verdict:
    """`met` only if something is delivered and every goal was measured and met."""
    if not delivered or any(result.met is False for result in goals):
        return "missed"
    return "not_evaluated" if any(result.met is None for result in goals) else "met"


# ---------------------------------------------------------------- the table


COLUMNS = ("stage", "status", "engine", "precision", "size %", "latency %", "speedup", "p50 ms", "p99 ms")


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """The report's table: header and rows, baseline first, losses in points (hd95 in pixels)."""
    names = [name for name in report.recipe.task.metrics if name in report.baseline.source.metrics]
    header = list(COLUMNS) + [cell for name in names for cell in (name, f"{name} lost")]
    return header, [_row(report, names, *entry) for entry in _entries(report)]


def _entries(report: Report) -> Iterator[tuple[str, str, Measurement | None]]:
    yield "baseline", "measured", report.baseline.source
    if report.baseline.onnxruntime is not None:
        yield "baseline", "measured", report.baseline.onnxruntime
    for stage in report.stages:
        final = " (delivered)" if stage.position == report.final else ""
        yield f"{stage.position} {stage.kind}", stage.status + final, stage.measurement


def _row(report: Report, names: list[str], stage: str, status: str, found: Measurement | None) -> list[str]:
    if found is None:
        return [stage, status] + ["-"] * (len(COLUMNS) - 2 + 2 * len(names))
    source = report.baseline.source
    latency_ratio = found.latency_ms.p50 / source.latency_ms.p50
    row = [stage, status, found.method.engine, found.method.precision]
    row += [f"{100 * found.size_bytes / source.size_bytes:.1f}", f"{100 * latency_ratio:.1f}"]
    row += [f"{1 / latency_ratio:.2f}"]
    row += [f"{found.latency_ms.p50:.2f}", f"{found.latency_ms.p99:.2f}"]
    for name in names:
        value = found.metrics.get(name)
        if value is None:
            row += ["-", "-"]
            continue
        scale = 1 if name in LOWER_IS_BETTER else 100
        row += [f"{scale * value:.2f}", f"{scale * metric_loss(name, source.metrics[name], value):+.2f}"]
    return row


def to_csv(report: Report) -> str:
    """The table as RFC 4180 CSV."""
    header, rows = table(report)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def to_markdown(report: Report) -> str:
    """The whole report for a reader: verdict, table, goals, method, seeds and digests."""
    header, rows = table(report)
    return "\n".join(
        [
            f"# {report.name}: {report.verdict}",
            "",
            report.reason,
            "",
            *_markdown_table(header, rows),
            "",
            *_together_lines(report),
            "Metrics in percent, what was lost in points (hd95 in pixels); + is worse. Size, latency and speedup are "
            "against the baseline's first row.",
            "",
            *_goal_lines(report),
            *_reason_lines(report),
            *_method_lines(report),
        ]
    )


def _together_lines(report: Report) -> list[str]:
    together = report.side_by_side
    if together is None:
        return []
    return [
        f"Timed in alternation at the end: source {together.baseline_ms.p50:.2f} ms, delivered "
        f"{together.delivered_ms.p50:.2f} ms (medians), so {together.speedup:.2f} times as fast. Each row above was "
        "timed when its stage was done.",
        "",
    ]


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _goal_lines(report: Report) -> list[str]:
    if not report.goals:
        return []
    rows = [
        [
            f"{result.goal.kind} of {result.goal.metric}",
            f"{result.goal.value:g}",
            "-" if result.reached is None else f"{result.reached:.4g}",
            {True: "met", False: "missed", None: "not evaluated"}[result.met],
        ]
        for result in report.goals
    ]
    return ["## Goals", "", *_markdown_table(["goal", "asked", "reached", ""], rows), ""]


def _reason_lines(report: Report) -> list[str]:
    lines = [f"- stage {s.position} ({s.kind}) {s.status}: {s.reason}" for s in report.stages if s.reason]
    lines += [
        f"- stage {s.position} candidate {c.engine} {c.precision}: {'kept' if c.kept else 'not kept'}, {c.reason}"
        for s in report.stages
        for c in s.candidates
    ]
    return ["## What happened", "", *lines, ""] if lines else []


def _method_lines(report: Report) -> list[str]:
    method, environment = report.baseline.source.method, report.environment
    packages = ", ".join(f"{name} {version}" for name, version in sorted(environment.packages.items()))
    digests = [
        f"- stage {s.position} {a.role} `{a.name}`: {a.size_bytes} bytes, sha256 `{a.sha256}`"
        for s in report.stages
        for a in s.artifacts
    ]
    return [
        "## How it was measured",
        "",
        f"- {method.warm_up} warm-up and {method.runs} timed runs at batch {method.batch} on {method.threads} "
        f"thread(s); latency is one batch's wall time",
        f"- metrics over {method.samples} evaluation samples, computed on what each row's engine put out",
        f"- {environment.cpu}, {environment.cores} cores, {environment.memory_bytes / 2**30:.1f} GiB"
        + (f", {environment.gpu}" if environment.gpu else ""),
        f"- Python {environment.python}, {packages}",
        f"- seed {report.recipe.seed}",
        "",
        "## Digests",
        "",
        f"- job `{report.job}`",
        f"- source model: sha256 `{report.source_sha256}`",
        f"- data set: sha256 `{report.data_sha256}`",
        *digests,
        "",
    ]
