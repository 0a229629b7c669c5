"""The runtimes that a model can run on: one module each, loaded when it is asked for.

A module here is a runtime's whole contract:

    build(model: Model, directory: Path) -> Path
        The runtime's own file for the model, written into `directory`; companions lie beside it.
    open(model: Model, threads: int) -> Runner
        The model, loaded and ready to run on so many threads.
    files(path: Path) -> list[Path]
        Every file that the runtime loads, the given one first.

`eager` has no `build`: it runs the source model as it is. `tensorrt` builds for another machine than this one, so its
`build` takes a plan too, and `not_here` says why an engine cannot be run.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from worker.feed import Floats, Inputs


class Runner(Protocol):
    """A loaded model. `engine` and `precision` are what the report calls it, `versions` the libraries behind it."""

    engine: str
    precision: str
    threads: int
    versions: dict[str, str]

    def run(self, inputs: Inputs) -> Floats:
        """The first raw output of one batch. Raises StageFailed (input_mismatch) where the model refuses the input."""

    def run_all(self, inputs: Inputs) -> list[Floats]:
        """Every raw output of one batch, the first one first."""


def load(engine: str) -> ModuleType:
    """The module of a runtime by its name in the report, such as torch eager; both TensorRTs have one."""
    return importlib.import_module(f"worker.engines.{engine.removeprefix('torch ').removesuffix('_rtx')}")
