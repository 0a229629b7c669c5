"""How a training went, epoch by epoch, and what the report says of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from worker.precision import PLAIN, StepForm
from worker.teacher import Trial

MAX_HISTORY = 200  # epochs that a report lists


@dataclass(frozen=True)
class Epoch:
    """One pass over the samples: mean loss, the leading metric on what is kept out, the last learning rate."""

    number: int
    loss: float
    metric: float | None
    learning_rate: float


@dataclass(frozen=True)
class TrainingLog:
    """How a training went. `metric` names what the epochs' metrics are: top1, dice, ...; epochs count from 1."""

    metric: str
    epochs: list[Epoch]
    best_epoch: int
    stopped_early: bool
    resumed_after: int  # epochs that an earlier attempt had done
    samples: int  # learnt from
    kept_out: int
    device: str
    form: StepForm = PLAIN
    taught: bool = False
    trial: Trial | None = None
    teacher_warning: str | None = None

    @property
    def best(self) -> Epoch:
        return self.epochs[self.best_epoch - 1]

    def details(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "epochs_run": len(self.epochs),
            "best_epoch": self.best_epoch,
            "stopped_early": self.stopped_early,
            "resumed_after": self.resumed_after,
            "loss": self.best.loss,
            f"validation_{self.metric}": self.best.metric,
            "history": [asdict(epoch) for epoch in self.epochs[:: math.ceil(len(self.epochs) / MAX_HISTORY)]],
            "train_samples": self.samples,
            "validation_samples": self.kept_out,
            "device": self.device,
            "precision": self.form.precision,
            "channels_last": self.form.channels_last,
            "teacher_used": self.taught,
            "teacher_trial": None if self.trial is None else self.trial.details(),
            "teacher_warning": self.teacher_warning,
        }
