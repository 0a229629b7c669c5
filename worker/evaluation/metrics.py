"""How right a model is on labels: the task's metrics, by class and by sample, in memory bounded by a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from shared.errors import EvaluationEmpty, StageFailed
from shared.metrics import METRICS
from shared.recipe import Task
from worker.data import Samples
from worker.evaluation import overlap, records
from worker.evaluation.outputs import Bools, Ints, ScoresWatch, best_class, class_scores, labels_above, probabilities
from worker.evaluation.overlap import Doubles
from worker.evaluation.records import Records
from worker.feed import Floats, Inputs

__all__ = ["Evaluation", "Records", "Run", "class_scores", "evaluate", "probabilities"]

Run = Callable[[Inputs], Floats]


@dataclass(frozen=True)
class Evaluation:
    """What one model reaches on one part. A metric that is not defined on these samples is left out.

    `scores` are per sample, of the metrics that are means of them; the others are worked out from `records`.
    """

    means: dict[str, float] = field(default_factory=dict)
    by_class: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[str, Doubles] = field(default_factory=dict)
    records: Records | None = None


def evaluate(run: Run, samples: Samples, task: Task, *, requested: Collection[str] = (), batch: int = 8) -> Evaluation:
    """The task's metrics (shared/metrics.py); those on request only where `requested` names them. A raw task has none.

    Means are over samples and classes, without the task's background class.
    Raises EvaluationEmpty, StageFailed (output_mismatch, data_mismatch).
    """
    if len(samples) == 0:
        raise EvaluationEmpty
    if task.key is None:
        return Evaluation()
    if task.target == "labels":
        return _images(run, samples, task, batch)
    names = [name for name in task.metrics if not METRICS[name].on_request or name in requested]
    return _voxels(run, samples, task, names, batch)


# ---------------------------------------------------------------- images


def _images(run: Run, samples: Samples, task: Task, batch: int) -> Evaluation:
    """Classes or labels of whole images: the table of all decisions is kept, one row a sample."""
    scores, labels, watch = [], [], ScoresWatch(task)
    for inputs, targets in samples.batches(batch):
        assert targets is not None
        found = class_scores(watch.seen(run(inputs)), task, targets.shape)
        scores.append(found)  # (batch, classes)
        labels.append(targets)  # (batch,) or (batch, labels)
    watch.check()
    table = _table(np.concatenate(scores), np.concatenate(labels), task)
    names = [name for name in task.metrics if name in records.NAMES]
    values = {name: records.by_class(name, table) for name in names}
    means = {name: records.mean(name, table) for name in names}
    per_sample: dict[str, Doubles] = {}
    if task.kind == "classification":
        per_sample["top1"] = np.asarray((table.truth & table.found).any(axis=1), dtype=np.float64)
        means = {"top1": float(per_sample["top1"].mean()), **means}
        values = {"top1": values["sensitivity"], **values}
    return Evaluation(_defined(means), _by_class(values, task), per_sample, table)


def _table(scores: Floats, labels: Ints, task: Task) -> Records:
    chances = probabilities(scores, task)
    if task.kind == "multilabel":
        return Records(labels.astype(bool), labels_above(scores, task), chances, multilabel=True)
    classes = np.arange(len(task.classes))
    return Records(labels[:, None] == classes, best_class(scores)[:, None] == classes, chances, multilabel=False)


# ---------------------------------------------------------------- voxels


def _voxels(run: Run, samples: Samples, task: Task, names: list[str], batch: int) -> Evaluation:
    """Classes or labels of pixels and voxels: of each sample only its scores are kept."""
    parts, watch = [], ScoresWatch(task)
    for inputs, targets in samples.batches(batch):
        assert targets is not None
        scores = class_scores(watch.seen(run(inputs)), task, targets.shape)
        parts.append(_overlaps(scores, targets, task, names))
    watch.check()
    scores_of = {name: np.concatenate([part[name] for part in parts]) for name in names}  # (n, classes)
    counted = [index for index in range(len(task.classes)) if index != task.background]
    per_sample: dict[str, Doubles] = {
        name: np.asarray(values[:, counted].mean(axis=1)) for name, values in scores_of.items()
    }
    means = {name: float(values.mean()) for name, values in per_sample.items()}
    by_class = _by_class({name: scores_of[name].mean(axis=0) for name in names}, task)
    return Evaluation(_defined(means), by_class, per_sample)


def _overlaps(scores: Floats, targets: Ints, task: Task, names: list[str]) -> dict[str, Doubles]:
    """Scores of a batch, (n, classes) each."""
    classes = range(len(task.classes))
    if task.kind == "multilabel":
        labels, true_labels = labels_above(scores, task), targets.astype(bool)
        counts = overlap.count_labels(labels, true_labels)
        masks = ((labels[:, index], true_labels[:, index]) for index in classes)
    else:
        found = best_class(scores)
        counts = overlap.count_classes(found, targets, len(classes))
        masks = ((found == index, targets == index) for index in classes)
    values = {"dice": overlap.dice(*counts), "iou": overlap.iou(*counts)}
    if "hd95" in names or "nsd" in names:
        values |= _surfaces(list(masks), task, scores.ndim - 2)
    return {name: values[name] for name in names}


def _surfaces(masks: list[tuple[Bools, Bools]], task: Task, axes: int) -> dict[str, Doubles]:
    """hd95 and nsd (n, classes) of found and true masks by class; NaN for the background, the rest of all."""
    spacing = _spacing(task, axes)
    values = np.full((len(masks[0][0]), len(masks), 2), np.nan)
    for index, (found, truth) in enumerate(masks):
        if index != task.background:
            for sample in range(len(found)):
                values[sample, index] = overlap.surface_scores(
                    found[sample], truth[sample], spacing, task.surface_tolerance
                )
    return {"hd95": values[..., 0], "nsd": values[..., 1]}


def _spacing(task: Task, axes: int) -> list[float]:
    if task.spacing is not None and len(task.spacing) != axes:
        raise StageFailed(
            f"task.spacing has {len(task.spacing)} values, but the masks have {axes} axes.", code="data_mismatch"
        )
    return task.spacing or [1.0] * axes


# ---------------------------------------------------------------- both


def _by_class(values: dict[str, Doubles | None], task: Task) -> dict[str, dict[str, float]]:
    return {
        name: _defined({metric: float(found[index]) for metric, found in values.items() if found is not None})
        for index, name in enumerate(task.classes)
    }


def _defined(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
