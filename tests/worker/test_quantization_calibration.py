"""Calibration finds the ranges of every tensor, in memory that its samples do not fill."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization.calibrate import load_tensors_data

from tests.worker import nets
from worker.cleanup import clean
from worker.data import Samples
from worker.feed import Floats
from worker.quantization.calibration import NUM_BINS, Calibration, measure_ranges

MIB = 2**20


def calibration(count: int, batch: int = 1, outlier: float = 1.0) -> Calibration:
    """Noise that the last sample is `outlier` times as large as."""
    noise = np.random.default_rng(0).normal(size=(16, 1, nets.SIZE, nets.SIZE)).astype(np.float32)

    def read(index: int) -> Floats:
        scale = np.float32(outlier if index == count - 1 else 1)
        found: Floats = noise[index % 16] * scale
        return found

    return Calibration(Samples("calibration", count, read, None), range(count), batch, "input")


def ranges(directory: Path, method: str, found: Calibration) -> Any:
    """The measured ranges by tensor."""
    clean(nets.chain(directory / "net.onnx", width=4).path, directory / "clean.onnx")
    measure_ranges(directory / "clean.onnx", found, method, lambda share: None, directory / "ranges.json")
    return load_tensors_data(directory / "ranges.json").data


def test_minmax_ranges_are_the_extremes_of_all_samples(tmp_path: Path) -> None:
    samples = calibration(8, outlier=3.0)
    found = ranges(tmp_path, "minmax", samples)["input"]
    every = np.concatenate([samples.read(index)["input"] for index in range(8)])
    assert [float(np.ravel(value)[0]) for value in found.range_value] == [every.min(), every.max()]


def test_percentiles_cut_an_outlier_off(tmp_path: Path) -> None:
    samples = calibration(64)
    spike = np.full((1, nets.SIZE, nets.SIZE), 0, dtype=np.float32)
    spike[0, 0, 0] = 100.0
    read = samples.samples.read_input
    spiked = Samples("calibration", 4096, lambda index: spike if index == 0 else read(index), None)
    wide, narrow = (
        ranges(tmp_path, method, Calibration(spiked, range(0, 4096, 8), 1, "input"))["input"].range_value
        for method in ("minmax", "percentile")
    )
    assert float(np.ravel(wide[1])[0]) == 100
    assert float(np.ravel(narrow[1])[0]) < 10


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_a_histogram_has_the_same_bins_whatever_comes(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.quantization import calibration as module

    kept = []

    class Watched(module.HistogramCollector):  # type: ignore[misc]
        def compute_collection_result(self) -> Any:
            kept.extend(len(found[0]) for found in self.histogram_dict.values())
            return super().compute_collection_result()

    monkeypatch.setattr(module, "HistogramCollector", Watched)
    ranges(tmp_path, method, calibration(6, outlier=1000))
    assert set(kept) == {NUM_BINS[method]}


def test_every_sample_is_counted_once_a_pass(tmp_path: Path) -> None:
    asked: list[int] = []
    quiet = calibration(5).samples

    def read(index: int) -> Floats:
        asked.append(index)
        return quiet.read_input(index)

    watched = Samples("calibration", 5, read, None)
    ranges(tmp_path, "minmax", Calibration(watched, range(5), 1, "input"))
    assert sorted(asked) == [0, 1, 2, 3, 4]
    ranges(tmp_path, "percentile", Calibration(watched, range(5), 1, "input"))
    assert len(asked) == 15


def test_a_last_batch_that_is_too_short_begins_again(tmp_path: Path) -> None:
    found = calibration(5, batch=2)
    assert len(found) == 3
    last = found.read(2)["input"]
    np.testing.assert_array_equal(last, found.samples.take([4, 0]))


def test_progress_is_told_from_none_to_nearly_all(tmp_path: Path) -> None:
    clean(nets.chain(tmp_path / "net.onnx", width=4).path, tmp_path / "clean.onnx")
    told: list[float] = []
    measure_ranges(tmp_path / "clean.onnx", calibration(4), "entropy", told.append, tmp_path / "ranges.json")
    assert told == sorted(told)
    assert told[0] == 0
    assert 0.5 <= told[4] < told[-1] < 1


PEAK = """
import sys
from pathlib import Path
import numpy as np
from worker.quantization.calibration import Calibration, measure_ranges
from worker.data import Samples
from worker.quantization.openvino import QuantizedNetwork

network, count, method = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
image = np.random.default_rng(0).normal(size=(1, 32, 32)).astype(np.float32)
samples = Samples("calibration", count, lambda index: image * np.float32(1 + index / count), None)
calibration = Calibration(samples, range(count), 1, "input")
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
if method == "openvino":
    QuantizedNetwork(network, calibration, "minmax", on_progress=lambda share: None)
else:
    measure_ranges(network, calibration, method, lambda share: None, network.with_suffix(".json"))
print(peak() - before)
"""


@pytest.mark.parametrize("method", ["percentile", "openvino"])
def test_five_thousand_samples_take_no_more_memory_than_a_hundred(tmp_path: Path, method: str) -> None:
    clean(nets.chain(tmp_path / "net.onnx", width=4).path, tmp_path / "clean.onnx")
    added = [
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(tmp_path / "clean.onnx"), str(count), method],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            ).stdout.split()[-1]
        )
        for count in (100, 5000)
    ]
    assert added[1] < added[0] + 16 * MIB  # all activations of 5,000 samples would be 1,500
