"""What a job tells: every figure with its method, every stage against the baseline, and one verdict."""

from __future__ import annotations

from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from shared.recipe import Goal, Preprocessing, Recipe

Outcome = Literal["met", "missed", "not_shown", "not_evaluated"]
Verdict = Literal["met", "missed", "not_shown", "not_evaluated", "no_gain"]
StageOutcome = Literal["succeeded", "dropped", "failed", "cached", "skipped"]


class Lines(BaseModel):
    """Base of the report's parts: immutable, nothing unknown, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(Lines):
    """How a measurement was taken: without it a number says nothing."""

    engine: str = Field(examples=["torch eager", "onnxruntime", "openvino"])
    precision: str = Field(examples=["fp32", "int8", "int8+bf16"])
    device: str = Field(examples=["cpu: AMD EPYC 9R14"])
    threads: int
    batch: int = Field(description="Batch size that latency_ms and peak_memory_bytes were measured at.")
    warm_up: int = Field(description="Runs before the first that counts.")
    runs: int = Field(description="Runs behind latency_ms.")
    samples: int = Field(description="Evaluation samples behind the metrics.")
    versions: dict[str, str]


class Latency(Lines):
    """Milliseconds a batch, by percentile over the runs. p99 needs 500 runs."""

    p50: float
    p90: float
    p99: float | None = None


class Ratio(Lines):
    """A ratio of two medians with its 95 % interval, from blocks of runs that took turns."""

    value: float
    low: float
    high: float


class Bound(Lines):
    """How sure a quality figure is: its value, and where it may truly lie on its worse side, at 95 % (one-sided).

    Of a max_drop the value is what was lost, paired sample by sample with the source model, and the bound lies above
    it. Of a threshold it is the metric itself. `groups` are independent: samples, or groups of samples.
    """

    metric: str
    kind: Literal["threshold", "max_drop"]
    value: float
    bound: float
    groups: int
    samples: int | None = Field(default=None, description="Samples in the groups; null: the whole evaluation part.")
    method: str = Field(examples=["Tango score interval", "bootstrap-t over groups"])


class Measurement(Lines):
    """One model on one engine: how large, how fast, how right.

    `metrics` are the task's means (ratios in 0..1, distances in mm or pixels) and, but for the source model, its
    agreement with the source model's outputs; `class_metrics` by class name; a metric that is not defined on the
    evaluation part is left out. `scores` are per sample, in the part's order, of the metrics that are means of them.
    `speedup` is against the source model, `speedup_over_onnxruntime` against its cleaned fp32 graph in ONNX Runtime;
    both were timed in turns with this model. `baseline_latency_ms` is the source model's latency in those turns.
    """

    parameters: int | None
    macs: int | None = Field(description="Multiply-accumulates of one sample.")
    size_bytes: int
    latency_ms: Latency
    baseline_latency_ms: Latency | None = None
    speedup: Ratio | None = None
    speedup_over_onnxruntime: Ratio | None = None
    throughput_per_second: dict[int, float] = Field(
        default_factory=dict, description="Samples a second, by batch size; of the baseline and of what is delivered."
    )
    peak_memory_bytes: int | None = Field(
        default=None, description="What running it added to a fresh process; of the baseline and of what is delivered."
    )
    metrics: dict[str, float]
    class_metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    scores: dict[str, list[float]] = Field(default_factory=dict)
    bounds: list[Bound] = Field(default_factory=list)
    method: Method


class OutputAgreement(Lines):
    """How close one output is to the reference model's. The largest difference is reported and never judged.

    `kind` is what the output was taken for, which decides what is judged: decisions (scores of classes, or of labels
    that are decided by themselves) or values. `decisions` is the share of equal decisions, `dice` their class-wise
    Dice; null where nothing is decided.
    """

    name: str
    kind: Literal["decisions", "values"]
    rms_error: float = Field(description="Root mean square of the difference, over that of the reference's spread.")
    cosine: float
    max_error: float = Field(description="Largest difference, over the largest reference value.")
    decisions: float | None = None
    dice: float | None = None
    bounds: list[Bound] = Field(default=[], description="Of these figures over other samples, as goals name them.")
    passed: bool
    reason: str | None = Field(default=None, description="Why it did not pass.")


class Agreement(Lines):
    """Closeness of a model's outputs to those of the network it was made of, on real samples.

    Where labels decide it only refuses broken engines (`rule` broken); without labels it is what decides (`rule`
    close).
    """

    samples: int
    rule: Literal["broken", "close"]
    outputs: list[OutputAgreement]

    @property
    def passed(self) -> bool:
        return all(output.passed for output in self.outputs)

    @property
    def reason(self) -> str | None:
        """Why it did not pass, of the first output that did not; None if it did."""
        return next((output.reason for output in self.outputs if not output.passed), None)


class GoalResult(Lines):
    """One goal, what it asks and what was reached; of which target, where the job has several.

    met: the bound lies inside the goal, or the value where there is no bound. missed: the value lies outside.
    not_shown: the value lies inside and the bound does not; about `needed` samples would settle it (groups of them,
    such as patients, where the data names those). `needed` is null where no number of samples would, where no more than
    `compared` samples are compared, and where there is one group alone.
    """

    goal: Goal
    target: str | None = None
    reached: float | None = Field(description="In the goal's own unit; null if it could not be measured.")
    bound: float | None = Field(default=None, description="One-sided 95 % bound of `reached`, on its worse side.")
    method: str | None = Field(default=None, description="How the bound of a quality goal was found.")
    compared: int | None = Field(default=None, description="Samples behind the bound, where that is not all of them.")
    needed: int | None = None
    needed_unit: Literal["samples", "groups"] = "samples"
    outcome: Outcome


class Candidate(Lines):
    """An engine that a build stage considered, kept or not, and why. `form` tells forms of one precision apart."""

    engine: str
    precision: str
    form: str = ""
    measurement: Measurement | None
    agreement: Agreement | None
    goals: list[GoalResult] = Field(default_factory=list)
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
    agreement: Agreement | None
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
    agreement: Agreement | None = None
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
    instruction_sets: list[str] = Field(
        default_factory=list, description="Of the CPU, those that decide an engine's speed.", examples=[["AVX2", "AMX"]]
    )

    def fingerprint(self) -> str:
        """Measurements compare only between equal fingerprints."""
        return f"{self.machine}/{self.cpu}/{self.cores}/{sorted(self.packages.items())}"


class Baseline(Lines):
    """The source model as it came: eager fp32 where it is PyTorch, and its cleaned fp32 graph in ONNX Runtime.

    `doubts` are sentences that say why the source model may not be what its owner thinks.
    """

    source: Measurement
    onnxruntime: Measurement | None
    environment: Environment
    doubts: list[str] = Field(default_factory=list)


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
    goals_assumed: bool = Field(default=False, description="The recipe names no goal; those of `goals` were assumed.")
    goals: list[GoalResult]
    verdict: Verdict
    reason: str = Field(description="The headline: the verdict in words, and what a reader must know beside it.")
    warnings: list[str] = Field(default_factory=list)
