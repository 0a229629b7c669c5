"""How right a model is: the task's metrics on the evaluation part, and parity with the baseline's raw outputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics import DiceMetric, MeanIoU, compute_hausdorff_distance
from torchmetrics.functional.classification import multiclass_auroc

from shared.errors import EvaluationEmpty, StageFailed
from shared.recipe import Task
from shared.report import Parity
from worker.data import Samples
from worker.engines import Runner
from worker.feed import Floats, Inputs

Run = Callable[[Inputs], Floats]
Metrics = tuple[dict[str, float], dict[str, dict[str, float]]]

PARITY_SAMPLES = 16
MAX_OUTPUTS = 100
WORST_ERROR = float(np.finfo(np.float32).max)
EXACT_AUROC_SCORES = 20_000_000
AUROC_THRESHOLDS = 1000


def evaluate(run: Run, samples: Samples, task: Task, batch: int = 8) -> Metrics:
    """The task's mean metrics, and the same by class name; one that is not defined on these samples is left out.
    A raw task has none.

    classification: top1 is the share of right decisions (by class: of that class's samples), auroc one class against
    the rest. segmentation: dice, iou and hd95 (95th percentile of the surface distance, in pixels or voxels)
    are means over the samples that hold the class; where a sample holds it and the model finds none of it, hd95 counts
    the image's diagonal. The means leave out the task's background class.
    Raises EvaluationEmpty, StageFailed (output_mismatch).
    """
    if len(samples) == 0:
        raise EvaluationEmpty
    if task.kind == "raw":
        return {}, {}
    return (_classification if task.kind == "classification" else _segmentation)(run, samples, task, batch)


def parity_inputs(samples: Samples) -> Inputs:
    """The samples that parity is held on: at most 16, evenly spaced over the evaluation part."""
    return samples.feed(samples.spread(PARITY_SAMPLES))


def run_in_batches(run: Run, inputs: Inputs, batch: int = 4) -> Floats:
    """Raw outputs of all inputs, `batch` at a time."""
    return np.concatenate([run(inputs[start : start + batch]) for start in range(0, len(inputs), batch)])


def keep_reference(runner: Runner, samples: Samples, path: Path, batch: int = 4) -> bool:
    """Write down what the runner puts out on the parity samples, to be held against later.

    The first output goes to `path` (.npy), output i of a network that has several to `<stem>.<i>.npy` beside it.
    Returns whether every number of it is finite.
    """
    outputs = _every_output(runner, parity_inputs(samples), batch)
    for index, found in enumerate(outputs):
        np.save(_reference(path, index), found)
    return all(bool(np.isfinite(found).all()) for found in outputs)


def hold(runner: Runner, samples: Samples, reference: Path, tolerance: float, task: Task) -> Parity:
    """Parity of every output with the kept ones; of several outputs the worst is told.

    Raises StageFailed (output_mismatch).
    """
    found = _every_output(runner, parity_inputs(samples), batch=4)
    kept = [path for index in range(MAX_OUTPUTS) if (path := _reference(reference, index)).exists()]
    if len(found) != len(kept):
        raise StageFailed(f"The model has {len(found)} outputs, the source model {len(kept)}.", code="output_mismatch")
    held = [parity(np.load(path), outputs, tolerance, task) for path, outputs in zip(kept, found, strict=True)]
    return max(held, key=lambda one: (not one.passed, one.relative_error))


def _every_output(runner: Runner, inputs: Inputs, batch: int) -> list[Floats]:
    found = [runner.run_all(inputs[start : start + batch]) for start in range(0, len(inputs), batch)]
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _reference(path: Path, index: int) -> Path:
    return path.with_suffix(f".{index}.npy") if index else path


def parity(reference: Floats, outputs: Floats, tolerance: float, task: Task | None = None) -> Parity:
    """How far raw outputs (n, classes, ...) are from the baseline's.

    `task` tells where the classes lie, for the decisions; without it they are the second axis. An output that is not a
    finite number counts as an error of 3.4e38. Raises StageFailed (output_mismatch).
    """
    if reference.shape != outputs.shape:
        raise StageFailed(
            f"The outputs have the shape {list(outputs.shape)}, the baseline's {list(reference.shape)}.",
            code="output_mismatch",
        )
    finite = bool(np.isfinite(outputs).all())
    scale = float(np.abs(reference).max())
    error = float(np.abs(outputs - reference).max()) if finite else WORST_ERROR
    relative = 0.0 if error == 0 else min(error / scale, WORST_ERROR) if scale > 0 and finite else WORST_ERROR
    return Parity(
        samples=len(reference),
        max_abs_error=error,
        relative_error=relative,
        agreement_ratio=float((decisions(outputs, task) == decisions(reference, task)).mean()),
        tolerance=tolerance,
        passed=finite and relative <= tolerance,
    )


# ---------------------------------------------------------------- where the classes lie


def decisions(outputs: Floats, task: Task | None) -> npt.NDArray[np.int64]:
    """What is decided for each sample, or each of its pixels: the class, or the largest of the second axis."""
    if task is not None and _is_one_channel(outputs, task):
        found = (outputs > _threshold(task)).astype(np.int64)
    elif outputs.ndim == 1:
        found = np.zeros(outputs.shape, dtype=np.int64)
    else:
        found = np.asarray(outputs.argmax(axis=-1 if task is not None and _is_last(outputs, task) else 1))
    return found


def class_scores(outputs: Floats, task: Task, targets: tuple[int, ...]) -> Floats:
    """Raw outputs of a batch as (n, classes, *sizes), wherever the network puts its classes.

    `targets` is the shape of the batch's labels (n,) or masks (n, *sizes). The classes may be the second axis or the
    last; a network that tells two classes by one channel, with or without an axis for it, gives the score of the
    second, and that of the first is made beside it.
    Raises StageFailed (output_mismatch).
    """
    (count, *sizes), classes = targets, len(task.classes)
    if outputs.shape == (count, classes, *sizes):
        return outputs
    if outputs.shape == (count, *sizes, classes):
        return np.moveaxis(outputs, -1, 1)
    if classes == 2 and outputs.shape in ((count, *sizes), (count, 1, *sizes), (count, *sizes, 1)):
        second = outputs.reshape(count, *sizes)
        return np.stack([1 - second if task.scores == "probabilities" else 0 * second, second], axis=1)
    raise _output_mismatch(outputs, [count, classes, *sizes])


def _is_one_channel(outputs: Floats, task: Task) -> bool:
    channels = {outputs.shape[1], outputs.shape[-1]} if outputs.ndim > 1 else {1}
    return len(task.classes) == 2 and 2 not in channels


def _is_last(outputs: Floats, task: Task) -> bool:
    return bool(outputs.shape[1] != len(task.classes) == outputs.shape[-1])


def _threshold(task: Task) -> float:
    return 0.5 if task.scores == "probabilities" else 0.0


class _Watch:
    """The range of a network's one channel over all samples, which must fit what the task says of it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.low, self.high = math.inf, -math.inf

    def seen(self, outputs: Floats) -> Floats:
        if _is_one_channel(outputs, self.task):
            self.low, self.high = min(self.low, float(outputs.min())), max(self.high, float(outputs.max()))
        return outputs

    def check(self) -> None:
        """Refuse the other kind of scores, by which every decision would be the same. Raises StageFailed."""
        between_0_and_1 = self.low >= 0 and self.high <= 1
        if self.low > self.high or between_0_and_1 == (self.task.scores == "probabilities"):
            return
        told = "as probabilities do" if between_0_and_1 else "as logits do"
        said = "probabilities" if between_0_and_1 else "logits"
        raise StageFailed(
            f"The network's one channel lies between {self.low:.3g} and {self.high:.3g}, {told}; "
            f"the task says {self.task.scores}.",
            hint=f'Say so in the task: "scores": "{said}".',
            code="output_mismatch",
        )


# ---------------------------------------------------------------- classification


def _classification(run: Run, samples: Samples, task: Task, batch: int) -> Metrics:
    classes = len(task.classes)
    scores, labels, watch = [], [], _Watch(task)
    for inputs, targets in samples.batches(batch):
        assert targets is not None
        found = class_scores(watch.seen(run(inputs)), task, targets.shape)
        scores.append(torch.from_numpy(probabilities(found)))  # (batch, classes)
        labels.append(torch.from_numpy(targets))  # (batch,)
    watch.check()
    score, label = torch.cat(scores), torch.cat(labels)  # (n, classes), (n,)
    right = score.argmax(dim=1) == label
    counts = torch.bincount(label, minlength=classes)
    top1 = torch.bincount(label[right], minlength=classes) / counts
    # an AUROC needs samples of the class and of others
    auroc = _auroc(score, label, classes).masked_fill((counts == 0) | (counts == len(label)), math.nan)
    means = {"top1": float(right.float().mean()), "auroc": float(auroc.nanmean())}
    return _defined(means), _by_class({"top1": top1, "auroc": auroc}, task)


def _auroc(score: torch.Tensor, label: torch.Tensor, classes: int) -> torch.Tensor:
    thresholds = None if score.numel() <= EXACT_AUROC_SCORES else AUROC_THRESHOLDS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No (positive|negative) samples in targets")
        found: torch.Tensor = multiclass_auroc(score, label, classes, average="none", thresholds=thresholds)
    return found


def probabilities(scores: Floats) -> Floats:
    """Softmax over the classes (axis 1), unless the scores are probabilities already."""
    if scores.min() >= 0 and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    found: Floats = powers / powers.sum(axis=1, keepdims=True)
    return found


# ---------------------------------------------------------------- segmentation


def _segmentation(run: Run, samples: Samples, task: Task, batch: int) -> Metrics:
    classes = len(task.classes)
    dice = DiceMetric(include_background=True, reduction="none")
    iou = MeanIoU(include_background=True, reduction="none")
    distances, watch = [], _Watch(task)
    for inputs, targets in samples.batches(batch):
        assert targets is not None
        scores = class_scores(watch.seen(run(inputs)), task, targets.shape)
        found = _one_hot(torch.from_numpy(scores.argmax(axis=1)), classes)  # (batch, classes, [D,] H, W)
        truth = _one_hot(torch.from_numpy(targets), classes)
        dice(found, truth)
        iou(found, truth)
        distances.append(_surface_distances(found, truth, task))
    watch.check()
    by_class = {
        "dice": dice.get_buffer().nanmean(dim=0),  # (classes,)
        "iou": iou.get_buffer().nanmean(dim=0),
        "hd95": torch.cat(distances).nanmean(dim=0),
    }
    foreground = [index for index in range(classes) if index != task.background]
    means = {name: float(values[foreground].nanmean()) for name, values in by_class.items()}
    return _defined(means), _by_class(by_class, task)


def _one_hot(indices: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(indices, classes).movedim(-1, 1)


def _surface_distances(found: torch.Tensor, truth: torch.Tensor, task: Task) -> torch.Tensor:
    """hd95 (batch, classes): NaN where the truth lacks the class, the diagonal where only the model does.

    The background is not measured: its surface is everything else's, and it would cost the most.
    """
    diagonal = math.hypot(*found.shape[2:])
    in_truth, in_found = truth.flatten(2).any(dim=2), found.flatten(2).any(dim=2)
    distances = torch.full(in_truth.shape, math.nan)
    distances[in_truth & ~in_found] = diagonal
    measured = in_truth & in_found
    if task.background is not None:
        distances[:, task.background] = math.nan
        measured[:, task.background] = False
    if measured.any():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*always_return_as_numpy")
            surfaces = compute_hausdorff_distance(
                found[measured][:, None], truth[measured][:, None], include_background=True, percentile=95
            )
        distances[measured] = surfaces[:, 0].float()
    return distances


# ---------------------------------------------------------------- both


def _output_mismatch(outputs: npt.NDArray[np.float32], expected: list[int]) -> StageFailed:
    return StageFailed(
        f"The model puts out {list(outputs.shape)}, but the task needs {expected} (one channel a class).",
        hint="Check the task's classes and the network's number of outputs.",
        code="output_mismatch",
    )


def _by_class(values: dict[str, torch.Tensor], task: Task) -> dict[str, dict[str, float]]:
    return {
        name: _defined({metric: float(found[index]) for metric, found in values.items()})
        for index, name in enumerate(task.classes)
    }


def _defined(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
