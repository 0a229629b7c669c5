"""How right a model is: the task's metrics on the evaluation part, and parity with the baseline's raw outputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics import DiceMetric, MeanIoU, compute_hausdorff_distance
from torchmetrics.functional.classification import multiclass_auroc

from shared.errors import EvaluationEmpty, StageFailed
from shared.recipe import Task
from shared.report import Parity
from worker.data import Floats, Samples

Run = Callable[[Floats], Floats]
Metrics = tuple[dict[str, float], dict[str, dict[str, float]]]

PARITY_SAMPLES = 16
WORST_ERROR = float(np.finfo(np.float32).max)
EXACT_AUROC_SCORES = 20_000_000
AUROC_THRESHOLDS = 1000


def evaluate(run: Run, samples: Samples, task: Task, batch: int = 8) -> Metrics:
    """The task's mean metrics, and the same by class name; one that is not defined on these samples is left out.

    classification: top1 is the share of right decisions (by class: of that class's samples), auroc one class against
    the rest. segmentation: dice, iou and hd95 (95th percentile of the surface distance, in pixels) are means over the
    samples that hold the class; where a sample holds it and the model finds none of it, hd95 counts the image's
    diagonal. The means leave out the task's background class.
    Raises EvaluationEmpty, StageFailed (output_mismatch).
    """
    if len(samples) == 0:
        raise EvaluationEmpty
    return (_classification if task.kind == "classification" else _segmentation)(run, samples, task, batch)


def parity_inputs(samples: Samples) -> Floats:
    """The samples that parity is held on: at most 16, evenly spaced over the evaluation part."""
    return samples.take(samples.spread(PARITY_SAMPLES))


def run_in_batches(run: Run, inputs: Floats, batch: int = 4) -> Floats:
    """Raw outputs of all inputs, `batch` at a time."""
    return np.concatenate([run(inputs[start : start + batch]) for start in range(0, len(inputs), batch)])


def parity(reference: Floats, outputs: Floats, tolerance: float) -> Parity:
    """How far raw outputs (n, classes, ...) are from the baseline's.

    An output that is not a finite number counts as an error of 3.4e38. Raises StageFailed (output_mismatch).
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
        agreement_ratio=float((outputs.argmax(axis=1) == reference.argmax(axis=1)).mean()),
        tolerance=tolerance,
        passed=finite and relative <= tolerance,
    )


# ---------------------------------------------------------------- classification


def _classification(run: Run, samples: Samples, task: Task, batch: int) -> Metrics:
    classes = len(task.classes)
    scores, labels = [], []
    for inputs, targets in samples.batches(batch):
        assert targets is not None
        outputs = run(inputs)
        if outputs.shape != (len(inputs), classes):
            raise _output_mismatch(outputs, [len(inputs), classes])
        scores.append(torch.from_numpy(probabilities(outputs)))  # (batch, classes)
        labels.append(torch.from_numpy(targets))  # (batch,)
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


def probabilities(outputs: Floats) -> Floats:
    """Softmax over the classes (axis 1), unless the outputs are probabilities already."""
    if outputs.min() >= 0 and np.allclose(outputs.sum(axis=1), 1, atol=1e-3):
        return outputs
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    found: Floats = powers / powers.sum(axis=1, keepdims=True)
    return found


# ---------------------------------------------------------------- segmentation


def _segmentation(run: Run, samples: Samples, task: Task, batch: int) -> Metrics:
    classes = len(task.classes)
    dice = DiceMetric(include_background=True, reduction="none")
    iou = MeanIoU(include_background=True, reduction="none")
    distances = []
    for inputs, targets in samples.batches(batch):
        assert targets is not None
        outputs = run(inputs)
        if outputs.shape != (len(inputs), classes, *targets.shape[1:]):
            raise _output_mismatch(outputs, [len(inputs), classes, *targets.shape[1:]])
        found = _one_hot(torch.from_numpy(outputs.argmax(axis=1)), classes)  # (batch, classes, H, W)
        truth = _one_hot(torch.from_numpy(targets), classes)
        dice(found, truth)
        iou(found, truth)
        distances.append(_surface_distances(found, truth, task))
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
