"""The one training loop: distilling, fine-tuning after pruning, and training for int8 all go through `train`.

A training is a sequence of epochs, each seeded by its own number, with the whole state written down after it: an
attempt that goes on from there ends with the same weights as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.errors import StageFailed
from shared.recipe import SoftTargets, Training
from worker import snapshot
from worker.augment import augment, changes
from worker.context import Progress, StageContext
from worker.descent import averaged, optimizer_of, precision_of, scheduler_of
from worker.logits import Logits, checked_logits
from worker.losses import total_loss
from worker.material import KEPT_BYTES, split, validate

SoftTargetsOf = Callable[[list[int], torch.Tensor], torch.Tensor]  # a batch's positions and inputs -> its logits

MAX_GRADIENT_NORM = 5.0
MAX_HISTORY = 200  # epochs that a report lists
FOR_SAMPLES, FOR_NETWORK = 0, 1


@dataclass(frozen=True)
class Epoch:
    """One pass over the material: mean loss, the leading metric on what is kept out, the last learning rate."""

    number: int
    loss: float
    metric: float | None
    learning_rate: float


@dataclass(frozen=True)
class TrainingLog:
    """How a training went. `metric` names what the epochs' metrics are: top1 or dice; epochs count from 1."""

    metric: str
    epochs: list[Epoch]
    best_epoch: int
    stopped_early: bool
    resumed_after: int  # epochs that an earlier attempt had done
    samples: int  # learnt from
    kept_out: int
    device: str

    @property
    def best(self) -> Epoch:
        return self.epochs[self.best_epoch - 1]

    def details(self) -> dict[str, Any]:
        """What the report tells of it."""
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
        }


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
    """Train in place on the train part; leaves the weights that the kept-out samples found best, on the CPU, for use.

    With `ema_decay` the averaged weights are those that are judged and left. `name` is the checkpoints': a stage that
    trains more than once gives each training its own. Networks and teacher put out logits (n, classes, ...).
    Raises StageFailed: training_diverged, too_few_samples, output_mismatch, input_mismatch, data_mismatch.
    """
    torch.set_num_threads(ctx.threads)
    course = _Course(network, training, ctx, teacher, soft_targets, name, progress or ctx.progress)
    with torch.random.fork_rng(devices=[course.device] if course.device.type == "cuda" else []):
        try:
            course.resume()
            while not course.ended():
                course.keep(course.epoch())
            return course.finish()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "memory" in str(error):
                raise MemoryError(str(error)) from error
            raise
        finally:
            network.cpu()
            if teacher is not None:
                teacher.cpu()


class _Course:
    """One training on its way."""

    def __init__(
        self,
        network: nn.Module,
        training: Training,
        ctx: StageContext,
        teacher: nn.Module | None,
        soft_targets: SoftTargets | None,
        name: str,
        progress: Progress,
    ) -> None:
        self.network, self.training, self.ctx, self.name, self.progress = network, training, ctx, name, progress
        self.task, self.metric = ctx.recipe.task, ctx.recipe.task.metrics[0]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.learnt, self.kept_out = split(ctx.samples("train"), training.validation_ratio)
        self.steps = math.ceil(len(self.learnt) / training.batch)  # an epoch

        # the network and its average
        network.to(self.device)
        self.logits = Logits(network, self.task)
        self.average = averaged(network, training.ema_decay) if training.ema_decay else None

        # what changes it
        self.optimizer = optimizer_of(network, training)
        self.scheduler = scheduler_of(self.optimizer, training, self.steps)
        self.precision = precision_of(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)

        # whom it learns from, beside the labels
        self.soft_targets = soft_targets if teacher is not None and soft_targets and soft_targets.alpha else None
        self.teacher = None if teacher is None or self.soft_targets is None else self._teacher(teacher)

        self.epochs: list[Epoch] = []
        self.best: dict[str, torch.Tensor] = {}
        self.best_epoch = self.resumed_after = 0
        self.began_at = time.monotonic()

    # ------------------------------------------------------------ epochs

    def ended(self) -> bool:
        patience = self.training.patience
        return len(self.epochs) >= self.training.epochs or (patience is not None and self._waited() >= patience)

    def _waited(self) -> int:
        """Epochs since the metric was last better than ever before."""
        metrics = [epoch.metric or 0.0 for epoch in self.epochs]
        return len(metrics) - 1 - metrics.index(max(metrics)) if metrics else 0

    def epoch(self) -> Epoch:
        """One pass over the material, in an order and with changes that its number alone decides."""
        number = len(self.epochs) + 1
        generator = torch.Generator().manual_seed(_seed(self.ctx.seed, number, FOR_SAMPLES))
        torch.manual_seed(_seed(self.ctx.seed, number, FOR_NETWORK))
        order = torch.randperm(len(self.learnt), generator=generator).tolist()
        self.logits.train()
        total, seen = 0.0, 0
        # batches of nearly one size: a last one of a single sample would break BatchNorm
        for indices in np.array_split(order, self.steps):
            loss = self._step(indices.tolist(), generator)
            if not math.isfinite(loss):
                raise self._diverged(number, "the loss is not a finite number")
            total, seen = total + loss * len(indices), seen + len(indices)
            self._tell(number, seen / len(order), total / seen)
        judged = Logits(self._left(), self.task).eval()
        metric = validate(judged, self.kept_out, self.task, self.training.batch, self.device)
        if metric is not None and math.isnan(metric):
            raise self._diverged(number, "the network's outputs are not finite numbers")
        return Epoch(number, total / len(order), metric, float(self.optimizer.param_groups[0]["lr"]))

    def _step(self, indices: list[int], generator: torch.Generator) -> float:
        """One batch: returns its loss."""
        layout = self.ctx.recipe.data.preprocessing.layout
        stored = self.learnt.take(indices)
        inputs, targets = augment(*stored, self.training.augmentation, generator, layout)
        inputs, targets = inputs.to(self.device), targets.to(self.device)  # (n, C, H, W), (n, ...)

        # forward, in half precision on a GPU
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.device.type == "cuda"):
            logits = checked_logits(self.logits, inputs, targets)  # (n, classes, ...)
        soft = None if self.teacher is None else self.teacher(indices, inputs)
        loss = total_loss(logits, targets, soft, self.task, self.training, self.soft_targets)

        # backward; a step that overflowed in fp16 is left out
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT_NORM)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:
            self.scheduler.step()
            if self.average is not None:
                self.average.update_parameters(self.network)
        return float(loss.detach())

    def _teacher(self, teacher: nn.Module) -> SoftTargetsOf:
        """The teacher's logits of a batch. Where samples never change they are computed once, in the data's order."""
        module = Logits(teacher, self.task).eval().to(self.device)

        @torch.no_grad()
        def ask(inputs: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, dtype=self.precision, enabled=self.device.type == "cuda"):
                outputs: torch.Tensor = module(inputs.to(self.device))
            return outputs

        first = ask(self.learnt.take([0])[0])
        if changes(self.training.augmentation) or first.nbytes * len(self.learnt) > KEPT_BYTES:
            return lambda indices, inputs: ask(inputs)
        kept = []
        for start in range(0, len(self.learnt), self.training.batch):
            self.progress(0.0, f"asking the teacher: {start} of {len(self.learnt)} samples")
            stop = min(start + self.training.batch, len(self.learnt))
            kept.append(ask(self.learnt.take(range(start, stop))[0]).cpu())
        told = torch.cat(kept)  # (samples, classes, ...)
        return lambda indices, inputs: told[indices].to(self.device)

    def _left(self) -> nn.Module:
        """What is validated and, in the end, left: the network with the averaged weights where there are any."""
        return self.network if self.average is None else self.average.module

    def _tell(self, number: int, epoch_ratio: float, loss: float) -> None:
        epochs = self.training.epochs
        fraction = (number - 1 + epoch_ratio) / epochs
        seconds = (time.monotonic() - self.began_at) / (fraction - self.resumed_after / epochs) * (1 - fraction)
        told = f"epoch {number} of {epochs}, loss {loss:.4g}"
        if self.epochs and self.epochs[-1].metric is not None:
            best = self.epochs[self.best_epoch - 1].metric
            told += f", {self.metric} {self.epochs[-1].metric:.4f} (best {best:.4f} in epoch {self.best_epoch})"
        self.progress(fraction, f"{told}, {_duration(seconds)} left")

    def _diverged(self, number: int, why: str) -> StageFailed:
        return StageFailed(
            f"Training diverged in epoch {number}: {why}.",
            hint=f"Give a lower learning_rate than {self.training.learning_rate:g}, or check the data's scale.",
            code="training_diverged",
        )

    # ------------------------------------------------------------ what is kept

    def keep(self, epoch: Epoch) -> None:
        """Write the epoch down; returns once its checkpoint is safe."""
        self.epochs.append(epoch)
        best = self.epochs[self.best_epoch - 1].metric if self.best_epoch else None
        # of two that are as good the later: its learning rate was the lower
        if best is None or (epoch.metric is not None and epoch.metric >= best):
            self.best_epoch = epoch.number
            self.best = {name: tensor.clone() for name, tensor in self._left().state_dict().items()}
        self._save()

    def finish(self) -> TrainingLog:
        """Put the best weights into the network."""
        self.network.load_state_dict(self.best)
        self.network.eval()
        return TrainingLog(
            metric=self.metric,
            epochs=self.epochs,
            best_epoch=self.best_epoch,
            stopped_early=len(self.epochs) < self.training.epochs,
            resumed_after=self.resumed_after,
            samples=len(self.learnt),
            kept_out=len(self.kept_out),
            device=self.device.type,
        )

    def _save(self) -> None:
        moments = self.optimizer.state_dict()
        groups: dict[str, snapshot.Tensors] = {
            "network": self.network.state_dict(),
            "optimizer": {
                f"{index}/{name}": tensor
                for index, state in moments["state"].items()
                for name, tensor in state.items()
            },
        }
        if self.average is not None:
            groups["average"] = self.average.state_dict()
        if self.best_epoch < len(self.epochs):  # else they are the judged ones
            groups["best"] = self.best
        facts = {
            "of": self._fingerprint(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best_epoch": self.best_epoch,
            "param_groups": moments["param_groups"],
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        path = self.ctx.directory / f"{self.name}.checkpoint.safetensors"
        snapshot.write(path, groups, facts)
        self.ctx.checkpoints.save(self.name, path)

    def resume(self) -> None:
        """Take up the state that an earlier attempt left, if it is one of this very training."""
        path = self.ctx.checkpoints.load(self.name)
        if path is None:
            return
        groups, facts = snapshot.read(path)
        if facts["of"] != self._fingerprint():
            logging.warning("the checkpoint %s is of another training: beginning anew", self.name)
            return
        self.network.load_state_dict(groups["network"])
        if self.average is not None:
            self.average.load_state_dict(groups["average"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in groups.get("optimizer", {}).items():
            index, _, name = key.partition("/")
            moments.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": facts["param_groups"]})
        self.scheduler.load_state_dict(facts["scheduler"])
        if facts["scaler"]:  # else it was disabled: that attempt had another device
            self.scaler.load_state_dict(facts["scaler"])
        self.epochs = [Epoch(**epoch) for epoch in facts["epochs"]]
        self.best_epoch, self.resumed_after = facts["best_epoch"], len(self.epochs)
        best = groups.get("best") or self._left().state_dict()
        self.best = {name: tensor.clone() for name, tensor in best.items()}
        logging.info("going on after epoch %d of %d", self.resumed_after, self.training.epochs)

    def _fingerprint(self) -> str:
        """sha256 of all that decides what a checkpoint of this training looks like."""
        shapes = {name: list(tensor.shape) for name, tensor in self.network.state_dict().items()}
        soft = None if self.soft_targets is None else self.soft_targets.model_dump()
        told = [self.training.model_dump(), soft, self.ctx.seed, len(self.learnt), len(self.kept_out), shapes]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _seed(seed: int, epoch: int, use: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, use]).generate_state(1)[0])


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
