"""The language of a job: what model, what data, which stages, and what must come out.

A new stage is one class here, its name in the union `Stage`, and one module in worker/stages. Everything is data:
nothing in a recipe is ever executed, imported or unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

Part = Literal["train", "calibration", "evaluation"]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Words(BaseModel):
    """Base of all that a recipe is made of: immutable, no NaN, and an unknown word is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ---------------------------------------------------------------- the source model


class ModelFormat(StrEnum):
    TORCH = "torch"
    ONNX = "onnx"
    ENGINE = "engine"


class Architecture(Words):
    """A network by its name in a library's own registry, built with JSON arguments only."""

    library: Literal["torchvision", "monai"] = Field(description="The library whose registry lists the network.")
    name: str = Field(min_length=1, max_length=100, examples=["BasicUNet", "resnet18"])
    arguments: dict[str, JsonValue] = Field(default_factory=dict, description="Arguments of its constructor.")


class TorchSource(Words):
    """A PyTorch network: its architecture, and its weights as safetensors."""

    architecture: Architecture
    weights: UUID = Field(description="A completed upload in safetensors format: the network's state_dict.")

    @property
    def format(self) -> ModelFormat:
        return ModelFormat.TORCH

    @property
    def artifact_id(self) -> UUID:
        return self.weights


class OnnxSource(Words):
    """A network as one ONNX file."""

    onnx: UUID = Field(description="A completed upload in onnx format.")

    @property
    def format(self) -> ModelFormat:
        return ModelFormat.ONNX

    @property
    def artifact_id(self) -> UUID:
        return self.onnx


def _source_kind(value: Any) -> str:
    if isinstance(value, dict):
        return "onnx" if "onnx" in value else "torch"
    return "onnx" if isinstance(value, OnnxSource) else "torch"


Source = Annotated[
    Annotated[TorchSource, Tag("torch")] | Annotated[OnnxSource, Tag("onnx")], Discriminator(_source_kind)
]


# ---------------------------------------------------------------- task and data


class Task(Words):
    """What the network decides, and what its classes are called."""

    kind: Literal["classification", "segmentation"]
    classes: list[Annotated[str, Field(min_length=1, max_length=80)]] = Field(min_length=2, max_length=1000)
    background: int | None = Field(
        default=None, ge=0, description="Segmentation: index of the class that the mean metrics leave out."
    )

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        if self.background is not None and self.kind != "segmentation":
            raise ValueError("only a segmentation has a background class")
        if self.background is not None and self.background >= len(self.classes):
            raise ValueError(f"background is class {self.background}, but the classes end at {len(self.classes) - 1}")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's mean metrics, the leading one first."""
        return ("dice", "iou", "hd95") if self.kind == "segmentation" else ("top1", "auroc")


class Preprocessing(Words):
    """From stored values to network input: (value * scale - mean) / std, channel by channel.

    `size` (height, width) is what images from a zip are resized to; arrays are used as they are stored.
    """

    size: tuple[Annotated[int, Field(ge=1, le=8192)], Annotated[int, Field(ge=1, le=8192)]] | None = None
    channels: Literal[1, 3] = 1
    scale: float = Field(default=1.0, description="Images of a zip are 0..255: 0.00392156862745098 makes them 0..1.")
    mean: list[float] = Field(default=[0.0], min_length=1, description="One value, or one a channel.")
    std: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0], min_length=1)
    layout: Literal["NCHW", "NHWC"] = Field(default="NCHW", description="The layout that the network expects.")

    @model_validator(mode="after")
    def _one_value_a_channel(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values; give one, or {self.channels} (one a channel)")
        return self


class Data(Words):
    """One data set artifact with its parts, and how a stored value becomes network input.

    safetensors: tensors `<part>.images` (N, C, H, W) or (N, H, W, C) as `layout` says, any real type, and
    `<part>.labels` (N,) or `<part>.masks` (N, H, W), integers.
    zip: `<part>/<class>/<file>.png` for classification, `<part>/images/<file>` and `<part>/masks/<file>` with the
    same names for segmentation (a mask's values are class indices). Parts: train, calibration, evaluation.
    """

    artifact: UUID
    preprocessing: Preprocessing = Preprocessing()


# ---------------------------------------------------------------- stages


class StageSpec(Words):
    """What every stage has: its formats, and what happens when its result misses a quality goal."""

    consumes: ClassVar[ModelFormat]
    produces: ClassVar[ModelFormat]

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
    """Fewer bits: static int8 with calibration (post-training), or fp16 with fp32 inputs and outputs."""

    consumes = ModelFormat.ONNX
    produces = ModelFormat.ONNX

    kind: Literal["quantize"] = "quantize"
    scheme: Literal["int8_static", "fp16"] = "int8_static"
    calibration_samples: int = Field(default=128, ge=1, le=100_000)
    calibration_method: Literal["minmax", "entropy", "percentile"] = "minmax"
    tolerance: float = Field(default=0.2, gt=0, le=1, description="Largest |difference| / largest |output|.")

    def requirements(self) -> set[str]:
        return {"engine:onnxruntime", "engine:openvino"} if self.scheme == "int8_static" else {"engine:onnxruntime"}

    def parts(self) -> set[Part]:
        return {"calibration"} if self.scheme == "int8_static" else set()


class BuildEngine(StageSpec):
    """Engines for the given targets, each checked against the source model on real samples; the fastest is kept."""

    consumes = ModelFormat.ONNX
    produces = ModelFormat.ENGINE

    kind: Literal["build_engine"] = "build_engine"
    targets: list[Literal["onnxruntime", "openvino", "cpu-fastest"]] = Field(
        default=["cpu-fastest"], min_length=1, max_length=1
    )
    tolerance: float = Field(default=0.2, gt=0, le=1, description="Largest |difference| / largest |output|.")

    @property
    def engines(self) -> tuple[str, ...]:
        """The runtimes that are built and compared."""
        target = self.targets[0]
        return ("onnxruntime", "openvino") if target == "cpu-fastest" else (target,)

    def requirements(self) -> set[str]:
        return {f"engine:{engine}" for engine in self.engines}


Stage = Annotated[ExportOnnx | Quantize | BuildEngine, Discriminator("kind")]


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
    task: Task
    data: Data
    stages: list[Stage] = Field(min_length=1, max_length=20)
    goals: list[Goal] = Field(default_factory=list, max_length=20)
    benchmark: Benchmark = Benchmark()
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _stages_chain(self) -> Self:
        held = self.source.format
        for position, stage in enumerate(self.stages):
            if stage.consumes != held:
                raise ValueError(
                    f"stage {position} ({stage.kind}) needs {stage.consumes}, but holds {held}"
                    + _how_to_get(stage.consumes, held)
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
            if goal.is_quality and goal.metric not in self.task.metrics:
                raise ValueError(
                    f"{goal.metric} is not a metric of {self.task.kind}; choose of {', '.join(self.task.metrics)}"
                )
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


def _how_to_get(wanted: ModelFormat, held: ModelFormat) -> str:
    if wanted == ModelFormat.ONNX and held == ModelFormat.TORCH:
        return ": put an export_onnx stage before it"
    if held == ModelFormat.ENGINE:
        return ": build_engine must be the last stage"
    return f": no stage makes {wanted} from {held}, so leave it out or change the source"


def stage_kinds() -> dict[str, type[StageSpec]]:
    """Every stage kind of the language with its class, read from the union above."""
    members: Sequence[type[StageSpec]] = Stage.__origin__.__args__  # type: ignore[attr-defined]
    return {member.model_fields["kind"].default: member for member in members}
