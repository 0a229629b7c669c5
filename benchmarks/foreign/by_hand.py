"""What a good engineer makes of an ONNX file in twenty lines, written directly against the libraries."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
import onnxruntime
import openvino
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

Floats = npt.NDArray[np.float32]
THREADS = 1


@dataclass(frozen=True)
class Engine:
    """A loaded engine: the files that its runtime loads, and how it runs one batch."""

    name: str
    files: tuple[Path, ...]
    run: Callable[[Floats], list[Floats]]

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True)
class Failure:
    """An engine that could not be made, with the library's own words."""

    name: str
    reason: str


SOURCE = "onnxruntime fp32"  # what all are compared with: the file as it came
NAMES = (SOURCE, "onnxruntime int8", "openvino f32", "openvino bf16", "openvino int8")


def make_all(model: Path, calibration: Sequence[Floats], directory: Path) -> list[Engine | Failure]:
    """Every engine of the model, the source's own first. Files that were made before are used again."""
    directory.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Engine]] = {
        SOURCE: lambda: open_onnxruntime(SOURCE, model),
        "onnxruntime int8": lambda: onnxruntime_int8(model, calibration, directory),
        "openvino f32": lambda: openvino_float(model, directory, "f32"),
        "openvino bf16": lambda: openvino_float(model, directory, "bf16"),
        "openvino int8": lambda: openvino_int8(model, calibration, directory),
    }
    made: list[Engine | Failure] = []
    for name, make in makers.items():
        try:
            with quiet():
                made.append(make())
        except Exception as error:
            made.append(Failure(name, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"))
    return made


# ---------------------------------------------------------------- ONNX Runtime


def open_onnxruntime(name: str, path: Path) -> Engine:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = THREADS
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0].name
    return Engine(name, (path,), lambda images: session.run(None, {entry: images}))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration batches in the form that ONNX Runtime asks for."""

    def __init__(self, name: str, batches: Sequence[Floats]) -> None:
        self.feeds = iter([{name: batch} for batch in batches])

    def get_next(self) -> dict[str, Floats] | None:
        return next(self.feeds, None)


def onnxruntime_int8(model: Path, calibration: Sequence[Floats], directory: Path) -> Engine:
    """Static QDQ, u8 activations and s8 weights a channel; opsets below 13 have no scales a channel and are raised."""
    path = directory / "onnxruntime-int8.onnx"
    if not path.exists():
        prepared = directory / "prepared.onnx"
        graph = onnx.load(model)
        if max(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")) < 13:
            graph = onnx.version_converter.convert_version(graph, 17)
        onnx.save(graph, prepared)
        quant_pre_process(prepared, prepared, skip_symbolic_shape=True)
        inputs = onnx.load(prepared, load_external_data=False).graph.input
        partial = directory / "partial.onnx"
        quantize_static(
            prepared,
            partial,
            Reader(inputs[0].name, calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        partial.rename(path)
    return open_onnxruntime("onnxruntime int8", path)


# ---------------------------------------------------------------- OpenVINO


def open_openvino(name: str, path: Path, precision: str | None) -> Engine:
    """Compiled for latency; without a precision, the runtime's default: bf16 where the CPU has it."""
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS}
    if precision is not None:
        config["INFERENCE_PRECISION_HINT"] = precision
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()

    def run(images: Floats) -> list[Floats]:
        return list(request.infer([images], share_inputs=True).values())

    return Engine(name, (path, path.with_suffix(".bin")), run)


def openvino_float(model: Path, directory: Path, precision: str) -> Engine:
    """The model as OpenVINO converts and stores it by default."""
    path = directory / "openvino.xml"
    if not path.exists():
        _save(openvino.convert_model(model), path)
    return open_openvino(f"openvino {precision}", path, precision)


def openvino_int8(model: Path, calibration: Sequence[Floats], directory: Path) -> Engine:
    """NNCF's post-training quantization with its defaults; what stays in float runs in OpenVINO's default."""
    path = directory / "openvino-int8.xml"
    if not path.exists():
        _save(nncf.quantize(openvino.convert_model(model), nncf.Dataset([[batch] for batch in calibration])), path)
    return open_openvino("openvino int8", path, None)


def _save(model: openvino.Model, path: Path) -> None:
    partial = path.with_name(f"partial-{path.name}")
    openvino.save_model(model, partial)
    shutil.move(partial.with_suffix(".bin"), path.with_suffix(".bin"))
    partial.rename(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and warnings."""
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
