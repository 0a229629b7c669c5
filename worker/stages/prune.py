"""Whole channels out, by their importance; then fine-tuning, with the unpruned source as teacher where that helps."""

from __future__ import annotations

import copy
import difflib
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shared.errors import StageFailed
from shared.recipe import ModelFormat, Prune, Training
from worker.budget import Chosen, choose, choose_for_macs, cost_after, layer_costs
from worker.complexity import module_macs, module_parameters
from worker.context import Blueprint, Model, StageContext, StageResult
from worker.dependency import GRAPH_ERRORS, Map, remove, survey
from worker.loading import load_module
from worker.logits import Logits, checked_logits
from worker.losses import task_loss
from worker.material import split
from worker.rehearsal import check_shapes, first_line, not_prunable, rehearse, save, shapes_of
from worker.shrink import sizes
from worker.training import train

REHEARSED, TRAINED = 0.1, 0.98  # of the stage's progress
TAYLOR_SAMPLES, TAYLOR_BATCH = 256, 8


def run(stage: Prune, model: Model, ctx: StageContext) -> StageResult:
    """Raises StageFailed: not_prunable, unknown_layer, export_failed, parity_failed, and what training raises."""
    assert model.architecture is not None
    torch.set_num_threads(ctx.threads)
    module = load_module(model)
    sample = torch.from_numpy(ctx.samples("evaluation").inputs(0, 1))  # (1, C, ...)
    shears = _Shears(stage, module, model.architecture, ctx, sample)

    # all of it on a copy, and everything that can go wrong, before anything is spent on training
    ctx.progress(0.0, "pruning")
    rehearsed = copy.deepcopy(module)
    shears.cut(rehearsed, 1.0)
    ctx.progress(0.3 * REHEARSED, "checking the pruned network")
    rehearse(rehearsed, model.architecture, ctx, sample)
    shutil.rmtree(ctx.directory / "rehearsal")

    # step by step, each healed before the next
    logs = []
    for step in range(1, stage.iterations + 1):
        if stage.iterations == 1:
            module = rehearsed
        else:
            shears.cut(module, step / stage.iterations, _begin(step, stage))
        if stage.training is not None:
            logs.append(_heal(module, model, stage, stage.training, step, ctx))

    pruned = save(module.eval(), model.architecture, ctx.directory / "model.safetensors")
    ctx.progress(1.0)
    taught = any(log["teacher_used"] for log in logs)
    trained = {
        "teacher": _teacher(stage, model, ctx)[1] if taught else None,
        "teacher_warning": next((log["teacher_warning"] for log in logs if log["teacher_warning"]), None),
        "training": logs,
    }
    return StageResult(pruned, details={**shears.told(module), **trained})


class _Shears:
    """Cuts a network down, more at every call, always counting from what it was at first."""

    def __init__(
        self, stage: Prune, module: nn.Module, architecture: Blueprint, ctx: StageContext, sample: torch.Tensor
    ) -> None:
        self.stage, self.ctx, self.sample, self.name = stage, ctx, sample, architecture.name
        self.ignored = [layer_named(name, module) for name in stage.ignored_layers]
        self.expected = shapes_of(module, sample)
        self.channels = sizes(module)
        self.parameters = module_parameters(module)
        self.macs = module_macs(module, tuple(sample.shape[1:]))
        self.roots: set[str] = set()
        self.heads: tuple[str, ...] = ()

    def cut(self, module: nn.Module, share: float, told: float = 0.0) -> None:
        """Prune the network in place until `share` of the whole budget is gone. `told` is the stage's progress."""
        if self.stage.importance == "taylor":
            self.ctx.progress(told, "judging channels by their gradients")
            _gradients(module, self.ctx)
        found = self._survey(module)
        chosen = self._choose(module, found, self.stage.pruning_ratio * share)
        if not chosen and share == 1.0:
            raise self._nothing_to_cut(found)
        whole = copy.deepcopy(module)
        try:
            remove(module, self.sample, chosen)
        except GRAPH_ERRORS as error:
            raise self._lost(error, list(chosen)) from error
        module.zero_grad(set_to_none=True)
        check_shapes(module, self.sample, self.expected, whole, chosen, self.name)

    def _survey(self, module: nn.Module) -> Map:
        try:
            found = survey(module, self.sample, self.ignored, self.stage.importance)
        except GRAPH_ERRORS as error:
            raise self._lost(error, []) from error
        if found.lost:
            why = f"the channels of {found.lost[0]!r} cannot be followed through the network"
            raise not_prunable(self.name, why, found.lost)
        self.roots |= {unit.root for unit in found.units}
        self.heads = found.heads
        return found

    def _choose(self, module: nn.Module, found: Map, ratio: float) -> Chosen:
        stage = self.stage
        original = {unit.root: self.channels[unit.root] for unit in found.units}
        if stage.budget == "channels":
            return choose(found.units, ratio, stage.scope, stage.round_to, original)
        costs = layer_costs(module, self.sample)
        others = module_macs(module, tuple(self.sample.shape[1:])) - sum(cost.macs for cost in costs.values())
        target = (1 - ratio) * self.macs
        chosen = choose_for_macs(found.units, costs, target - others, stage.scope, stage.round_to, original)
        if chosen is None:
            most = choose(found.units, 1.0, stage.scope, stage.round_to, original)
            left = (cost_after(costs, found.units, most) + others) / self.macs
            raise StageFailed(
                f"Pruning can remove {1 - left:.0%} of the MACs of {self.name} at most; {ratio:.0%} was asked.",
                hint="Lower pruning_ratio or round_to, or distill it into a smaller student.",
                code="not_prunable",
            )
        return chosen

    def _nothing_to_cut(self, found: Map) -> StageFailed:
        if not found.units and self.stage.importance == "batchnorm_scale":
            return StageFailed(
                f"{self.name} has no normalization with a scale to judge channels by.",
                hint='Use importance "l2".',
                code="not_prunable",
            )
        most = max((unit.channels for unit in found.units), default=0)
        return StageFailed(
            f"Nothing would be removed of {self.name}: channels left are multiples of {self.stage.round_to}, and its "
            f"largest layer that may be pruned has {most}.",
            hint="Lower round_to, raise pruning_ratio, or shorten ignored_layers.",
            code="not_prunable",
        )

    def _lost(self, error: Exception, layers: list[str]) -> StageFailed:
        return not_prunable(self.name, f"its channels cannot be followed ({first_line(error)})", layers)

    def told(self, module: nn.Module) -> dict[str, Any]:
        """What the report tells: sizes before and after, and each layer's channels where they changed."""
        after = sizes(module)
        macs = module_macs(module, tuple(self.sample.shape[1:]))
        before_cut, after_cut = (sum(sized[root] for root in self.roots) for sized in (self.channels, after))
        return {
            "parameters": [self.parameters, module_parameters(module)],
            "macs": [self.macs, macs],
            "channels": {
                name: [before, after[name]] for name, before in self.channels.items() if before != after[name]
            },
            "channels_removed_ratio": round(1 - after_cut / before_cut, 4),
            "macs_removed_ratio": round(1 - macs / self.macs, 4),
            "parameters_removed_ratio": round(1 - module_parameters(module) / self.parameters, 4),
            "heads": list(self.heads),
            "ignored_layers": self.ignored,
        }


def layer_named(name: str, module: nn.Module) -> str:
    """The layer that a recipe means, by its name or that of one of its weights. Raises StageFailed (unknown_layer)."""
    layers = {layer for layer, _ in module.named_modules() if layer}
    owner = name.rpartition(".")[0]
    if name in layers or (owner in layers and name in module.state_dict()):
        return name if name in layers else owner
    close = difflib.get_close_matches(name, layers, n=3, cutoff=0.5)
    raise StageFailed(
        f"The network has no layer named {name!r}.",
        hint=f"Close names: {', '.join(close)}." if close else f"Its layers are {', '.join(sorted(layers)[:5])}, …",
        code="unknown_layer",
    )


def _gradients(module: nn.Module, ctx: StageContext) -> None:
    """Leave in every parameter the gradient of the task's loss, summed over samples of the train part."""
    learnt, _ = split(ctx.samples("train"), 0.0)
    logits, settings = Logits(module, ctx.recipe.task).eval(), Training()
    count = min(TAYLOR_SAMPLES, len(learnt))
    positions = [index * len(learnt) // count for index in range(count)]
    module.zero_grad(set_to_none=True)
    for start in range(0, count, TAYLOR_BATCH):
        inputs, targets = learnt.take(positions[start : start + TAYLOR_BATCH])
        if targets is None:
            raise StageFailed(
                "The train part has no labels, which the importance taylor needs.",
                hint='Use importance "l2".',
                code="data_mismatch",
            )
        task_loss(checked_logits(logits, inputs, targets), targets, ctx.recipe.task, settings).backward()  # type: ignore[no-untyped-call]
    for parameter in module.parameters():
        if parameter.grad is None:  # a layer that runs in training alone
            parameter.grad = torch.zeros_like(parameter)


def _heal(
    module: nn.Module, unpruned: Model, stage: Prune, training: Training, step: int, ctx: StageContext
) -> Mapping[str, Any]:
    """Fine-tune in place."""
    begin, end = _begin(step, stage), _begin(step + 1, stage)

    def progress(fraction: float, message: str = "") -> None:
        ctx.progress(begin + fraction * (end - begin), message)

    teacher, _ = _teacher(stage, unpruned, ctx)
    log = train(
        module,
        training,
        ctx,
        teacher=None if teacher is None else load_module(teacher),
        soft_targets=stage.soft_targets,
        name="training" if stage.iterations == 1 else f"training-{step}",
        progress=progress,
    )
    return log.details()


def _teacher(stage: Prune, unpruned: Model, ctx: StageContext) -> tuple[Model | None, str | None]:
    """The job's source, which nothing was taken from, or where that is ONNX, what the stage was given; and its name."""
    if stage.soft_targets is None or not stage.soft_targets.alpha:
        return None, None
    if ctx.source.format == ModelFormat.TORCH:
        return ctx.source, "the source model"
    return unpruned, "the imported network"


def _begin(step: int, stage: Prune) -> float:
    """The stage's progress as a step begins; steps count from 1."""
    return REHEARSED + (step - 1) / stage.iterations * (TRAINED - REHEARSED)
