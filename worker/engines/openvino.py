"""OpenVINO on the CPU: an intermediate representation of two files, .xml and .bin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import openvino
from openvino import opset13
from openvino._offline_transformations import apply_moc_transformations

from shared.errors import StageFailed
from worker.context import Model
from worker.engines.batching import in_fixed_batches
from worker.feed import Array, Floats, Inputs, by_name

HINTS = {"fp16": "f16", "bf16": "bf16"}  # by the precision of what is not int8
Shapes = dict[str, tuple[int, ...]]  # of each input, by its name
MIN_HALVED = 512  # elements of a constant; of a smaller one the description takes more than is saved
MAX_ROUNDING = 1e-3  # RMS, over that of the constant


def build(model: Model, directory: Path) -> Path:
    """The model, ONNX or OpenVINO's own form, in OpenVINO's own form.

    Raises StageFailed (engine_failed) if the runtime refuses the model.
    """
    try:
        network = read(model.path)
    except RuntimeError as error:
        raise _refused(error) from error
    return save(network, directory / "model.xml")


def read(path: Path) -> openvino.Model:
    """Read a model. ONNX also goes through the passes that OpenVINO's own converter applies.

    Without them the symmetric int8 of some networks gives wrong results.
    """
    model = openvino.Core().read_model(path)
    if path.suffix == ".onnx":
        settle_names(model)
        before = {operation.get_friendly_name() for operation in model.get_ops()}
        apply_moc_transformations(model, cf=False, smart_reshape=True)
        for index, operation in enumerate(model.get_ordered_ops()):
            if operation.get_friendly_name() not in before:  # it may have been made up from a counter, too
                operation.set_friendly_name(f"{operation.get_type_name()}.new.{index}")
    return model


def save(model: openvino.Model, path: Path) -> Path:
    """Write .xml and .bin, float weights as fp16, under their names only once they are whole.

    OpenVINO maps the .bin of a live model into memory, so a file under a final name is never written to.
    """
    settle_names(model)
    _halve_weights(model)
    unfinished = path.with_name(f"unfinished-{path.name}")
    openvino.save_model(model, unfinished, compress_to_fp16=False)
    _compact(unfinished)
    unfinished.with_suffix(".bin").rename(path.with_suffix(".bin"))
    unfinished.rename(path)
    return path


def _halve_weights(model: openvino.Model) -> None:
    """Store float constants as fp16, which compiling turns back: half the file, the same speed, no other precision.

    Not those that, taken as a whole, would be rounded by more: too large, or so small that digits are lost.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_output_element_type(0) != openvino.Type.f32:
            continue
        values = node.get_data()
        if values.size < MIN_HALVED:
            continue
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        rounding = np.linalg.norm((halves.astype(np.float32) - values).ravel())
        if not rounding <= MAX_ROUNDING * np.linalg.norm(values.ravel()):  # infinite, or not a number
            continue
        stored = opset13.constant(halves, dtype=openvino.Type.f16)
        stored.set_friendly_name(f"{node.get_friendly_name()}.fp16")
        restored = opset13.convert(stored, "f32")
        restored.set_friendly_name(node.get_friendly_name())
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(restored.output(0))


def _compact(path: Path) -> None:
    """Take out of the .xml what its reader works out for itself, indents and the sizes of tensors: a third of it."""
    tree = ElementTree.parse(path)
    for port in tree.iter("port"):
        port[:] = []
        port.text = None
    for element in tree.iter():
        element.tail = None
        element.text = (element.text or "").strip() or None
    tree.write(path, encoding="utf-8", xml_declaration=True)


def settle_names(model: openvino.Model) -> None:
    """Replace names that OpenVINO made up from a counter of the process, so that one model gives the same bytes."""
    for index, operation in enumerate(model.get_ordered_ops()):
        if re.fullmatch(rf"{operation.get_type_name()}_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{operation.get_type_name()}.{index}")


def open(model: Model, threads: int) -> OpenVinoRunner:
    """The model, ONNX or OpenVINO's own form, compiled for latency, on `threads` threads.

    Its file must stay in place while the runner is used: what other batches need is compiled from it later.
    Raises StageFailed (engine_failed) if the runtime refuses the model.
    Layers that are not int8 run in fp32, unless the model's precision says otherwise (bf16, int8+bf16): OpenVINO's
    default on CPUs that can is bfloat16, which would make an fp32 engine one in name only, and an engine's outputs
    depend on the machine.
    """
    return OpenVinoRunner(model, threads)


def has_bf16() -> bool:
    """Whether this CPU computes in bfloat16, so that an fp32 model may be run in it."""
    found: list[str] = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in found


def files(path: Path) -> list[Path]:
    """Every file that the runtime loads."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


class OpenVinoRunner:
    """A model of a fixed batch is run as often as the batch needs, the last time padded.

    Where the batch varies, a single sample runs on a request of its own, compiled for its shape: that is 3 to 50 %
    faster than one for every batch. One of them is compiled when the model is opened, and given up if it never ran
    when the other one is needed.
    """

    engine = "openvino"

    def __init__(self, model: Model, threads: int) -> None:
        self.precision = model.precision
        self.threads = threads
        self.versions = {"openvino": openvino.__version__}
        self._path = model.path
        self._for_any: openvino.InferRequest | None = None
        self._for_one: openvino.InferRequest | None = None
        self._shapes_of_one: Shapes | None = None
        self._has_run = False

        network = self._read()
        self.input_name = network.input(0).get_any_name()
        batch = network.input(0).get_partial_shape()[0]
        self.fixed_batch = batch.get_length() if batch.is_static else None
        shapes = _shapes_of_one(network)
        if shapes is not None:
            self._for_one = self._compiled_for_one(network, shapes)
        if self._for_one is None:
            self._for_any = self._compiled(network)

    @property
    def compiled(self) -> openvino.CompiledModel:
        """What runs: of several requests, the one for a single sample."""
        request = self._for_one or self._for_any
        assert request is not None
        return request.get_compiled_model()

    def run(self, inputs: Inputs) -> Floats:
        return self.run_all(inputs)[0]

    def run_all(self, inputs: Inputs) -> list[Floats]:
        if self.fixed_batch is None or self.fixed_batch == len(inputs):
            return self._run(inputs)
        return in_fixed_batches(self._run, inputs, self.fixed_batch)

    def _run(self, inputs: Inputs) -> list[Floats]:
        arrays = by_name(inputs, self.input_name)
        request = self._request(arrays)
        try:
            outputs = request.infer(arrays, share_inputs=True)
        except (RuntimeError, ValueError) as error:
            raise StageFailed(
                f"The model refuses inputs of shape {list(inputs.shape)}: {str(error).strip().splitlines()[-1]}",
                hint="Check the data set's channels and size, and preprocessing.layout.",
                code="input_mismatch",
            ) from error
        self._has_run = True
        return list(outputs.values())  # they are copies

    def _request(self, arrays: Mapping[str, Array]) -> openvino.InferRequest:
        """The request for inputs of such shapes; one shape of a single sample has its own, all else shares one."""
        shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        if self.fixed_batch is None and all(shape[:1] == (1,) for shape in shapes.values()):
            if self._for_one is None and shapes != self._shapes_of_one:
                self._for_one = self._compiled_for_one(self._read(), shapes)
                if self._for_one is not None and not self._has_run:
                    self._for_any = None
            if self._for_one is not None and shapes == self._shapes_of_one:
                return self._for_one
        if self._for_any is None:
            if not self._has_run:
                self._for_one = self._shapes_of_one = None
            self._for_any = self._compiled(self._read())
        return self._for_any

    def _compiled_for_one(self, network: openvino.Model, shapes: Shapes) -> openvino.InferRequest | None:
        """Compiled for inputs of these shapes; None where the network does not take them."""
        self._shapes_of_one = shapes
        fixed = network.clone()
        try:
            fixed.reshape({name: list(shape) for name, shape in shapes.items()})
        except RuntimeError:
            return None
        return self._compiled(fixed)

    def _read(self) -> openvino.Model:
        try:
            return read(self._path)
        except RuntimeError as error:
            raise _refused(error) from error

    def _compiled(self, network: openvino.Model) -> openvino.InferRequest:
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "ENABLE_CPU_PINNING": False,  # a thread that is bound to a core waits for whatever else runs on it
            "INFERENCE_PRECISION_HINT": HINTS.get(self.precision.split("+")[-1], "f32"),
        }
        try:
            return openvino.Core().compile_model(network, "CPU", config).create_infer_request()
        except RuntimeError as error:
            raise _refused(error) from error


def _shapes_of_one(network: openvino.Model) -> Shapes | None:
    """The shapes (1, ...) of one sample's inputs; None if any axis but the first is dynamic, or the batch is fixed."""
    shapes: Shapes = {}
    for port in network.inputs:
        shape = port.get_partial_shape()
        if shape.rank.is_dynamic or len(shape) == 0 or any(axis.is_dynamic for axis in list(shape)[1:]):
            return None
        shapes[port.get_any_name()] = (1, *(axis.get_length() for axis in list(shape)[1:]))
    return shapes if network.input(0).get_partial_shape()[0].is_dynamic else None


def _refused(error: RuntimeError) -> StageFailed:
    return StageFailed(f"OpenVINO refuses the model: {error}", code="engine_failed")
