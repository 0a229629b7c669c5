"""The metrics that a model is judged by: one row each. worker/evaluation/metrics.py computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What a task decides, and of what: a class for each image or voxel, or several independent labels for each.
TaskKey = Literal["classification", "segmentation", "multilabel images", "multilabel voxels"]


@dataclass(frozen=True)
class Metric:
    """One metric. A `ratio` lies in 0..1 and is shown in points (1 point is 0.01), a `distance` in mm or pixels.

    One `on_request` costs much: it is computed where a goal names it, and for the baseline and what is delivered.
    """

    name: str
    unit: Literal["ratio", "distance"]
    higher_is_better: bool
    tasks: tuple[TaskKey, ...]
    description: str
    low: float = 0.0
    high: float | None = 1.0
    on_request: bool = False


_DECIDING_IMAGES: tuple[TaskKey, ...] = ("classification", "multilabel images")
_DECIDING_VOXELS: tuple[TaskKey, ...] = ("segmentation", "multilabel voxels")

# The first that fits a task is its leading metric.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("top1", "ratio", True, ("classification",), "share of right decisions"),
        Metric("auroc", "ratio", True, _DECIDING_IMAGES, "area under the ROC curve, one class against the rest"),
        Metric("balanced_accuracy", "ratio", True, _DECIDING_IMAGES, "mean of the classes' recall"),
        Metric("macro_f1", "ratio", True, _DECIDING_IMAGES, "mean of the classes' F1"),
        Metric("sensitivity", "ratio", True, _DECIDING_IMAGES, "share of a class's samples that are found"),
        Metric("specificity", "ratio", True, _DECIDING_IMAGES, "share of the other samples that are not taken for it"),
        Metric("kappa", "ratio", True, ("classification",), "Cohen's kappa", low=-1.0),
        Metric("ece", "ratio", False, _DECIDING_IMAGES, "expected calibration error, 15 bins"),
        Metric("dice", "ratio", True, _DECIDING_VOXELS, "overlap of found and true voxels"),
        Metric("iou", "ratio", True, _DECIDING_VOXELS, "intersection over union"),
        Metric(
            "hd95", "distance", False, _DECIDING_VOXELS, "95th percentile of the surface distance",
            high=None, on_request=True,
        ),
        Metric(
            "nsd", "ratio", True, _DECIDING_VOXELS, "share of both surfaces within the task's surface_tolerance",
            on_request=True,
        ),
    )
}  # fmt: skip

# Closeness to the source model's outputs, for every task and without labels.
AGREEMENT: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("agreement", "ratio", True, (), "share of decisions that equal the source model's"),
        Metric("fidelity_dice", "ratio", True, (), "class-wise Dice of the decisions with the source model's"),
        Metric("rms_error", "ratio", False, (), "relative RMS difference from the source model's outputs", high=None),
    )
}
ALL = {**METRICS, **AGREEMENT}


def of_task(key: TaskKey | None) -> tuple[str, ...]:
    """Names of the task's metrics, the leading one first; none where nothing is decided."""
    return tuple(metric.name for metric in METRICS.values() if key in metric.tasks)


def higher_is_better(name: str) -> bool:
    return ALL[name].higher_is_better


def loss_of(name: str, before: float, after: float) -> float:
    """What was lost, positive if worse, in the metric's own unit."""
    return before - after if higher_is_better(name) else after - before


def shown(name: str, value: float) -> float:
    """The value as reports show it: a ratio in points, a distance as it is."""
    return 100 * value if ALL[name].unit == "ratio" else value
