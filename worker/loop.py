"""One run of epochs: a training, or one of the two short ones that a teacher is tried in.

Each epoch is seeded by its own number, so that the state after it is all that the next one depends on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from shared.errors import StageFailed
from shared.recipe import Training
from worker import snapshot
from worker.augment import augment
from worker.descent import averaged, optimizer_of, scheduler_of
from worker.logits import AllOutputs, Logits, check_same_shapes, checked_logits, checked_outputs
from worker.losses import outputs_loss, total_loss
from worker.material import split
from worker.precision import StepForm, fastest_form, form_on_gpu
from worker.teacher import Arm, Teacher, Trial
from worker.training_log import Epoch, TrainingLog
from worker.validation import closeness, scores_by_sample, validate

if TYPE_CHECKING:
    from worker.training import Session

MAX_GRADIENT_NORM = 5.0
FOR_SAMPLES, FOR_NETWORK = 0, 1

Phase = Literal["training"] | Arm
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Saved:
    """What an earlier attempt left."""

    groups: dict[str, Weights]
    facts: dict[str, Any]


class Loop:
    """One run of epochs: the training itself, or one of the two of the trial."""

    def __init__(self, session: Session, training: Training, phase: Phase, taught: bool, epochs_before: int) -> None:
        self.session, self.training, self.phase, self.epochs_before = session, training, phase, epochs_before
        self.network, self.device, self.ctx = session.network, session.device, session.ctx
        self.task, self.layout = self.ctx.recipe.task, self.ctx.recipe.data.preprocessing.layout
        self.learnt, self.kept_out = split(self.ctx.samples("train"), training.validation_ratio)
        self.steps = math.ceil(len(self.learnt) / training.batch)  # an epoch
        self.decides = self.task.target is not None
        self.has_labels = self.decides and self.learnt.has_targets
        self.metric = self.task.metrics[0] if self.has_labels else "closeness"
        self.soft_targets = session.soft_targets if taught else None
        if not self.has_labels and (self.soft_targets is None or self.soft_targets.alpha < 1):
            raise StageFailed(
                "The train part has no labels.",
                hint="Add them, or learn from the source model alone: soft_targets: {alpha: 1}.",
                code="data_mismatch",
            )

        # how a step is computed
        self.network.to(self.device)
        if session.form is None:
            session.form = self._measured_form()
        self.form = session.form
        self.form.lay_out(self.network)
        self.reader = self._reader(self.network)

        # what changes the network, and its average
        self.average = averaged(self.network, training.ema_decay) if training.ema_decay else None
        self.optimizer = optimizer_of(self.network, training)
        self.scheduler = scheduler_of(self.optimizer, training, self.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.form.precision == "fp16")

        # whom it learns from, beside the labels
        self.teacher: Teacher | None = None
        if self.soft_targets is not None:
            assert session.teacher is not None
            reader = self._reader(session.teacher)
            self.teacher = Teacher(
                *(reader, self.learnt, training.augmentation, training.batch, self.form, self.device, session.progress)
            )

        self.epochs: list[Epoch] = []
        self.best: Weights = {}
        self.best_epoch = self.resumed_after = 0
        if session.saved is not None and session.saved.facts["phase"] == phase:
            self._resume(session.saved)

    def _reader(self, network: nn.Module) -> Logits | AllOutputs:
        return Logits(network, self.task) if self.decides else AllOutputs(network)

    def _measured_form(self) -> StepForm:
        """The form of step that this machine computes fastest; the network is left as it was."""
        if self.device.type == "cuda":
            return form_on_gpu(self.device)
        before = clone(self.network.state_dict())
        stored = self.learnt.take(range(min(self.training.batch, len(self.learnt))))
        reader = self._reader(self.network).train()

        def step(form: StepForm) -> None:
            self.network.zero_grad(set_to_none=True)
            form.lay_out(self.network)
            with form.autocast(self.device):
                outputs = checked_outputs(reader, form.laid_out(stored[0]))
            tensors = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            torch.stack([tensor.float().square().mean() for tensor in tensors]).sum().backward()  # type: ignore[no-untyped-call]

        form = fastest_form(step, self.session.num_epochs * self.steps)
        self.network.load_state_dict(before)
        self.network.zero_grad(set_to_none=True)
        return form

    # ------------------------------------------------------------ epochs

    def ended(self) -> bool:
        patience = self.training.patience
        return len(self.epochs) >= self.training.epochs or (patience is not None and self._waited() >= patience)

    def _waited(self) -> int:
        """Epochs since the metric was last better than ever before."""
        metrics = [epoch.metric or 0.0 for epoch in self.epochs]
        return len(metrics) - 1 - metrics.index(max(metrics)) if metrics else 0

    def epoch(self) -> Epoch:
        """One pass over the samples, in an order and with changes that its number alone decides."""
        number = len(self.epochs) + 1
        generator = torch.Generator().manual_seed(_seed(self.ctx.seed, number, FOR_SAMPLES))
        torch.manual_seed(_seed(self.ctx.seed, number, FOR_NETWORK))
        order = torch.randperm(len(self.learnt), generator=generator).tolist()
        self.reader.train()
        total, seen = 0.0, 0
        # batches of nearly one size: a last one of a single sample would break BatchNorm
        for indices in np.array_split(order, self.steps):
            loss = self._step(indices.tolist(), generator)
            if not math.isfinite(loss):
                raise self._diverged(number, "the loss is not a finite number")
            total, seen = total + loss * len(indices), seen + len(indices)
            self._tell(number, seen / len(order), total / seen)
        metric = self._validated() if self.phase == "training" else None
        if metric is not None and math.isnan(metric):
            raise self._diverged(number, "the network's outputs are not finite numbers")
        return Epoch(number, total / len(order), metric, float(self.optimizer.param_groups[0]["lr"]))

    def _step(self, indices: list[int], generator: torch.Generator) -> float:
        """One batch: returns its loss."""
        stored, labels = self.learnt.take(indices)
        inputs, targets = augment(stored, labels, self.training.augmentation, generator, self.layout)
        inputs = self.form.laid_out(inputs.to(self.device))  # (n, C, H, W)
        targets = None if targets is None else targets.to(self.device)  # (n, ...)
        loss = self._loss(indices, inputs, targets)

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

    def _loss(self, indices: list[int], inputs: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        """Forward, in the precision of the step, and the loss in fp32."""
        soft = None if self.teacher is None else self.teacher(indices, inputs)
        with self.form.autocast(self.device):
            if isinstance(self.reader, Logits):
                logits = checked_logits(self.reader, inputs, targets)  # (n, classes, ...)
            else:
                outputs = checked_outputs(self.reader, inputs)
        if isinstance(self.reader, Logits):
            assert not isinstance(soft, tuple)
            return total_loss(logits, targets, soft, self.task, self.training, self.soft_targets)
        assert isinstance(outputs, tuple)
        assert isinstance(soft, tuple)
        check_same_shapes(outputs, soft)
        return outputs_loss(outputs, soft)

    def _validated(self) -> float | None:
        network = self._reader(self.left()).eval()
        if self.has_labels:
            return validate(network, self.kept_out, self.task, self.training.batch, self.device)
        assert self.session.teacher is not None
        teacher = self._reader(self.session.teacher).eval()
        return closeness(network, teacher, self.kept_out, self.training.batch, self.device)

    def scores(self, network: nn.Module) -> list[float]:
        """The network's score on each sample that is kept out."""
        reader = self._reader(network).eval()
        return scores_by_sample(reader, self.kept_out, self.task, self.training.batch, self.device)

    def left(self) -> nn.Module:
        """What is validated and, in the end, left: the network with the averaged weights where there are any."""
        return self.network if self.average is None else self.average.module

    def _tell(self, number: int, epoch_ratio: float, loss: float) -> None:
        message = f"epoch {number} of {self.training.epochs}, loss {loss:.4g}"
        if self.phase != "training":
            message = f"trying what the teacher is worth, {self.phase}: {message}"
        if self.epochs and self.epochs[-1].metric is not None:
            best = self.epochs[self.best_epoch - 1].metric
            message += f", {self.metric} {self.epochs[-1].metric:.4f} (best {best:.4f} in epoch {self.best_epoch})"
        self.session.tell(self.epochs_before + number - 1 + epoch_ratio, message)

    def _diverged(self, number: int, why: str) -> StageFailed:
        return StageFailed(
            f"Training diverged in epoch {number}: {why}.",
            hint=f"Give a lower learning_rate than {self.training.learning_rate:g}, or check the data's scale.",
            code="training_diverged",
        )

    # ------------------------------------------------------------ what is kept

    def add(self, epoch: Epoch) -> None:
        """Take an epoch into the history; where a save is due, returns once it is safe."""
        self.epochs.append(epoch)
        best = self.epochs[self.best_epoch - 1].metric if self.best_epoch else None
        # of two that are as good the later: its learning rate was the lower
        if best is None or (epoch.metric is not None and epoch.metric >= best):
            self.best_epoch = epoch.number
            self.best = clone(self.left().state_dict())
        if self.session.timer.epoch_ended():
            self._save()

    def finish(self, trial: Trial | None, teacher_warning: str | None) -> TrainingLog:
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
            form=self.form,
            taught=self.teacher is not None,
            trial=trial,
            teacher_warning=teacher_warning,
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
        if self.best_epoch < len(self.epochs):  # else they are the validated ones
            groups["best"] = self.best
        facts = {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best_epoch": self.best_epoch,
            "param_groups": moments["param_groups"],
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        self.session.save(self.phase, groups, facts)

    def _resume(self, saved: Saved) -> None:
        """Take up the state that an earlier attempt left."""
        groups, facts = saved.groups, saved.facts
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
        best = groups.get("best") or self.left().state_dict()
        self.best = clone(best)
        logging.info("going on after epoch %d of %d", self.resumed_after, self.training.epochs)


def clone(weights: Mapping[str, torch.Tensor]) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def _seed(seed: int, epoch: int, use: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, use]).generate_state(1)[0])
