"""What a stage sees: the model it is given, and the context it works in. Nothing here imports a numerical library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shared.recipe import Architecture, ModelFormat, Recipe
from shared.report import Candidate, Measurement, Parity

if TYPE_CHECKING:
    from worker.data import Samples


@dataclass(frozen=True)
class Model:
    """A model on disk, as one stage hands it to the next.

    `path` is the file itself: safetensors weights (torch, beside `architecture`), an .onnx file, or an engine's zip.
    `variants` are other forms of the same model for one runtime, by the runtime's name (openvino: the .xml, its .bin
    beside it). `precision` is fp32, fp16 or int8.
    """

    format: ModelFormat
    path: Path
    architecture: Architecture | None = None
    precision: str = "fp32"
    variants: Mapping[str, Path] = field(default_factory=dict)

    def files(self) -> dict[str, Path]:
        """Every file of the model by role: `model`, then `model.<runtime>` and its companions."""
        found = {"model": self.path}
        for runtime, path in self.variants.items():
            found[f"model.{runtime}"] = path
            if path.suffix == ".xml":
                found[f"model.{runtime}.weights"] = path.with_suffix(".bin")
        return found


@dataclass(frozen=True)
class StageResult:
    """What a stage returns: the new model, and what the report should tell of it beside the usual measurements.

    A stage that measured its result itself (build_engine compares candidates) hands over what it measured, so that
    the figures in the report are those that decided; the pipeline measures the rest.
    """

    model: Model
    details: dict[str, Any] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    measurement: Measurement | None = None
    parity: Parity | None = None


class Progress(Protocol):
    def __call__(self, fraction: float, message: str = "") -> None:
        """Tell how far the stage is, 0..1; also the point where a stage can be interrupted."""


@dataclass(frozen=True)
class StageContext:
    """All that a stage may see beside its own spec and its model.

    `directory` is the stage's own, empty, and outlives it only for the files of the model it returns.
    """

    recipe: Recipe
    directory: Path
    samples: Callable[[str], Samples]  # the data set's part by name, preprocessed, in a fixed order
    source: Model  # the job's source model: parity is always held against it
    reference: Path  # the source model's raw outputs on the parity samples, .npy, as the baseline computed them
    baseline: Measurement
    progress: Progress
    seed: int
    threads: int
