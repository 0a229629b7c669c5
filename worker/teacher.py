"""What a teacher says of a batch, and whether it is worth listening to: a short trial with it and without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from shared.recipe import Augmentation, SoftTargets, Training
from worker.augment import changes
from worker.context import Progress
from worker.logits import Outputs
from worker.material import KEPT_BYTES, Material
from worker.precision import StepForm

TRIAL_RATIO = 0.2  # of the samples are kept out of the trial, to compare on
TRIAL_EPOCHS_RATIO = 0.15  # of the epochs, for each of the two that are compared
SURE = 2.0  # standard errors that the teacher's gain has to exceed
LEAST_EPOCHS = 8  # of a training that has time for a trial

Arm = Literal["labels alone", "with teacher"]
ARMS: tuple[Arm, ...] = ("labels alone", "with teacher")


class Teacher:
    """The teacher's outputs of a batch. Where samples never change they are computed once, in the data's order."""

    def __init__(
        self,
        reader: nn.Module,
        learnt: Material,
        augmentation: Augmentation,
        batch: int,
        form: StepForm,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._reader, self._form, self._device = reader.eval().to(device), form, device
        self._kept: list[torch.Tensor] | None = None
        first = _listed(self(None, learnt.take([0])[0]))
        if changes(augmentation) or sum(output.nbytes for output in first) * len(learnt) > KEPT_BYTES:
            return
        kept = []
        for start in range(0, len(learnt), batch):
            progress(0.0, f"asking the teacher: {start} of {len(learnt)} samples")
            inputs, _ = learnt.take(range(start, min(start + batch, len(learnt))))
            kept.append([output.cpu() for output in _listed(self(None, inputs))])
        self._kept = [torch.cat(parts) for parts in zip(*kept, strict=True)]  # (samples, ...) each
        self._single = isinstance(self(None, learnt.take([0])[0]), torch.Tensor)

    @torch.no_grad()
    def __call__(self, indices: Sequence[int] | None, inputs: torch.Tensor) -> Outputs:
        """Logits, or every output where nothing is decided; `indices` are the batch's positions in what is learnt."""
        if self._kept is None or indices is None:
            with self._form.autocast(self._device):
                outputs: Outputs = self._reader(self._form.laid_out(inputs.to(self._device)))
            return outputs
        kept = [output[indices].to(self._device) for output in self._kept]
        return kept[0] if self._single else tuple(kept)


def _listed(outputs: Outputs) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


# ---------------------------------------------------------------- the trial


@dataclass(frozen=True)
class Trial:
    """What two short trainings from the same start reached on the same samples, score by score in their order."""

    epochs: int
    labels_alone: list[float]
    with_teacher: list[float]
    teacher: list[float]  # what the teacher itself reaches; it may have learnt from these samples

    @property
    def gain(self) -> float:
        """What the teacher adds to the mean score."""
        return sum(self._differences) / len(self._differences)

    @property
    def standard_error(self) -> float:
        """Of the gain, over the samples."""
        count = len(self._differences)
        variance = sum((difference - self.gain) ** 2 for difference in self._differences) / max(1, count - 1)
        return math.sqrt(variance / count)

    @property
    def teacher_is_better(self) -> bool:
        """Whether it adds more than chance would, and knows more than the student that learnt without it.

        The second is no formality: soft targets of a teacher that knows nothing can smooth the first epochs.
        """
        return self.gain > SURE * self.standard_error and sum(self.teacher) > sum(self.labels_alone)

    @property
    def _differences(self) -> list[float]:
        return [taught - alone for alone, taught in zip(self.labels_alone, self.with_teacher, strict=True)]

    def details(self) -> dict[str, Any]:
        count = len(self.labels_alone)
        return {
            "epochs": self.epochs,
            "samples": count,
            "labels_alone": sum(self.labels_alone) / count,
            "with_teacher": sum(self.with_teacher) / count,
            "teacher": sum(self.teacher) / count,
            "standard_error": self.standard_error,
            "teacher_used": self.teacher_is_better,
        }


def trial_of(training: Training) -> Training:
    """How the two short trainings go: the same words, fewer epochs, some samples kept out."""
    epochs = max(1, round(TRIAL_EPOCHS_RATIO * training.epochs))
    ratio = training.validation_ratio or TRIAL_RATIO
    return training.model_copy(update={"epochs": epochs, "validation_ratio": ratio, "patience": None})


def warning_of(trial: Trial | None, soft_targets: SoftTargets, training: Training) -> str | None:
    """Why the teacher that was asked for is not used; None where it is."""
    if soft_targets.teacher == "always" or soft_targets.alpha == 1:
        return None
    if trial is None:
        return (
            f"The teacher was not used: {training.epochs} epochs are too few to try whether it is better than the "
            f"labels alone (at least {LEAST_EPOCHS}). soft_targets.teacher: always uses it untried."
        )
    if trial.teacher_is_better:
        return None
    return (
        f"The teacher is no better than the labels alone, so it was not used: after {trial.epochs} epochs "
        f"{100 * trial.gain:+.2f} points on {len(trial.labels_alone)} samples, with a standard error of "
        f"{100 * trial.standard_error:.2f}; the teacher itself reaches "
        f"{100 * sum(trial.teacher) / len(trial.teacher):.2f} there."
    )
