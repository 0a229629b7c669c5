"""PyTorch as it comes: the source model's own runtime, and so the baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from shared.errors import StageFailed
from worker.context import Model
from worker.feed import Floats, Inputs
from worker.loading import TensorOutput, load_module


def open(model: Model, threads: int) -> EagerRunner:
    """The model's network, built and filled. Raises what `load_module` raises."""
    return EagerRunner(load_module(model), threads)


def files(path: Path) -> list[Path]:
    """Every file that the runtime loads."""
    return [path]


class EagerRunner:
    """Runs a module in fp32 without gradients. The number of threads is the process's, set before every run."""

    engine = "torch eager"
    precision = "fp32"

    def __init__(self, module: torch.nn.Module, threads: int) -> None:
        self.module = TensorOutput(module).eval()
        self.threads = threads
        self.versions = {"torch": torch.__version__}

    def run_all(self, inputs: Inputs) -> list[Floats]:
        return [self.run(inputs)]

    def run(self, inputs: Inputs) -> Floats:
        assert isinstance(inputs, np.ndarray)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                outputs: torch.Tensor = self.module(torch.from_numpy(inputs))
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            if "memory" in str(error):
                raise MemoryError(str(error)) from error
            raise StageFailed(
                f"The model refuses inputs of shape {list(inputs.shape)}: {str(error).splitlines()[0]}",
                hint="Check the data set's channels and size, and preprocessing.layout.",
                code="input_mismatch",
            ) from error
        found: Floats = outputs.float().numpy()
        return found
