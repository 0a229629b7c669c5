"""A pruned network is tried before anything is spent on training it: run, trained for one step, stored, exported."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from shared.errors import StageFailed
from shared.recipe import ExportOnnx, ModelFormat
from worker import engines, stages
from worker.context import Blueprint, Model, StageContext
from worker.dependency import GRAPH_ERRORS, outputs, remove
from worker.evaluation.agreement import keep_reference
from worker.loading import load_module

MAX_NAMED = 20


def rehearse(module: nn.Module, architecture: Blueprint, ctx: StageContext, sample: torch.Tensor) -> None:
    """Raises StageFailed: not_prunable where the network does not train, reload or export; parity_failed."""
    directory = ctx.directory / "rehearsal"
    directory.mkdir()
    check_trains(module, sample, architecture.name)
    model = save(module, architecture, directory / "model.safetensors")
    check_reloads(module, model, sample)
    check_exports(model, ctx, directory)


def shapes_of(module: nn.Module, sample: torch.Tensor) -> list[list[int]]:
    """The shapes of everything that the network puts out for the sample (1, C, ...)."""
    with torch.no_grad():
        return [list(tensor.shape) for tensor in outputs(module.eval()(sample))]


def check_shapes(
    module: nn.Module,
    sample: torch.Tensor,
    expected: Sequence[Sequence[int]],
    whole: nn.Module,
    chosen: Mapping[str, Sequence[int]],
    name: str,
) -> None:
    """The pruned network runs, and its outputs have the shapes that the whole network's have.

    Raises StageFailed (not_prunable), with the layer that fails and those whose pruning makes it fail.
    """
    where: list[str] = []
    try:
        with _watched(module, where):
            found = shapes_of(module, sample)
    except GRAPH_ERRORS as error:
        why = f"{_layer(where)} does not run with fewer channels: {first_line(error)}"
        raise not_prunable(name, why, culprits(whole, sample, expected, chosen)) from error
    if found != list(expected):
        why = f"its outputs would have the shapes {found} in place of {list(expected)}"
        raise not_prunable(name, why, culprits(whole, sample, expected, chosen))


def culprits(
    whole: nn.Module, sample: torch.Tensor, expected: Sequence[Sequence[int]], chosen: Mapping[str, Sequence[int]]
) -> list[str]:
    """The layers of `chosen` that break the network when they alone are pruned."""
    found = []
    for root, channels in chosen.items():
        trial = copy.deepcopy(whole)
        try:
            remove(trial, sample, {root: channels})
            if shapes_of(trial, sample) != list(expected):
                found.append(root)
        except GRAPH_ERRORS:
            found.append(root)
    return found


def not_prunable(name: str, why: str, layers: Sequence[str]) -> StageFailed:
    """The refusal: what cannot be pruned, why, and what to write into the recipe."""
    listed = ", ".join(f'"{layer}"' for layer in layers[:MAX_NAMED]) + (", …" if len(layers) > MAX_NAMED else "")
    return StageFailed(
        f"{name} cannot be pruned: {why}.",
        hint=f"Add to ignored_layers: {listed}." if layers else "Distill it into a smaller student instead.",
        code="not_prunable",
    )


def check_trains(module: nn.Module, sample: torch.Tensor, name: str) -> None:
    """One step forward and back in training mode, on a copy: some layers run in training alone."""
    trial, where = copy.deepcopy(module).train(), list[str]()
    for parameter in trial.parameters():
        parameter.grad = None
    try:
        with _watched(trial, where):
            found = outputs(trial(torch.cat([sample, sample])))
        torch.stack([tensor.float().square().mean() for tensor in found]).sum().backward()  # type: ignore[no-untyped-call]
    except GRAPH_ERRORS as error:
        why = f"in training, {_layer(where)} does not run with fewer channels: {first_line(error)}"
        raise not_prunable(name, why, []) from error


def save(module: nn.Module, architecture: Blueprint, path: Path) -> Model:
    """The network's weights as a file of their own, and the model that they make with its architecture."""
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}
    safetensors.torch.save_file(weights, path)
    return Model(ModelFormat.TORCH, path, architecture, pruned=True)


def check_reloads(module: nn.Module, model: Model, sample: torch.Tensor) -> None:
    """What is rebuilt from architecture and weights gives the very same outputs."""
    assert model.architecture is not None
    with torch.no_grad():
        kept = outputs(module.eval()(sample))
        rebuilt = outputs(load_module(model)(sample))
    if not all(torch.equal(one, other) for one, other in zip(kept, rebuilt, strict=True)):
        why = "rebuilt from its weights it gives other outputs, so a size is kept outside of the weights"
        raise not_prunable(model.architecture.name, why, [])


def check_exports(model: Model, ctx: StageContext, directory: Path) -> None:
    """Its ONNX gives the same outputs, on real samples: the export stage itself, held against this network."""
    exported = directory / "onnx"
    exported.mkdir()
    runner = engines.load("torch eager").open(model, ctx.threads)
    reference = directory / "reference.npy"
    keep_reference(runner, ctx.samples("evaluation"), reference)
    rehearsal = replace(ctx, directory=exported, reference=reference, progress=lambda fraction, message="": None)
    stages.load("export_onnx").run(ExportOnnx(), model, rehearsal)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _layer(where: Sequence[str]) -> str:
    named = [name for name in where if name]
    return f"the layer {named[-1]!r}" if named else "the network's own forward"


@contextlib.contextmanager
def _watched(module: nn.Module, where: list[str]) -> Iterator[None]:
    """Within it, `where` holds the layers that are running, outermost first; an error leaves it as it was."""
    hooks = []
    for name, layer in module.named_modules():

        def enter(_layer: nn.Module, _inputs: Any, name: str = name) -> None:
            where.append(name)

        def leave(_layer: nn.Module, _inputs: Any, _output: Any) -> None:
            where.pop()

        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
