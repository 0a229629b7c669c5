"""From a customer's file to a network, without running anything of theirs.

PyTorch networks are built by name from the registry of a known library and filled from safetensors; ONNX files are
read without external data and without custom operators. Names and shapes are compared before memory is allocated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch

from shared.errors import StageFailed
from shared.formats import DTYPE_BYTES, inspect_file
from shared.recipe import ModelFormat, Source, TorchSource
from worker.architectures import LargeTensorsOnMeta, construct, constructor
from worker.context import Blueprint, Graph, Model
from worker.onnx_to_torch import load_graph
from worker.ports import settle_ports
from worker.shrink import shrink
from worker.vetting import QUANTIZED, check_ports, load_onnx_checked, load_onnx_vetted, operators, other_inputs


def open_source(path: Path, source: Source, directory: Path) -> Model:
    """The source model, vetted before a runtime sees it. Raises UnsafeFormat, InvalidFile, StageFailed.

    An ONNX file stays as it came, for it is the baseline; only where its ports have to be settled, a copy is written
    into `directory`.
    """
    if isinstance(source, TorchSource):
        with path.open("rb") as file:
            inspect_file(file, path.stat().st_size, "safetensors")
        return Model(ModelFormat.TORCH, path, source.architecture)
    graph = load_onnx_vetted(path)
    if settle_ports(graph, source):
        path = directory / "source.onnx"
        path.write_bytes(graph.SerializeToString(deterministic=True))
    check_ports(graph)
    return Model(ModelFormat.ONNX, path, precision="int8" if operators(graph) & QUANTIZED else "fp32")


def others_of(source: Model) -> tuple[str, ...]:
    """Names of the inputs that the network has beside the images."""
    return other_inputs(load_onnx_checked(source.path)) if source.format == ModelFormat.ONNX else ()


def digest(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- PyTorch


def load_module(model: Model) -> torch.nn.Module:
    """The network of `model.architecture` with the weights of `model.path`, in evaluation mode, fp32, on the CPU.

    An imported network is built from its graph. A pruned model's layers shrink to the shapes of its weights.
    Raises StageFailed: unknown_architecture, invalid_arguments, weights_mismatch, model_too_large.
    """
    assert model.architecture is not None
    with model.path.open("rb") as file:
        stored = inspect_file(file, model.path.stat().st_size, "safetensors")["tensors"]
    _check_fits_in_memory(stored)
    blueprint = model.architecture
    if isinstance(blueprint, Graph):
        outline = module = load_graph(blueprint.path)
    else:
        build = constructor(blueprint)
        outline = construct(build, blueprint, LargeTensorsOnMeta())
    shapes = {name: entry["shape"] for name, entry in stored.items()}
    if model.pruned:
        shrink(outline, shapes)
    _check_weights(outline.state_dict(), stored, model.architecture)
    if not isinstance(blueprint, Graph):
        module = construct(build, blueprint, None)
        if model.pruned:
            shrink(module, shapes)
    module.load_state_dict(safetensors.torch.load_file(model.path), strict=True)
    return module.float().eval()


def _check_weights(
    expected: Mapping[str, torch.Tensor], stored: Mapping[str, Mapping[str, Any]], architecture: Blueprint
) -> None:
    """Compare names, shapes and kinds of the weights with the network's, naming the first few that differ."""
    missing = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected]
    wrong = [
        f"{name} is {stored[name]['shape']}, the network has {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and list(tensor.shape) != stored[name]["shape"]
    ]
    kinds = [
        f"{name} is {stored[name]['dtype']}, the network has {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in expected.items()
        if name in stored and tensor.is_floating_point() != ("F" in stored[name]["dtype"])
    ]
    problems = [("missing", missing), ("unknown", unknown), ("of another shape", wrong), ("of another type", kinds)]
    told = [f"{len(names)} {problem} ({_few(names)})" for problem, names in problems if names]
    if told:
        raise StageFailed(
            f"The weights do not fit {architecture.name}: {len(stored)} tensors, of them {'; '.join(told)}.",
            hint="Give the architecture the arguments that the network was trained with.",
            code="weights_mismatch",
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _check_fits_in_memory(stored: Mapping[str, Mapping[str, Any]]) -> None:
    """The file's tensors and the network's own, side by side in fp32, must fit."""
    needed_bytes = sum(
        math.prod(entry["shape"]) * (4 + DTYPE_BYTES[entry["dtype"]]) for entry in stored.values()
    )
    available_bytes = psutil.virtual_memory().available
    if needed_bytes > available_bytes:
        raise StageFailed(
            f"The model needs {needed_bytes / 2**30:.1f} GiB of memory; {available_bytes / 2**30:.1f} GiB are free.",
            code="model_too_large",
        )


class TensorOutput(torch.nn.Module):
    """A network that gives one tensor, whatever the wrapped one gives.

    Of a dict (torchvision's segmentation networks) that is `out`, or else its first value; of a list or tuple
    (deep supervision, auxiliary heads) the first.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: Any = self.network(inputs)
        while not isinstance(found, torch.Tensor):
            if isinstance(found, dict):
                found = found["out"] if "out" in found else next(iter(found.values()))
            else:
                found = found[0]
        return found
