"""A model on its way out of the pipeline and back: its files by name, what they do not say, an engine's zip opened.

What is told here is what a later attempt builds the model from again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from shared.recipe import Architecture, ModelFormat
from shared.report import StageReport
from worker import wire
from worker.context import Blueprint, Graph, Model, forms_of
from worker.engines import archive


@dataclass(frozen=True)
class Unpacked:
    """An engine's archive, opened."""

    manifest: archive.Manifest
    files: Model
    portable: Model


@lru_cache
def unpacked(engine: Path) -> Unpacked:
    """The zip, checked and opened once an attempt. Raises StageFailed."""
    place = directory(f"unpacked/{engine.stem}")
    manifest = archive.read(engine, place)
    return Unpacked(
        manifest,
        Model(ModelFormat.ENGINE, place / manifest.entry, precision=manifest.precision),
        Model(ModelFormat.ONNX, place / manifest.portable, precision=manifest.precision),
    )


def files_of(report: StageReport, model: Model) -> list[wire.File]:
    """The model's files under the names that their owner downloads them by."""
    files = []
    for role, path in model.files().items():
        form = role.removeprefix("model").removeprefix("form").removesuffix(".weights").replace("+", "-")
        if model.format == ModelFormat.ENGINE:
            form = f".{path.stem}"
        files.append(
            wire.File(
                role=role,
                name=f"{report.position}-{report.kind}{form}{path.suffix}",
                format=model.format.value if path in (model.path, *model.engines) else path.suffix.removeprefix("."),
                path=path,
            )
        )
    return files


def built_of(model: Model) -> dict[str, Any]:
    """What the model's files do not say of it: the report tells it, and a later attempt reads it there."""
    told: dict[str, Any] = {"precision": model.precision}
    if model.format == ModelFormat.TORCH:
        told["pruned"] = model.pruned
    if model.name:
        told["form"] = model.name
    if model.format == ModelFormat.ONNX and model.retrained:
        told["retrained"] = True
    if isinstance(model.architecture, Architecture):
        told["architecture"] = model.architecture.model_dump(mode="json")
    return told


def rebuilt_of(details: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """Model's fields, as `built_of` and `Model.files` told them."""
    blueprint: Blueprint | None = Graph(files["graph"]) if "graph" in files else None
    if "architecture" in details:
        blueprint = Architecture.model_validate(details["architecture"])
    return {
        "precision": details["precision"],
        "name": details.get("form", ""),
        "pruned": details.get("pruned", False),
        "retrained": details.get("retrained", False),
        "architecture": blueprint,
        "forms": forms_of(files),
    }


def directory(name: str) -> Path:
    """A directory of this attempt's own, made if it is not there."""
    path = Path(name)
    path.mkdir(parents=True, exist_ok=True)
    return path
