"""Small networks of known faults, and a stage's context for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from shared.recipe import Goal, ModelFormat, Stage
from tests.worker.workbench import Workbench
from worker import engines
from worker.context import Model, StageContext
from worker.data import Samples
from worker.evaluation.agreement import keep_reference
from worker.feed import Floats

SIZE = 32


def chain(
    path: Path, *, widest: float = 1.0, width: int = 32, opset: int = 17, batch: int | str = "batch"
) -> Model:
    """Five convolutions (first, second, middle, fourth, last) with ReLUs between them, as ONNX without node names.

    The middle one's first weight of each filter is `widest` times the others, on a channel that is always zero: in
    float it changes nothing, in eight bits the others vanish beside it.
    """
    rng = np.random.default_rng(0)
    names = ["first", "second", "middle", "fourth", "last"]
    widths = [1, width, width, width, width, 4]
    nodes, constants, value = [], [], "input"
    for name, before, after in zip(names, widths, widths[1:], strict=False):
        weight = rng.normal(0, 0.5 / np.sqrt(before), (after, before, 3, 3)).astype(np.float32)
        bias = rng.normal(0, 0.1, after).astype(np.float32)
        if name == "second":
            weight[0], bias[0] = 0, -1.0  # after the ReLU: zero
        if name == "middle":
            weight[:, 0] = widest * np.abs(weight).max()
        constants += [numpy_helper.from_array(weight, f"{name}.weight"), numpy_helper.from_array(bias, f"{name}.bias")]
        made = "output" if name == "last" else f"{name}.made"
        nodes.append(helper.make_node("Conv", [value, f"{name}.weight", f"{name}.bias"], [made], pads=[1, 1, 1, 1]))
        if name != "last":
            nodes.append(helper.make_node("Relu", [made], [f"{name}.relu"]))
        value = f"{name}.relu"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 1, SIZE, SIZE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, 4, SIZE, SIZE])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return Model(ModelFormat.ONNX, path)


def exported(network: torch.nn.Module, shape: Sequence[int], path: Path) -> Model:
    """A network with seeded weights as ONNX, its batch fixed at the shape's."""
    torch.onnx.export(
        network.eval(), (torch.zeros(*shape),), path, dynamo=True, external_data=False, verbose=False, opset_version=18
    )
    return Model(ModelFormat.ONNX, path)


def noise(part: str, count: int, shape: Sequence[int], *, labels: bool = False) -> Samples:
    """Seeded samples (count, *shape), the same for one part's name every time."""
    seed = sum(map(ord, part))

    def read(index: int) -> Floats:
        rng = np.random.default_rng((seed, index))
        return rng.normal(size=tuple(shape)).astype(np.float32)

    def read_target(index: int) -> Any:
        return np.random.default_rng((seed, index, 1)).integers(0, 4, tuple(shape[1:]))

    return Samples(part, count, read, read_target if labels else None)


def context(
    bench: Workbench,
    model: Model,
    directory: Path,
    shape: Sequence[int],
    *,
    stages: Sequence[Stage],
    count: int = 40,
    goals: Sequence[Goal] = (),
) -> StageContext:
    """A stage's context for a network of its own, with noise for data."""
    directory.mkdir(parents=True, exist_ok=True)
    evaluation = noise("evaluation", 8, shape)
    keep_reference(engines.load("onnxruntime").open(model, 1), evaluation, directory.parent / "reference.npy")
    found = bench.context(directory, stages=list(stages), goals=list(goals))
    return replace(
        found,
        source=model,
        reference=directory.parent / "reference.npy",
        samples=lambda part: evaluation if part == "evaluation" else noise(part, count, shape),
    )
