"""The ranges of a network's tensors over the calibration samples, in memory that does not grow with their number.

One batch is run after another. Smallest and largest values are reduced within the graph. A histogram (entropy,
percentile) is laid out over those ranges before the first value is counted, so that it has a fixed number of bins: one
that grows with each new extreme takes as much memory as the largest outlier asks.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import (
    CalibraterBase,
    HistogramCalibrater,
    HistogramCollector,
    TensorsData,
    create_calibrator,
    save_tensors_data,
)

from shared.errors import CalibrationMissing
from shared.recipe import Quantize
from worker.cleanup import quiet
from worker.context import StageContext
from worker.data import Samples
from worker.feed import Array, by_name
from worker.vetting import input_shape

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
NUM_BINS = {"entropy": 512, "percentile": 4096}  # the time that entropy takes grows with their square
PERCENTILE = 99.999


@dataclass(frozen=True)
class Calibration:
    """The calibration samples that the seed draws, read one batch at a time."""

    samples: Samples
    positions: Sequence[int]
    batch: int
    input_name: str

    def __len__(self) -> int:
        return math.ceil(len(self.positions) / self.batch)

    def read(self, index: int) -> dict[str, Array]:
        """Batch `index`; the last one begins again with the first samples where it would be too short."""
        count = len(self.positions)
        wanted = [self.positions[(index * self.batch + offset) % count] for offset in range(self.batch)]
        return by_name(self.samples.feed(wanted), self.input_name)


def draw(stage: Quantize, model: onnx.ModelProto, ctx: StageContext) -> Calibration:
    """Raises CalibrationMissing if the data set's calibration part is empty."""
    samples = ctx.samples("calibration")
    if len(samples) == 0:
        raise CalibrationMissing
    positions = samples.draw(stage.calibration_samples, ctx.seed)
    return Calibration(samples, positions, input_shape(model)[0] or 1, model.graph.input[0].name)


def measure_ranges(
    network: Path, calibration: Calibration, method: str, on_progress: Callable[[float], None], path: Path
) -> None:
    """Write down each tensor's range, for ONNX Runtime's quantizer. `on_progress` is called with 0..1."""
    with tempfile.TemporaryDirectory(prefix="burnish-ranges-") as directory, quiet():
        augmented = str(Path(directory) / "augmented.onnx")
        rounds = 1 if method == "minmax" else 2
        extremes = create_calibrator(network, augmented_model_path=augmented)
        ranges = _collect(extremes, _Reader(calibration, lambda share: on_progress(share / rounds)))
        if rounds == 2:
            settings = {"num_bins": NUM_BINS[method], "percentile": PERCENTILE, "symmetric": False}
            counting = create_calibrator(
                network,
                augmented_model_path=augmented,
                calibrate_method=METHODS[method],
                extra_options=settings,
            )
            _lay_out(counting, ranges)
            ranges = _collect(counting, _Reader(calibration, lambda share: on_progress(0.5 + share / 2)))
        save_tensors_data(ranges, path)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """ONNX Runtime's view of the calibration samples: it asks for one batch after the other."""

    def __init__(self, calibration: Calibration, on_progress: Callable[[float], None]) -> None:
        self.calibration, self.on_progress = calibration, on_progress
        self.next = self.end = 0

    def __len__(self) -> int:
        return len(self.calibration)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.next, self.end = start_index, end_index

    def get_next(self) -> dict[str, Array] | None:
        if self.next >= self.end:
            return None
        self.on_progress(self.next / len(self))
        self.next += 1
        return self.calibration.read(self.next - 1)


def _collect(calibrator: CalibraterBase, reader: _Reader) -> TensorsData:
    """What each batch adds is reduced before the next is run."""
    for index in range(len(reader)):
        reader.set_range(index, index + 1)
        calibrator.collect_data(reader)
    return calibrator.compute_data()


def _lay_out(calibrator: HistogramCalibrater, ranges: TensorsData) -> None:
    """Empty histograms from -t to t, t the tensor's largest magnitude: no value is outside, so none ever grows."""
    calibrator.collector = HistogramCollector(
        calibrator.method, False, calibrator.num_bins, calibrator.num_quantized_bins, calibrator.percentile, "same"
    )
    for name, found in ranges.items():
        low, high = (_scalar(value) for value in found.range_value)
        edge = np.maximum(np.abs(low), np.abs(high))
        edges = np.linspace(-edge, edge, calibrator.num_bins + 1, dtype=np.float32)
        empty = np.zeros(calibrator.num_bins, dtype=np.int64)
        calibrator.collector.histogram_dict[name] = (empty, edges, low, high, edge)


def _scalar(value: npt.ArrayLike) -> np.float32:
    return np.float32(np.asarray(value).reshape(-1)[0])
