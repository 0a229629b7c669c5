"""Where a network puts its classes: raw outputs as scores, probabilities and decisions of a task."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from shared.errors import StageFailed
from shared.recipe import Task
from worker.feed import Floats

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def class_scores(outputs: Floats, task: Task, targets: tuple[int, ...]) -> Floats:
    """Raw outputs of a batch as (n, classes, *sizes), wherever the network puts its classes.

    `targets` is the shape of the batch's labels (n,) or masks (n, *sizes); of a multilabel task (n, labels, *sizes).
    The classes may be the second axis or the last. A network that tells two classes by one channel, with or without an
    axis for it, gives the score of the second, and that of the first is made beside it.
    Raises StageFailed (output_mismatch).
    """
    count, sizes, classes = targets[0], targets[2 if task.kind == "multilabel" else 1 :], len(task.classes)
    if outputs.shape == (count, classes, *sizes):
        return outputs
    if outputs.shape == (count, *sizes, classes):
        return np.moveaxis(outputs, -1, 1)
    one_channel = outputs.shape in ((count, *sizes), (count, 1, *sizes), (count, *sizes, 1))
    if one_channel and task.kind == "multilabel" and classes == 1:
        return outputs.reshape(count, 1, *sizes)
    if one_channel and task.kind != "multilabel" and classes == 2:
        second = outputs.reshape(count, *sizes)
        return np.stack([1 - second if task.scores == "probabilities" else 0 * second, second], axis=1)
    raise StageFailed(
        f"The model puts out {list(outputs.shape)}, but the task needs {[count, classes, *sizes]} "
        "(one channel a class).",
        hint="Check the task's classes and the network's number of outputs.",
        code="output_mismatch",
    )


def probabilities(scores: Floats, task: Task | None = None) -> Floats:
    """Scores (n, classes, ...) as probabilities: a softmax over the classes unless they are probabilities already; of
    a multilabel task a sigmoid of each."""
    found: Floats
    if task is not None and task.kind == "multilabel":
        return scores if task.scores == "probabilities" else _sigmoid(scores)
    if scores.min() >= 0 and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    found = powers / powers.sum(axis=1, keepdims=True)
    return found


def best_class(scores: Floats, axis: int = 1) -> Ints:
    """The class with the largest score; the first of equals. As argmax, but fast along any axis."""
    planes = np.moveaxis(scores, axis, 0)
    best, found = planes[0].copy(), np.zeros(planes.shape[1:], dtype=np.int64)
    if len(planes) > MAX_PLANES:
        return np.asarray(scores.argmax(axis=axis))
    for index, plane in enumerate(planes[1:], start=1):
        larger = plane > best
        found[larger] = index
        np.maximum(best, plane, out=best)
    return found


MAX_PLANES = 32


def labels_above(scores: Floats, task: Task, axis: int = 1) -> Bools:
    """Of a multilabel task: which labels are found, each by its own threshold."""
    thresholds = np.asarray(task.thresholds or [0.5] * len(task.classes), dtype=np.float64)
    if task.scores == "logits":
        thresholds = np.log(thresholds / (1 - thresholds))
    shape = [1] * scores.ndim
    shape[axis] = -1
    found: Bools = scores > thresholds.astype(np.float32).reshape(shape)
    return found


def is_one_channel(outputs: Floats, task: Task) -> bool:
    """Whether the two classes of a task have one channel, the score of the second."""
    channels = {outputs.shape[1], outputs.shape[-1]} if outputs.ndim > 1 else {1}
    return task.kind in ("classification", "segmentation") and len(task.classes) == 2 and 2 not in channels


def class_axis(outputs: Floats, task: Task) -> int:
    """The axis of the classes: the second, or the last where only that fits."""
    last = outputs.ndim > 1 and outputs.shape[1] != len(task.classes) == outputs.shape[-1]
    return outputs.ndim - 1 if last else 1


def threshold_of(task: Task) -> float:
    """Above what a network's one channel decides for the second class."""
    return 0.5 if task.scores == "probabilities" else 0.0


class ScoresWatch:
    """The range of scores that are decided one by one, over all samples: it must fit what the task says of them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.low, self.high = math.inf, -math.inf

    def seen(self, outputs: Floats) -> Floats:
        if self.task.kind == "multilabel" or is_one_channel(outputs, self.task):
            self.low, self.high = min(self.low, float(outputs.min())), max(self.high, float(outputs.max()))
        return outputs

    def check(self) -> None:
        """Refuse the other kind of scores, by which every decision would be the same. Raises StageFailed."""
        between_0_and_1 = self.low >= 0 and self.high <= 1
        if self.low > self.high or between_0_and_1 == (self.task.scores == "probabilities"):
            return
        what = "The network's outputs lie" if self.task.kind == "multilabel" else "The network's one channel lies"
        said = "probabilities" if between_0_and_1 else "logits"
        raise StageFailed(
            f"{what} between {self.low:.3g} and {self.high:.3g}, as {said} do; the task says {self.task.scores}.",
            hint=f'Say so in the task: "scores": "{said}".',
            code="output_mismatch",
        )


def _sigmoid(scores: Floats) -> Floats:
    found: Floats = np.exp(-np.logaddexp(np.float32(0), -scores), dtype=np.float32)
    return found
