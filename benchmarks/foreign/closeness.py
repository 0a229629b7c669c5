"""How near an engine's outputs are to the source's, how right they are, and whether that meets a goal.

One function judges the delivered engine and every hand-made one, on the same pictures that none of them has seen. It
is written here from the definitions and shares no code with the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Outputs = list[list[Floats]]  # run by run, every output


@dataclass(frozen=True)
class Decision:
    """How an output decides: by the largest along `axis`, or where it has no classes, by a threshold."""

    output: int = 0
    axis: int = 1
    threshold: float | None = None
    column: int | None = None  # along the axis, of what is held against the threshold

    def read(self, outputs: Sequence[Floats]) -> npt.NDArray[np.int64]:
        found = outputs[self.output]
        if self.threshold is None:
            return np.asarray(found.argmax(axis=self.axis), dtype=np.int64)
        if self.column is not None:
            found = np.take(found, self.column, axis=self.axis)
        return np.asarray(found > self.threshold, dtype=np.int64)


@dataclass(frozen=True)
class Goal:
    """What a job asks for: `value` of the metric, or at most that much less than the source has."""

    metric: Literal["rms_error", "agreement", "fidelity_dice", "top1", "dice"]
    kind: Literal["threshold", "max_drop"]
    value: float

    def words(self) -> dict[str, Any]:
        return {"metric": self.metric, "kind": self.kind, "value": self.value}

    def text(self) -> str:
        sign = "≤" if self.metric == "rms_error" else "≥"
        return f"{self.metric} {sign} {self.value:g}" if self.kind == "threshold" else f"{self.metric} −{self.value:g}"

    def is_met(self, scores: dict[str, float], source: dict[str, float]) -> bool:
        value = scores[self.metric]
        if self.kind == "max_drop":
            return source[self.metric] - value <= self.value + 1e-9
        return value <= self.value if self.metric == "rms_error" else value >= self.value


def scores_of(
    outputs: Outputs, source: Outputs, decision: Decision, targets: npt.NDArray[Any] | None, background: int | None
) -> dict[str, float]:
    """All that is known of an engine: nearness to the source's outputs, and with targets the task's metric."""
    decided = [decision.read(run) for run in outputs]
    before = [decision.read(run) for run in source]
    scores = {
        "rms_error": max(_rms_error(outputs, source, index) for index in range(len(source[0]))),
        "agreement": float(np.mean([np.mean(ours == theirs) for ours, theirs in zip(decided, before, strict=True)])),
        "fidelity_dice": dice(np.stack(decided), np.stack(before), background if decision.threshold is None else 0),
    }
    if targets is not None:
        found = np.concatenate(decided)
        if targets.ndim == 1:
            scores["top1"] = float(np.mean(found == targets))
        elif targets.shape == found.shape:
            scores["dice"] = mean_dice(found, targets, decision, background)
    return scores


def _rms_error(outputs: Outputs, source: Outputs, index: int) -> float:
    """Root mean square of the difference of one output over the standard deviation of the source's output."""
    ours, theirs = (np.stack([run[index] for run in runs]).astype(np.float64) for runs in (outputs, source))
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / max(float(theirs.var()), 1e-30)))


def mean_dice(
    found: npt.NDArray[np.int64], truth: npt.NDArray[Any], decision: Decision, background: int | None
) -> float:
    """Mean over samples and classes, without the background, or over samples and labels (N, labels, ...).

    What is neither found nor there has 1; what is only found or only there has 0.
    """
    if decision.threshold is None:
        labels = [label for label in range(int(truth.max()) + 1) if label != background]
        pairs = [
            (ours == label, theirs == label) for ours, theirs in zip(found, truth, strict=True) for label in labels
        ]
    else:
        pairs = [
            (ours > 0, theirs > 0) for ours, theirs in zip(np.concatenate(found), np.concatenate(truth), strict=True)
        ]
    sizes = [int(ours.sum() + theirs.sum()) for ours, theirs in pairs]
    both = [int((ours & theirs).sum()) for ours, theirs in pairs]
    return float(np.mean([2 * part / size if size else 1.0 for part, size in zip(both, sizes, strict=True)]))


def dice(found: npt.NDArray[np.int64], truth: npt.NDArray[Any], background: int | None) -> float:
    """Mean Dice over the classes that occur, over all samples at once, without the background."""
    classes = [int(label) for label in np.union1d(np.unique(found), np.unique(truth)) if label != background]
    each = []
    for label in classes:
        ours, theirs = found == label, truth == label
        both, sizes = int(np.count_nonzero(ours & theirs)), int(np.count_nonzero(ours) + np.count_nonzero(theirs))
        each.append(2 * both / sizes)
    return float(np.mean(each)) if each else 1.0
