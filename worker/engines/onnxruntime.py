"""ONNX Runtime on the CPU: the file that it loads is the portable ONNX itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from shared.errors import StageFailed
from worker.context import Model
from worker.engines.batching import in_fixed_batches
from worker.feed import Floats, Inputs, by_name

ERRORS = (
    errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented,
    errors.RuntimeException,
)  # fmt: skip


def build(model: Model, directory: Path) -> Path:
    """The ONNX file as it is. A graph optimized ahead of time would fit only the CPU that optimized it."""
    path = directory / "model.onnx"
    shutil.copyfile(model.path, path)
    return path


def open(model: Model, threads: int) -> OnnxRuntimeRunner:
    """A session with all graph optimizations. Raises StageFailed (engine_failed) if the runtime refuses the file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model.path, options, providers=["CPUExecutionProvider"])
    except ERRORS as error:
        raise StageFailed(f"ONNX Runtime refuses the model: {error}", code="engine_failed") from error
    return OnnxRuntimeRunner(session, model.precision, threads)


def files(path: Path) -> list[Path]:
    """Every file that the runtime loads."""
    return [path]


class OnnxRuntimeRunner:
    """One session; a model of a fixed batch is run as often as the batch needs, the last time padded."""

    engine = "onnxruntime"

    def __init__(self, session: onnxruntime.InferenceSession, precision: str, threads: int) -> None:
        self.session = session
        self.precision = precision
        self.threads = threads
        self.versions = {"onnxruntime": onnxruntime.__version__}
        self.input_name = session.get_inputs()[0].name
        batch = session.get_inputs()[0].shape[0]
        self.fixed_batch = batch if isinstance(batch, int) else None

    def run(self, inputs: Inputs) -> Floats:
        return self.run_all(inputs)[0]

    def run_all(self, inputs: Inputs) -> list[Floats]:
        if self.fixed_batch is None or self.fixed_batch == len(inputs):
            return self._run(inputs)
        return in_fixed_batches(self._run, inputs, self.fixed_batch)

    def _run(self, inputs: Inputs) -> list[Floats]:
        try:
            outputs: list[Floats] = self.session.run(None, by_name(inputs, self.input_name))
        except (*ERRORS, ValueError) as error:
            if "Failed to allocate memory" in str(error) or "bad_alloc" in str(error):
                raise MemoryError(str(error)) from error
            raise StageFailed(
                f"The model refuses inputs of shape {list(inputs.shape)}: {str(error).splitlines()[0]}",
                hint="Check the data set's channels and size, and preprocessing.layout.",
                code="input_mismatch",
            ) from error
        return outputs
