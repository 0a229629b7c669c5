"""An engine of TensorRT on a GPU: device buffers, one stream, and events that tell how long the GPU took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from shared.errors import StageFailed
from worker.engines.batching import in_fixed_batches
from worker.feed import Feed, Floats, Inputs, padded

try:
    import pycuda.driver as cuda
except ImportError:
    cuda = None


@dataclass(frozen=True)
class Gpu:
    """The first GPU, in the context that PyTorch uses too."""

    context: Any
    name: str
    compute_capability: str

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self.context.push()
        try:
            yield
        finally:
            self.context.pop()


@lru_cache
def gpu() -> Gpu | str:
    """The first GPU, or why there is none."""
    if cuda is None:
        return "this worker is installed without support for GPUs (the extra 'gpu')"
    try:
        cuda.init()
        if cuda.Device.count() == 0:
            return "this machine has no NVIDIA GPU"
        device = cuda.Device(0)
        return Gpu(device.retain_primary_context(), device.name(), "{}.{}".format(*device.compute_capability()))
    except cuda.Error as error:
        return f"CUDA does not start: {error}"


class CudaRunner:
    """One execution context; larger batches than the engine's are run in stretches, smaller ones padded.

    `run` goes from NumPy to NumPy, as on a CPU; `device_ms` leaves the copies out. Outputs are fp32, as inputs are.
    """

    threads = 1

    def __init__(self, edition: str, precision: str, trt: Any, engine: Any, device: Gpu) -> None:
        self.engine, self.precision, self.trt, self.gpu = edition, precision, trt, device
        self.device = f"gpu: {device.name} ({device.compute_capability})"
        self.versions = {edition: trt.__version__}
        self.context = engine.create_execution_context()
        self.stream = cuda.Stream()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        (self.input,) = [name for name in names if is_input[name]]
        self.outputs = [name for name in names if not is_input[name]]
        shape = engine.get_tensor_shape(self.input)
        low, _, high = engine.get_tensor_profile_shape(self.input, 0) if -1 in tuple(shape) else (shape,) * 3
        self.min_batch, self.max_batch = low[0], high[0]
        self.buffers: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}

    def run(self, inputs: Inputs) -> Floats:
        return self.run_all(inputs)[0]

    def run_all(self, inputs: Inputs) -> list[Floats]:
        if len(inputs) <= self.max_batch:
            count = len(inputs)
            return [found[:count] for found in self._run(padded(inputs, max(count, self.min_batch)))]
        return in_fixed_batches(self._run, inputs, self.max_batch)

    def device_ms(self, inputs: Inputs) -> float:
        """Milliseconds that the GPU took for one batch, which must fit the engine, without copies."""
        assert not isinstance(inputs, Feed)
        with self.gpu.current():
            self._load(inputs)
            begin, end = cuda.Event(), cuda.Event()
            begin.record(self.stream)
            self._enqueue()
            end.record(self.stream)
            end.synchronize()
            found: float = begin.time_till(end)
            return found

    def _run(self, inputs: Inputs) -> list[Floats]:
        assert not isinstance(inputs, Feed)  # engines of several inputs are not built
        with self.gpu.current():
            shapes = self._load(inputs)
            self._enqueue()
            found = [np.empty(shape, dtype=np.float32) for shape in shapes]
            for name, output in zip(self.outputs, found, strict=True):
                cuda.memcpy_dtoh_async(output, self.buffers[name], self.stream)
            self.stream.synchronize()
        return found

    def _load(self, inputs: Floats) -> list[tuple[int, ...]]:
        """Copy the inputs to the GPU and give every tensor its address; returns the outputs' shapes."""
        inputs = np.ascontiguousarray(inputs, dtype=np.float32)
        if not self.context.set_input_shape(self.input, inputs.shape):
            raise StageFailed(
                f"The model refuses inputs of shape {list(inputs.shape)}.",
                hint="Check the data set's channels and size, and preprocessing.layout.",
                code="input_mismatch",
            )
        shapes = [tuple(self.context.get_tensor_shape(name)) for name in self.outputs]
        self._reserve(self.input, inputs.nbytes)
        for name, shape in zip(self.outputs, shapes, strict=True):
            self._reserve(name, 4 * int(np.prod(shape)))
        cuda.memcpy_htod_async(self.buffers[self.input], inputs, self.stream)
        self.stream.synchronize()  # the copy reads `inputs`, which is this call's own
        return shapes

    def _reserve(self, name: str, size: int) -> None:
        if self.sizes.get(name, 0) < size:
            self.buffers[name], self.sizes[name] = cuda.mem_alloc(size), size
        self.context.set_tensor_address(name, int(self.buffers[name]))

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.handle):
            raise StageFailed("TensorRT could not run the engine.", code="engine_failed")
