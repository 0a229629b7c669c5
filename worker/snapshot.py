"""The state of a training in one safetensors file: tensors by group, and the rest as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

Tensors = Mapping[str, torch.Tensor]

def write(path: Path, groups: Mapping[str, Tensors], facts: Mapping[str, Any]) -> None:
    """Write all or nothing: the file appears under its name once it is whole."""
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for group, found in groups.items()
        for name, tensor in found.items()
    }
    partial = path.with_name(path.name + ".partial")
    safetensors.torch.save_file(tensors, partial, metadata={"facts": json.dumps(facts)})
    partial.rename(path)


def read(path: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """The tensors by group and name, on the CPU, and the facts."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    with safetensors.safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
    return groups, facts
