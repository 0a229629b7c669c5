"""A smaller student, trained on the labels and, where that is better or there are none, on the source's outputs."""

from __future__ import annotations

from dataclasses import dataclass

import safetensors.torch
import torch
from torch import nn

from shared.errors import StageFailed
from shared.recipe import Distill, ModelFormat
from worker.architectures import new_module
from worker.complexity import module_parameters
from worker.context import Blueprint, Model, StageContext, StageResult
from worker.loading import load_module
from worker.logits import AllOutputs, Logits, check_same_shapes, checked_logits, checked_outputs
from worker.material import Material
from worker.training import train
from worker.width import narrower, prune_and_forget


def run(stage: Distill, model: Model, ctx: StageContext) -> StageResult:
    """Raises StageFailed: student_too_large, no_width, and what building, loading and training raise."""
    ctx.progress(0.0, "building the student")
    source = ctx.source if ctx.source.format == ModelFormat.TORCH else model
    teacher = load_module(source)
    inputs, targets = Material(ctx.samples("train"), range(1)).take([0])  # (1, C, H, W), (1, ...)

    # the student, with random weights that the job's seed decides
    torch.manual_seed(ctx.seed)
    student = _student(stage, source, inputs)
    _check(student.module, teacher, inputs, targets, ctx)

    # what it learns, it learns in the shared loop
    log = train(student.module, stage.training, ctx, teacher=teacher, soft_targets=stage.soft_targets)

    path = ctx.directory / "model.safetensors"
    weights = {name: tensor.clone().contiguous() for name, tensor in student.module.state_dict().items()}
    safetensors.torch.save_file(weights, path)
    ctx.progress(1.0)
    details = {
        "parameters": module_parameters(student.module),
        "source_parameters": module_parameters(teacher),
        "student": student.origin,
        **log.details(),
    }
    return StageResult(Model(ModelFormat.TORCH, path, student.architecture, pruned=student.pruned), details=details)


@dataclass(frozen=True)
class _Student:
    """A network, what it is built from again, and how it was come by."""

    module: nn.Module
    architecture: Blueprint
    pruned: bool
    origin: str


def _student(stage: Distill, source: Model, inputs: torch.Tensor) -> _Student:
    assert source.architecture is not None
    if stage.student is not None:
        return _Student(new_module(stage.student), stage.student, False, "an architecture of its own")
    assert stage.width is not None
    narrow = None if source.pruned else narrower(source.architecture, stage.width)
    if narrow is not None:
        return _Student(new_module(narrow), narrow, False, "the source's constructor, narrower")
    module = load_module(source)
    prune_and_forget(module, inputs, stage.width, source.architecture.name)
    return _Student(module, source.architecture, True, "the source, pruned and with new weights")


def _check(
    student: nn.Module, teacher: nn.Module, inputs: torch.Tensor, targets: torch.Tensor | None, ctx: StageContext
) -> None:
    """One pass forward, before anything is spent on training; and that the student is the smaller one."""
    with torch.no_grad():
        if ctx.recipe.task.target is not None:
            checked_logits(Logits(student, ctx.recipe.task).eval(), inputs, targets)
        else:
            found = checked_outputs(AllOutputs(student).eval(), inputs)
            check_same_shapes(found, AllOutputs(teacher).eval()(inputs))
    parameters, most = module_parameters(student), module_parameters(teacher)
    if parameters >= most:
        raise StageFailed(
            f"The student has {parameters:,} parameters, and the source only {most:,}.",
            hint="Give a smaller width (channels are rounded to multiples of 8), or another student.",
            code="student_too_large",
        )
