"""What a job tells: every figure with its method, every stage against the baseline, and one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from shared.recipe import LOWER_IS_BETTER, Goal, Preprocessing, Recipe

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
    `baseline_latency_ms` is the source model's latency in the same minutes, timed in turns with this one: a speedup is
    against that. The baseline's own row has none.
    """

    parameters: int | None
    macs: int | None = Field(description="Multiply-accumulates of one sample.")
    size_bytes: int
    latency_ms: Latency
    baseline_latency_ms: Latency | None = None
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
    """One goal, what it asked and what was reached; of which target, where the job has several."""

    goal: Goal
    target: str | None = None
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


class TargetReport(Lines):
    """One target of a build stage: the engine that was chosen for it, its figures, and its own verdict.

    Where the engine cannot run on the machine that built it, it is not `evaluated`: there is no verdict, and the
    figures are those of the ONNX that it was built of, on the engine that their method names. Where no engine could be
    built there are none.
    """

    target: str = Field(examples=["cpu-fastest", "tensorrt-rtx-8.9"])
    engine: str | None
    precision: str | None
    evaluated: bool
    engine_bytes: int | None = Field(description="Size of the files that the runtime loads.")
    measurement: Measurement | None
    device_latency_ms: Latency | None = Field(default=None, description="On the GPU alone, without copies: by events.")
    parity: Parity | None
    candidates: list[Candidate]
    goals: list[GoalResult]
    verdict: Verdict
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
    targets: list[TargetReport] = Field(default_factory=list, description="Of a build stage; the first is delivered.")
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


class Report(Lines):
    """The whole account of one job. `final` is the position of the stage whose model is delivered, if any is."""

    job: UUID
    name: str
    recipe: Recipe
    preprocessing: Preprocessing | None = Field(default=None, description="As it was done: a preset with its numbers.")
    source_sha256: str
    data_sha256: str
    environment: Environment
    baseline: Baseline
    stages: list[StageReport]
    final: int | None
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
    if goal.metric == "latency":
        speedup = speedup_of(baseline, result)
        return speedup if goal.kind == "min_speedup" else 1 / speedup
    before, value = resource(baseline, goal.metric), resource(result, goal.metric)
    return value / before if value is not None and before else None


def speedup_of(baseline: Measurement, result: Measurement) -> float:
    """The baseline's median latency over the result's; more than 1 is faster."""
    return (result.baseline_latency_ms or baseline.latency_ms).p50 / result.latency_ms.p50


def resource(measurement: Measurement, name: str) -> float | None:
    """A measurement's figure by the name that goals use: size, latency, parameters, macs or memory."""
    if name == "latency":
        return measurement.latency_ms.p50
    field = {"size": "size_bytes", "memory": "peak_memory_bytes"}.get(name, name)
    value = getattr(measurement, field)
    return None if value is None else float(value)


def judge_all(goals: Sequence[Goal], baseline: Measurement, delivered: StageReport | None) -> list[GoalResult]:
    """Every goal held against what is delivered, of every target where several were built.

    Nothing was reached if nothing is delivered.
    """
    if delivered is None or delivered.measurement is None:
        return [GoalResult(goal=goal, reached=None, met=None) for goal in goals]
    if not delivered.targets:
        return [judge(goal, baseline, delivered.measurement) for goal in goals]
    several = len(delivered.targets) > 1
    return [
        result.model_copy(update={"target": target.target if several else None})
        for target in delivered.targets
        for result in judge_target(goals, baseline, target)
    ]


def judge_target(goals: Sequence[Goal], baseline: Measurement, target: TargetReport) -> list[GoalResult]:
    """Every goal held against one target's engine; none without one, and not evaluated if it could not be run."""
    if target.engine is None or target.measurement is None:
        return []
    if not target.evaluated:
        return [GoalResult(goal=goal, reached=None, met=None) for goal in goals]
    return [judge(goal, baseline, target.measurement) for goal in goals]


def verdict_of(delivered: StageReport | None, goals: Sequence[GoalResult]) -> Verdict:
    """The job's verdict: that of its targets where engines were built, or of its goals."""
    if delivered is not None and delivered.targets:
        return verdict_of_targets(delivered.targets)
    return verdict(goals, delivered is not None)


def verdict(goals: Sequence[GoalResult], delivered: bool) -> Verdict:
    """`met` only if something is delivered and every goal was measured and met."""
    if not delivered or any(result.met is False for result in goals):
        return "missed"
    return "not_evaluated" if any(result.met is None for result in goals) else "met"


def verdict_of_target(target: TargetReport, goals: Sequence[GoalResult]) -> Verdict:
    """One target's own verdict: missed without an engine, not evaluated where its engine could not be run."""
    if target.engine is not None and not target.evaluated:
        return "not_evaluated"
    return verdict(goals, delivered=target.engine is not None)


def verdict_of_targets(targets: Sequence[TargetReport]) -> Verdict:
    """`met` only if every target that was evaluated met its goals; one that could not be evaluated is not held."""
    held = {target.verdict for target in targets if target.evaluated or target.verdict == "missed"}
    if "missed" in held:
        return "missed"
    return "met" if held == {"met"} else "not_evaluated"
