"""The language of a job: what model, what data, which stages, and what must come out.

A new stage is one class here, its name in the union `Stage`, and one module in worker/stages. Everything is data:
nothing in a recipe is ever executed, imported or unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Discriminator, Field, model_validator

from shared.subject import (
    Architecture,
    Data,
    ModelFormat,
    OnnxInputs,
    OnnxOutputs,
    OnnxSource,
    Part,
    Preprocessing,
    Source,
    Task,
    TorchSource,
    Words,
)
from shared.targets import Batches, Target, engines_of, name_of
from shared.training import Augmentation, Ratio, SoftTargets, Training

__all__ = [
    "LOWER_IS_BETTER",
    "QUALITY",
    "RESOURCES",
    "Architecture",
    "Augmentation",
    "Benchmark",
    "BuildEngine",
    "Data",
    "Distill",
    "ExportOnnx",
    "Goal",
    "ImportOnnx",
    "ModelFormat",
    "OnnxInputs",
    "OnnxOutputs",
    "OnnxSource",
    "Part",
    "Preprocessing",
    "Prune",
    "Quantize",
    "Ratio",
    "Recipe",
    "SoftTargets",
    "Source",
    "Stage",
    "StageSpec",
    "Task",
    "TorchSource",
    "Training",
    "Words",
    "stage_kinds",
]


# ---------------------------------------------------------------- stages


class StageSpec(Words):
    """What every stage has: its formats, and what happens when its result misses a quality goal.

    One that `looks_ahead` is told of the stages after it, and depends on them; the others are not.
    """

    consumes: ClassVar[ModelFormat]
    produces: ClassVar[ModelFormat]
    looks_ahead: ClassVar[bool] = False

    on_miss: Literal["keep_best", "continue", "fail"] = Field(
        default="keep_best",
        description="keep_best: mark the stage dropped and go on from the last good model; "
        "continue: go on with the result all the same; fail: end the job.",
    )

    def requirements(self) -> set[str]:
        """What a worker must have to run this stage, beside the stage itself."""
        return set()

    def parts(self) -> set[Part]:
        """Parts of the data set that the stage reads, beside the evaluation part."""
        return set()


class ImportOnnx(StageSpec):
    """From ONNX back to PyTorch, for the stages that train; checked against the source model on real samples."""

    consumes = ModelFormat.ONNX
    produces = ModelFormat.TORCH

    kind: Literal["import_onnx"] = "import_onnx"
    tolerance: float = Field(default=1e-3, gt=0, le=0.1, description="Largest |difference| / largest |output|.")


class Distill(StageSpec):
    """Train a smaller student on the labels and on the source model's soft targets."""

    consumes = ModelFormat.TORCH
    produces = ModelFormat.TORCH

    kind: Literal["distill"] = "distill"
    student: Architecture | None = Field(default=None, description="A network of its own; or give `width`.")
    width: float | None = Field(
        default=None, gt=0, lt=1, description="Derive the student from the source: its channels times this."
    )
    soft_targets: SoftTargets = SoftTargets(temperature=4.0, alpha=0.7)
    training: Training = Training(epochs=40)

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        if (self.student is None) == (self.width is None):
            raise ValueError("give either student (an architecture) or width (a share of the source's channels)")
        return self

    def requirements(self) -> set[str]:
        return set() if self.student is None else {f"library:{self.student.library}"}

    def parts(self) -> set[Part]:
        return {"train"}


class Prune(StageSpec):
    """Remove whole channels (structured pruning), then fine-tune with the unpruned model as teacher."""

    consumes = ModelFormat.TORCH
    produces = ModelFormat.TORCH

    kind: Literal["prune"] = "prune"
    pruning_ratio: float = Field(default=0.5, gt=0, lt=1, description="Share of `budget` that is removed.")
    budget: Literal["channels", "macs"] = "channels"
    importance: Literal["l1", "l2", "batchnorm_scale", "taylor"] = "l2"
    scope: Literal["local", "global"] = "local"
    round_to: int = Field(default=8, ge=1, le=256, description="Channels left are multiples of this.")
    iterations: int = Field(default=1, ge=1, le=20, description="Prune in so many steps, fine-tuning after each.")
    ignored_layers: list[str] = Field(
        default=[],
        max_length=1000,
        description="By name, as in the state_dict. The heads, which give the outputs, always are.",
    )
    soft_targets: SoftTargets | None = Field(default=SoftTargets(), description="null: fine-tune on the labels alone.")
    training: Training | None = Field(default=Training(), description="Fine-tuning; null: none.")

    def parts(self) -> set[Part]:
        return {"train"} if self.training is not None or self.importance == "taylor" else set()


class ExportOnnx(StageSpec):
    """From PyTorch to ONNX with a dynamic batch, checked against the network on real samples."""

    consumes = ModelFormat.TORCH
    produces = ModelFormat.ONNX

    kind: Literal["export_onnx"] = "export_onnx"
    opset: int | None = Field(
        default=None, ge=18, le=23, description="Asked of the exporter; the report says what the file has."
    )
    dynamic_batch: bool = True
    tolerance: float = Field(default=1e-3, gt=0, le=0.1, description="Largest |difference| / largest |output|.")


class Quantize(StageSpec):
    """Fewer bits: int8 (static: calibrated; dynamic: scaled as it runs), or fp16 with fp32 inputs and outputs."""

    consumes = ModelFormat.ONNX
    produces = ModelFormat.ONNX
    looks_ahead = True

    kind: Literal["quantize"] = "quantize"
    scheme: Literal["int8_static", "int8_dynamic", "fp16"] = "int8_static"
    calibration_samples: int = Field(default=128, ge=1, le=100_000)
    calibration_method: Literal["minmax", "entropy", "percentile"] = "minmax"
    accuracy_aware: bool = Field(
        default=True,
        description="Where static int8 misses the tolerance or a quality goal on calibration samples, put the layers "
        "that it hurts most back into float one by one.",
    )
    max_float_layers: int = Field(default=8, ge=1, le=1000, description="The most layers that may go back.")
    training: Training | None = Field(
        default=None,
        description="Quantization-aware training, where int8_static still misses the tolerance or a quality goal, or "
        "meets them only with so many layers in float that it does not pay; null: none.",
    )
    soft_targets: SoftTargets | None = Field(
        default=SoftTargets(), description="The teacher is the same network in float; null: the labels alone."
    )
    tolerance: float = Field(default=0.2, gt=0, le=1, description="Largest |difference| / largest |output|.")

    @model_validator(mode="after")
    def _training_is_for_static(self) -> Self:
        if self.training is not None and self.scheme != "int8_static":
            raise ValueError(f"training is for int8_static; {self.scheme} has no ranges that a network could learn")
        return self

    def requirements(self) -> set[str]:
        return {"engine:onnxruntime", "engine:openvino"} if self.scheme == "int8_static" else {"engine:onnxruntime"}

    def parts(self) -> set[Part]:
        if self.scheme != "int8_static":
            return set()
        return {"calibration"} if self.training is None else {"calibration", "train"}


class BuildEngine(StageSpec):
    """One engine a target: every candidate is checked against the source model and measured, the fastest is kept."""

    consumes = ModelFormat.ONNX
    produces = ModelFormat.ENGINE

    kind: Literal["build_engine"] = "build_engine"
    targets: list[Target] = Field(
        default=["cpu-fastest"],
        min_length=1,
        max_length=8,
        examples=[["cpu-fastest", {"target": "tensorrt-rtx", "compute_capability": "8.9"}]],
    )
    batches: Batches = Field(default=Batches(), description="Batch sizes of a TensorRT engine.")
    workspace_bytes: int | None = Field(
        default=None, ge=2**20, description="GPU memory that TensorRT may use while it runs; null: all there is."
    )
    tolerance: float = Field(default=0.2, gt=0, le=1, description="Largest |difference| / largest |output|.")

    @model_validator(mode="after")
    def _targets_once(self) -> Self:
        names = [name_of(target) for target in self.targets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the target {twice} is named twice")
        return self

    @property
    def engines(self) -> tuple[str, ...]:
        """The runtimes that are built, each once."""
        return tuple(dict.fromkeys(engine for target in self.targets for engine in engines_of(target)))

    def requirements(self) -> set[str]:
        return {f"engine:{engine}" for engine in self.engines}


Stage = Annotated[ImportOnnx | Distill | Prune | ExportOnnx | Quantize | BuildEngine, Discriminator("kind")]


# ---------------------------------------------------------------- goals


class Goal(Words):
    """What the result must reach, in the metric's own unit: one point of Dice is 0.01.

    threshold: the metric itself; max_drop: what may be lost against the baseline (both are quality goals, and gate
    every stage). min_speedup: baseline's median latency over the result's; max_ratio: the result over the baseline
    (both are checked on what the job delivers).
    """

    metric: str = Field(examples=["dice", "latency", "size"])
    kind: Literal["threshold", "max_drop", "min_speedup", "max_ratio"]
    value: float = Field(gt=0)

    @model_validator(mode="after")
    def _metric_fits_kind(self) -> Self:
        if self.kind == "min_speedup" and self.metric != "latency":
            raise ValueError(f"min_speedup is a goal of latency, not of {self.metric!r}")
        if self.kind == "max_ratio" and self.metric not in RESOURCES:
            raise ValueError(f"max_ratio is a goal of {', '.join(RESOURCES)}, not of {self.metric!r}")
        if self.is_quality and self.metric not in QUALITY:
            raise ValueError(f"{self.kind} is a goal of {', '.join(QUALITY)}, not of {self.metric!r}")
        if self.is_quality and self.metric != "hd95" and self.value > 1:
            raise ValueError(f"{self.metric} lies between 0 and 1, so {self.value} is never reached: 1 point is 0.01")
        return self

    @property
    def is_quality(self) -> bool:
        return self.kind in ("threshold", "max_drop")


RESOURCES = ("size", "latency", "parameters", "macs", "memory")
QUALITY = ("dice", "iou", "hd95", "top1", "auroc")
LOWER_IS_BETTER = frozenset({"hd95"})


# ---------------------------------------------------------------- the recipe


class Benchmark(Words):
    """How speed is measured: the same for the baseline and for every stage."""

    threads: int = Field(default=1, ge=1, le=64)
    batches: list[Annotated[int, Field(ge=1, le=256)]] = Field(
        default=[1, 8], min_length=1, max_length=6, description="The first is the one that latency is told at."
    )
    warm_up: int = Field(default=5, ge=1, le=100)
    runs: int = Field(default=50, ge=10, le=10_000)


class Recipe(Words):
    """A source model, the data, an ordered list of stages, and the goals: one job's whole order."""

    source: Source
    task: Task = Field(default=Task(kind="raw"), description="Left out: raw; then parity and speed are all there is.")
    data: Data
    stages: list[Stage] = Field(min_length=1, max_length=20)
    goals: list[Goal] = Field(default=[], max_length=20)
    benchmark: Benchmark = Benchmark()
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _stages_chain(self) -> Self:
        held = self.source.format
        for position, stage in enumerate(self.stages):
            if stage.consumes != held:
                raise ValueError(
                    f"stage {position} ({stage.kind}) needs {stage.consumes}, but holds {held}"
                    + _how_to_get(stage, held)
                )
            held = stage.produces
        return self

    @model_validator(mode="after")
    def _quantize_once(self) -> Self:
        quantized = [position for position, stage in enumerate(self.stages) if stage.kind == "quantize"]
        if len(quantized) > 1:
            raise ValueError(f"stages {quantized[0]} and {quantized[1]} both quantize; a model is quantized once")
        return self

    @model_validator(mode="after")
    def _goals_fit_task(self) -> Self:
        for goal in self.goals:
            if goal.is_quality and not self.task.metrics:
                raise ValueError(f"a goal of {goal.metric} needs a task, for without one nothing can be evaluated")
            if goal.is_quality and goal.metric not in self.task.metrics:
                raise ValueError(
                    f"{goal.metric} is not a metric of {self.task.kind}; choose of {', '.join(self.task.metrics)}"
                )
        return self

    @model_validator(mode="after")
    def _class_weights_fit_task(self) -> Self:
        for position, stage in enumerate(self.stages):
            training = getattr(stage, "training", None)
            weights = training.class_weights if isinstance(training, Training) else None
            if weights is not None and len(weights) != len(self.task.classes):
                raise ValueError(
                    f"stage {position} ({stage.kind}) has {len(weights)} class_weights, "
                    f"the task {len(self.task.classes)} classes"
                )
        return self

    @model_validator(mode="after")
    def _training_has_labels(self) -> Self:
        for position, stage in enumerate(self.stages):
            if self.task.target is None and "train" in stage.parts():
                raise ValueError(f"stage {position} ({stage.kind}) trains on labels, which need a task")
        return self

    def parts(self) -> set[Part]:
        """Parts of the data set that the job reads."""
        needed: set[Part] = {"evaluation"}
        return needed.union(*(stage.parts() for stage in self.stages))

    def requirements(self) -> list[str]:
        """What a worker must be able to do to run this job, sorted."""
        needed = {f"stage:{stage.kind}" for stage in self.stages}
        needed |= {"engine:onnxruntime"}
        if isinstance(self.source, TorchSource):
            needed.add(f"library:{self.source.architecture.library}")
        return sorted(needed.union(*(stage.requirements() for stage in self.stages)))


def _how_to_get(stage: StageSpec, held: ModelFormat) -> str:
    wanted = stage.consumes
    if wanted == ModelFormat.ONNX and held == ModelFormat.TORCH:
        return ": put an export_onnx stage before it"
    if held == ModelFormat.ONNX and stage.produces == wanted:
        return ": put an import_onnx stage before it"
    if held == ModelFormat.ENGINE:
        return ": build_engine must be the last stage"
    return f": it is {held} already, so leave it out"


def stage_kinds() -> dict[str, type[StageSpec]]:
    """Every stage kind of the language with its class, read from the union above."""
    members: Sequence[type[StageSpec]] = Stage.__origin__.__args__  # type: ignore[attr-defined]
    return {member.model_fields["kind"].default: member for member in members}
