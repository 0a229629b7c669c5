"""The language of a job: what model, what data, which stages, and what must come out.

A new stage is one class here, its name in the union `Stage`, and one module in worker/stages. Everything is data:
nothing in a recipe is ever executed, imported or unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Discriminator, Field, model_validator

from shared.goals import ASSUMED_DROP, RESOURCES, Goal
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
    """Train a smaller student on the labels and, where that is better or there are none, the source's soft targets."""

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
    """Remove whole channels (structured pruning), then fine-tune; the unpruned model teaches where that is better."""

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
        description="Where static int8 loses much on calibration samples, also make forms with the layers that lose "
        "most in float: no more of them than it takes.",
    )
    training: Training | None = Field(
        default=None,
        description="Quantization-aware training, where no form of int8_static is good on calibration samples; "
        "null: none.",
    )
    soft_targets: SoftTargets | None = Field(
        default=SoftTargets(teacher="always"),
        description="The teacher is the same network in float; null: the labels alone.",
    )

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


# ---------------------------------------------------------------- the recipe


class Benchmark(Words):
    """How speed is measured: the same for the baseline and for every stage."""

    threads: int = Field(default=1, ge=1, le=64)
    batches: list[Annotated[int, Field(ge=1, le=256)]] = Field(
        default=[1, 8], min_length=1, max_length=6, description="The first is the one that latency is told at."
    )
    warm_up: int = Field(default=5, ge=1, le=100, description="At least so many; more until the latency is steady.")
    runs: int | None = Field(
        default=None,
        ge=10,
        le=10_000,
        description="null: 20 to 200, until the ratio to the source model's latency is known to 2 %; more of a model "
        "that takes less than 2.5 ms.",
    )


class Recipe(Words):
    """A source model, the data, an ordered list of stages, and the goals: one job's whole order."""

    source: Source
    task: Task = Field(
        default=Task(kind="raw"), description="Left out: raw; then closeness to the source's outputs decides."
    )
    data: Data
    stages: list[Stage] = Field(min_length=1, max_length=20)
    goals: list[Goal] = Field(
        default=[],
        max_length=20,
        description="Left out: a max_drop of 0.01 of the task's leading metric; of a raw task, outputs that are close "
        "to the source model's.",
    )
    expect: dict[str, float] = Field(
        default={},
        max_length=10,
        description="What the source model reaches on the evaluation part, by metric; one that reaches clearly less "
        "stops the job, for then preprocessing or weights are not what it was trained with.",
        examples=[{"top1": 0.9}],
    )
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
            if goal.of_agreement:
                continue
            if goal.is_quality and not self.task.metrics:
                raise ValueError(f"a goal of {goal.metric} needs a task, for without one nothing can be evaluated")
            if goal.is_quality and goal.metric not in self.task.metrics:
                raise ValueError(
                    f"{goal.metric} is not a metric of {self.task.kind}; choose of {', '.join(self.task.metrics)}"
                )
        return self

    @model_validator(mode="after")
    def _expectations_fit_task(self) -> Self:
        unknown = [name for name in self.expect if name not in self.task.metrics]
        if unknown:
            known = f"choose of {', '.join(self.task.metrics)}" if self.task.metrics else "a raw task has none"
            raise ValueError(f"expect names {unknown[0]!r}, which is no metric of {self.task.kind}; {known}")
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
            if self.task.target is None and "train" in stage.parts() and not _needs_no_labels(stage):
                raise ValueError(
                    f"stage {position} ({stage.kind}) trains on labels, which need a task; without labels a stage "
                    "learns from the source model alone: soft_targets: {alpha: 1}"
                )
        return self

    @property
    def assumed_goals(self) -> list[Goal]:
        """The goals in force where the recipe names none. Of a raw task closeness to the source's outputs decides."""
        if self.goals or not self.task.metrics:
            return []
        return [Goal(metric=self.task.metrics[0], kind="max_drop", value=ASSUMED_DROP)]

    @property
    def goals_in_force(self) -> list[Goal]:
        """What the job is judged by: its own goals, or the assumed ones."""
        return self.goals or self.assumed_goals

    @property
    def has_quality_goal(self) -> bool:
        """Whether a goal in force says how right a model must be; agreement then only guards against broken engines."""
        return any(goal.is_quality for goal in self.goals_in_force)

    @property
    def wants_fewer_bytes(self) -> bool:
        """Whether a goal is of size or memory, so that a result may be worth having though it is no faster."""
        return any(goal.metric in ("size", "memory") for goal in self.goals)

    def parts(self) -> set[Part]:
        """Parts of the data set that the job reads."""
        needed: set[Part] = {"evaluation"}
        return needed.union(*(stage.parts() for stage in self.stages))

    def parts_without_labels(self) -> set[Part]:
        """Parts of the data set whose labels the job can do without."""
        training = [stage for stage in self.stages if "train" in stage.parts()]
        return {"calibration", "train"} if all(_needs_no_labels(stage) for stage in training) else {"calibration"}

    def requirements(self) -> list[str]:
        """What a worker must be able to do to run this job, sorted."""
        needed = {f"stage:{stage.kind}" for stage in self.stages}
        needed |= {"engine:onnxruntime"}
        if isinstance(self.source, TorchSource):
            needed.add(f"library:{self.source.architecture.library}")
        return sorted(needed.union(*(stage.requirements() for stage in self.stages)))


def _needs_no_labels(stage: StageSpec) -> bool:
    """Whether all that a training stage does can be done with the teacher's outputs in place of labels."""
    soft_targets = getattr(stage, "soft_targets", None)
    ranked_by_loss = isinstance(stage, Prune) and stage.importance == "taylor"
    return isinstance(soft_targets, SoftTargets) and soft_targets.alpha == 1 and not ranked_by_loss


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
