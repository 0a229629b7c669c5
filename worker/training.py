"""The one training: distilling, fine-tuning after pruning, and training for int8 all go through `train`.

Its whole state is saved from time to time: an attempt that goes on from there ends with the same weights as one that
was never interrupted. Where a teacher has to prove that it helps, two short trainings come first, and are saved in the
same way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from shared.recipe import SoftTargets, Training
from worker import snapshot
from worker.context import Progress, StageContext
from worker.loop import Loop, Phase, Saved, Weights, clone
from worker.precision import PLAIN, StepForm
from worker.save_timer import SaveTimer
from worker.teacher import ARMS, LEAST_EPOCHS, Trial, trial_of, warning_of
from worker.training_log import TrainingLog

__all__ = ["TrainingLog", "train"]


def train(
    network: nn.Module,
    training: Training,
    ctx: StageContext,
    *,
    teacher: nn.Module | None = None,
    soft_targets: SoftTargets | None = None,
    name: str = "training",
    progress: Progress | None = None,
) -> TrainingLog:
    """Train in place on the train part; leaves the last weights, or those that kept-out samples found best, on the CPU.

    With `ema_decay` the averaged weights are those that are validated and left. `name` is the checkpoints': a stage
    that trains more than once gives each training its own. Networks and teacher put out logits (n, classes, ...), or
    anything where the task is raw. Raises StageFailed: training_diverged, too_few_samples, output_mismatch,
    input_mismatch, data_mismatch.
    """
    torch.set_num_threads(ctx.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            return Session(network, training, ctx, teacher, soft_targets, name, progress or ctx.progress, device).run()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "memory" in str(error):
                raise MemoryError(str(error)) from error
            raise
        finally:
            PLAIN.lay_out(network)
            network.cpu()
            if teacher is not None:
                teacher.cpu()


class Session:
    """Everything from the first trial to the last epoch."""

    def __init__(
        self,
        network: nn.Module,
        training: Training,
        ctx: StageContext,
        teacher: nn.Module | None,
        soft_targets: SoftTargets | None,
        name: str,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.network, self.training, self.ctx, self.name, self.device = network, training, ctx, name, device
        self.progress = progress
        self.soft_targets = soft_targets if teacher is not None and soft_targets and soft_targets.alpha else None
        self.teacher = teacher if self.soft_targets is not None else None
        self.saved = self._load()
        # before anything changes the weights; both trials and the training begin with them
        stored = self.saved.groups.get("start") if self.saved else None
        self.start: Weights = stored or clone(network.state_dict())
        self.scores: dict[str, list[float]] = self.saved.facts["scores"] if self.saved else {}
        # a choice made on another kind of device says nothing of this one
        same_device = self.saved is not None and self.saved.facts["device"] == device.type
        self.form = StepForm(**self.saved.facts["form"]) if self.saved and same_device else None
        self.needs_trial = self.soft_targets is not None and self.soft_targets.teacher == "auto" and (
            self.soft_targets.alpha < 1
        )
        self.tries = self.needs_trial and training.epochs >= LEAST_EPOCHS
        self.short = trial_of(training)
        self.num_epochs = training.epochs + (len(ARMS) * self.short.epochs if self.tries else 0)
        self.timer = SaveTimer(self.num_epochs)
        self.began_at, self.epochs_before = time.monotonic(), self._epochs_saved()

    def run(self) -> TrainingLog:
        trial = self._trial() if self.tries else None
        taught = self.soft_targets is not None and (trial.teacher_is_better if trial else not self.needs_trial)
        before = len(ARMS) * self.short.epochs if self.tries else 0
        loop = Loop(self, self.training, "training", taught, before)
        while not loop.ended():
            loop.add(loop.epoch())
        warning = None if self.soft_targets is None else warning_of(trial, self.soft_targets, self.training)
        return loop.finish(trial, warning)

    def _trial(self) -> Trial:
        """Train shortly with the teacher and without, from the same start, and score both on the same samples."""
        for position, arm in enumerate(ARMS):
            if arm not in self.scores and not self._resumes("training"):
                if not self._resumes(arm):
                    self.network.load_state_dict(self.start)
                loop = Loop(self, self.short, arm, arm == "with teacher", position * self.short.epochs)
                while not loop.ended():
                    loop.add(loop.epoch())
                self.scores[arm] = loop.scores(loop.left())
        if "teacher" not in self.scores:
            assert self.teacher is not None
            self.scores["teacher"] = loop.scores(self.teacher)
        if not self._resumes("training"):
            self.network.load_state_dict(self.start)
        return Trial(self.short.epochs, *(self.scores[key] for key in (*ARMS, "teacher")))

    def _resumes(self, phase: Phase) -> bool:
        return self.saved is not None and self.saved.facts["phase"] == phase

    def _load(self) -> Saved | None:
        """The state that an earlier attempt left, if it is one of this very training."""
        path = self.ctx.checkpoints.load(self.name)
        if path is None:
            return None
        groups, facts = snapshot.read(path)
        if facts["of"] != self.fingerprint():
            logging.warning("the checkpoint %s is of another training: beginning anew", self.name)
            return None
        return Saved(groups, facts)

    def save(self, phase: Phase, groups: Mapping[str, snapshot.Tensors], facts: Mapping[str, Any]) -> None:
        """Keep a loop's state with that of the whole session; returns once it is safe."""
        assert self.form is not None
        start: dict[str, snapshot.Tensors] = {} if phase == "training" else {"start": self.start}
        common = {"of": self.fingerprint(), "phase": phase, "scores": self.scores}
        common |= {"form": asdict(self.form), "device": self.device.type}
        path = self.ctx.directory / f"{self.name}.checkpoint.safetensors"
        snapshot.write(path, {**groups, **start}, {**facts, **common})
        self.ctx.checkpoints.save(self.name, path)
        self.timer.saved()

    def fingerprint(self) -> str:
        """sha256 of all that decides what a checkpoint of this training looks like."""
        shapes = {name: list(tensor.shape) for name, tensor in self.network.state_dict().items()}
        soft = None if self.soft_targets is None else self.soft_targets.model_dump()
        facts = [self.training.model_dump(), soft, self.ctx.seed, len(self.ctx.samples("train")), shapes]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _epochs_saved(self) -> int:
        """Epochs of all phases that an earlier attempt has done."""
        if self.saved is None:
            return 0
        phases = [*ARMS, "training"] if self.tries else ["training"]
        return phases.index(self.saved.facts["phase"]) * self.short.epochs + len(self.saved.facts["epochs"])

    def tell(self, epochs_done: float, message: str) -> None:
        """`epochs_done` counts those of all phases."""
        here = epochs_done - self.epochs_before
        seconds = (time.monotonic() - self.began_at) / here * (self.num_epochs - epochs_done)
        self.progress(epochs_done / self.num_epochs, f"{message}, {_duration(seconds)} left")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
