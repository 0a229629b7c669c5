"""What a stage sees: the model it is given, and the context it works in. Nothing here imports a numerical library."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from shared.recipe import Architecture, ModelFormat, Recipe
from shared.report import Agreement, Candidate, Measurement, TargetReport

if TYPE_CHECKING:
    from worker.data import Samples
    from worker.engines import Runner
    from worker.evaluation.once import Evaluated


@dataclass(frozen=True)
class Form:
    """The same model once more, made for one runtime or, where `engine` is "any", in a file that all of them read.

    `path` is an .onnx file or, for openvino, an .xml with its .bin beside it. `name` tells forms of one engine and
    precision apart.
    """

    engine: str
    precision: str
    path: Path
    name: str = ""

    @property
    def role(self) -> str:
        """What the file is stored as: form.<engine>.<precision>[.<name>]."""
        return ".".join(part for part in ("form", self.engine, self.precision, self.name) if part)


@dataclass(frozen=True)
class Graph:
    """What a network that came as ONNX is built from: the file that the import wrote, beside its weights."""

    path: Path
    name: str = "The imported network"


Blueprint = Architecture | Graph


@dataclass(frozen=True)
class Model:
    """A model on disk, as one stage hands it to the next.

    `path` is the file itself: safetensors weights (torch, beside `architecture`), an .onnx file, or an engine's zip.
    `forms` are what else an engine may be built of. `precision` is fp32, fp16, bf16, int8, int8+fp32 where layers that
    lose too much in int8 were left in float, or int8+bf16 where all that is not int8 is run in bf16. `name` is that of
    the form that the model was. Of an engine, `engines` are the zips for the other targets. A `pruned` network
    is built from its architecture and then shrunk to the shapes of its weights. A `retrained` model's weights are not
    those of the network it was made of: quantization-aware training has changed them.
    """

    format: ModelFormat
    path: Path
    architecture: Blueprint | None = None
    precision: str = "fp32"
    name: str = ""
    pruned: bool = False
    retrained: bool = False
    forms: tuple[Form, ...] = ()
    engines: tuple[Path, ...] = ()

    def candidates(self, engine: str) -> list[Model]:
        """What the runtime may be built of, each as a model of its own, the likeliest first: its own forms, or the
        model itself where it has none (ONNX Runtime reads both), then what every runtime reads: fp32 ONNX."""
        alone = replace(self, forms=())
        own = [form for form in self.forms if form.engine == engine]
        shared = [form for form in self.forms if form.engine == "any"]
        found = [
            replace(alone, path=form.path, precision=form.precision, name=form.name) for form in own + shared
        ]
        if engine == "onnxruntime" or not own:
            return [alone, *found]
        return [*found, alone] if self.precision == "fp32" else found

    def trained(self) -> Model | None:
        """The float network that training left, which all that is made of it is held against; None if none did."""
        if self.format == ModelFormat.TORCH:
            return self
        return self.candidates("any")[0] if self.retrained else None

    def files(self) -> dict[str, Path]:
        """Every file of the model by role: `model`, then `graph`, then each form's role and its companion `.weights`;
        of an engine `engine`, then `engine.<target>`."""
        if self.format == ModelFormat.ENGINE:
            return {"engine": self.path, **{f"engine.{path.stem}": path for path in self.engines}}
        found = {"model": self.path}
        if isinstance(self.architecture, Graph):
            found["graph"] = self.architecture.path
        for form in self.forms:
            found[form.role] = form.path
            if form.path.suffix == ".xml":
                found[f"{form.role}.weights"] = form.path.with_suffix(".bin")
        return found


def forms_of(files: Mapping[str, Path]) -> tuple[Form, ...]:
    """The forms among a model's files by role, in their order: what `Model.files` gave."""
    roles = [(role.split("."), path) for role, path in files.items()]
    forms = [(parts[1:], path) for parts, path in roles if parts[0] == "form" and parts[-1] != "weights"]
    return tuple(Form(parts[0], parts[1], path, *parts[2:]) for parts, path in forms)


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
    agreement: Agreement | None = None
    targets: list[TargetReport] = field(default_factory=list)
    unpaid: str | None = None  # why the result, right as it may be, is not worth delivering


class Progress(Protocol):
    def __call__(self, fraction: float, message: str = "") -> None:
        """Tell how far the stage is, 0..1; also the point where a stage can be interrupted."""


class Checkpoints(Protocol):
    """A long stage's memory: what is saved under a name is what a later attempt at the stage loads."""

    def load(self, name: str) -> Path | None:
        """The newest file saved under the name, by this or an earlier attempt (timings: or job)."""

    def save(self, name: str, path: Path) -> None:
        """Keep a file; returns once it is safe. The one kept before under the name is forgotten."""


class Evaluate(Protocol):
    def __call__(self, model: Model, runner: Runner, requested: Collection[str] | None = None) -> Evaluated:
        """How right the model is, loaded in `runner`; computed once for each model and engine.

        `requested` are metrics to compute beside those that always are; null: those that goals name.
        """


@dataclass(frozen=True)
class StageContext:
    """All that a stage may see beside its own spec and its model.

    `directory` is the stage's own, empty, and outlives it only for the files of the model it returns.
    """

    recipe: Recipe
    directory: Path
    samples: Callable[[str], Samples]  # the data set's part by name, preprocessed, in a fixed order
    source: Model  # the job's source model
    reference: Path  # raw outputs of the source, or of what the last training stage made of it, on some samples
    evaluate: Evaluate
    onnxruntime: Callable[[], tuple[Model, Runner]]  # the source model's cleaned fp32 graph, in ONNX Runtime
    baseline: Measurement | None  # null while the baseline itself is measured
    progress: Progress
    checkpoints: Checkpoints
    timings: Checkpoints  # TensorRT's, of its kernels: they outlive the job
    seed: int
    threads: int
    network: Model | None = None  # the last good PyTorch network; None where the source is ONNX and none was imported
