"""What a job is about: a source model, the task, and the data, all told as data."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, model_validator

from shared import metrics
from shared.metrics import TaskKey

Part = Literal["train", "calibration", "evaluation"]


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

    library: Literal["torchvision", "monai", "timm"] = Field(description="Whose registry lists the network.")
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


PortName = Annotated[str, Field(min_length=1, max_length=200)]


class OnnxInputs(Words):
    """Of a network of several inputs: the one that takes the images."""

    image: PortName


class OnnxOutputs(Words):
    """Of a network of several outputs: the one that the task is read from; the others are taken out."""

    logits: PortName


class OnnxSource(Words):
    """A network as one ONNX file, of any origin.

    Every other input is a constant or, sample by sample, the data set's tensor `<part>.<input's name>`. Where no
    output is named, all of them stay, and the first is the one that the task is read from.
    """

    onnx: UUID = Field(description="A completed upload in onnx format.")
    inputs: OnnxInputs | None = Field(default=None, description="null: the network has one input, or one of rank 4-5.")
    constants: dict[PortName, JsonValue] = Field(
        default_factory=dict,
        max_length=100,
        description="Values of inputs that are the same for every sample: a number fills the input, lists are taken "
        "as they are.",
    )
    outputs: OnnxOutputs | None = None

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
    """What the network decides, and what its classes are called.

    classification and segmentation: one class for each image or pixel. multilabel: several independent labels, each
    by a sigmoid of its own, for each image or, `per` voxel, for each pixel (structures that overlap).
    raw: nothing is decided, so there are no labels: outputs are compared with the source model's alone.

    The channels of an output are the classes; they may come first or last. Two classes may also have one channel, the
    score of the second.
    """

    kind: Literal["classification", "segmentation", "multilabel", "raw"]
    classes: list[Annotated[str, Field(min_length=1, max_length=80)]] = Field(
        default=[], max_length=1000, description="Names of the classes, or of the labels of a multilabel task."
    )
    background: int | None = Field(
        default=None, ge=0, description="Segmentation: index of the class that the mean metrics leave out."
    )
    scores: Literal["logits", "probabilities"] = Field(
        default="logits",
        description="Of a network of one channel, or of a multilabel task: decided above 0, or above 0.5.",
    )
    per: Literal["image", "voxel"] = Field(default="image", description="Multilabel: what has the labels.")
    thresholds: list[Annotated[float, Field(gt=0, lt=1)]] | None = Field(
        default=None, max_length=1000, description="Multilabel: the probability that decides, by label; null: 0.5."
    )
    spacing: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        min_length=2,
        max_length=3,
        description="Millimetres between voxels, an axis each, for hd95 and nsd; null: distances are in pixels.",
    )
    surface_tolerance: float = Field(
        default=1.0, gt=0, description="Of nsd, in the unit of `spacing`: how far apart two surfaces are still one."
    )

    @model_validator(mode="after")
    def _classes_fit_kind(self) -> Self:
        if self.kind == "raw" and self.classes:
            raise ValueError("a raw task has no classes")
        if self.kind == "multilabel" and not self.classes:
            raise ValueError("a multilabel task names at least one label in classes")
        if self.kind in ("classification", "segmentation") and len(self.classes) < 2:
            raise ValueError(f"a {self.kind} has at least 2 classes")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        if self.background is not None and self.kind != "segmentation":
            raise ValueError("only a segmentation has a background class")
        if self.background is not None and self.background >= len(self.classes):
            raise ValueError(f"background is class {self.background}, but the classes end at {len(self.classes) - 1}")
        return self

    @model_validator(mode="after")
    def _multilabel_words(self) -> Self:
        if self.kind != "multilabel" and (self.per != "image" or self.thresholds is not None):
            raise ValueError("per and thresholds are for a multilabel task")
        if self.thresholds is not None and len(self.thresholds) != len(self.classes):
            raise ValueError(f"thresholds has {len(self.thresholds)} values, classes {len(self.classes)}")
        return self

    @property
    def key(self) -> TaskKey | None:
        """How the table of metrics calls the task."""
        if self.kind == "multilabel":
            return "multilabel voxels" if self.per == "voxel" else "multilabel images"
        return None if self.kind == "raw" else self.kind

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's mean metrics, the leading one first."""
        return metrics.of_task(self.key)

    @property
    def target(self) -> Literal["labels", "masks"] | None:
        """What the data set has beside the images: `<part>.labels`, `<part>.masks`, or nothing."""
        if self.kind == "raw":
            return None
        return "masks" if self.kind == "segmentation" or self.per == "voxel" else "labels"


Side = Annotated[int, Field(ge=1, le=8192)]


class Preprocessing(Words):
    """From stored values to network input: (value * scale - mean) / std, channel by channel.

    `size` (height, width) is what images from a zip are resized to; arrays are used as they are stored. With
    `crop_ratio`, an image is resized until it just covers size / crop_ratio, and its centre of `size` is taken. A
    `preset` stands for all of these but `layout`, as the weights' publisher has written them down; `size` may still be
    given. The layouts are those of volumes too: NCHW means NCDHW, NHWC means NDHWC.
    """

    preset: str | None = Field(
        default=None,
        max_length=200,
        pattern=r"^(torchvision:\w+\.\w+|timm:[\w.]+)$",
        examples=["torchvision:ResNet18_Weights.IMAGENET1K_V1", "timm:resnet18.a1_in1k"],
    )
    size: tuple[Side, Side] | None = None
    crop_ratio: float | None = Field(default=None, gt=0, le=1)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
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

    @model_validator(mode="after")
    def _preset_or_numbers(self) -> Self:
        both = sorted(
            name
            for name in ("crop_ratio", "interpolation", "channels", "scale", "mean", "std")
            if getattr(self, name) != type(self).model_fields[name].default
        )
        if self.preset is not None and both:
            raise ValueError(f"a preset says {', '.join(both)} itself; give the one or the other")
        if self.crop_ratio is not None and self.size is None:
            raise ValueError("crop_ratio is a crop to `size`, which is missing")
        return self


class Data(Words):
    """One data set artifact with its parts, and how a stored value becomes network input.

    safetensors: tensors `<part>.images` (N, C, H, W), or (N, C, D, H, W) for volumes, or with C at the end as `layout`
    says, any real type; `<part>.labels` (N,) or `<part>.masks` (N, [D,] H, W), integers; of a multilabel task
    `<part>.labels` (N, labels) or `<part>.masks` (N, labels, [D,] H, W), 0 or 1; `<part>.groups` (N,), integers, where
    samples belong together, as those of one patient do; and `<part>.<name>` (N, ...) for each other input of an ONNX
    network.
    zip: `<part>/<class>/<file>.png` for classification, `<part>/images/<file>` and `<part>/masks/<file>` with the
    same names for segmentation (a mask's values are class indices), each with or without a folder a group of samples,
    as `<part>/images/<group>/<file>`. A multilabel task takes no zip. Parts: train, calibration, evaluation.
    """

    artifact: UUID
    preprocessing: Preprocessing = Preprocessing()
