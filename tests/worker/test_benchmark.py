"""The stop-watch counts what it says it counts, and every model is measured the same way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision.models

from shared.errors import StageFailed
from shared.recipe import Benchmark, ModelFormat
from tests.worker.workbench import UNET, Workbench, small_onnx
from worker import engines, footprint
from worker.benchmark import complexity_of, first, measure, num_runs, percentiles, side_by_side, size_bytes
from worker.complexity import module_macs, module_parameters, onnx_macs, onnx_parameters
from worker.context import Model, StageResult
from worker.data import Floats


class Counting:
    """A runner that notes its name at every run."""

    engine, precision, threads = "counting", "fp32", 1

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.versions: dict[str, str] = {}

    def run(self, inputs: Floats) -> Floats:
        self.log.append(self.name)
        return inputs


def test_the_baseline_is_measured_whole(bench: Workbench) -> None:
    found = bench.baseline
    assert found.size_bytes == bench.source.path.stat().st_size
    assert found.latency_ms.p50 <= found.latency_ms.p90 <= found.latency_ms.p99
    assert set(found.throughput_per_second) == {1, 4}
    assert found.throughput_per_second[1] == pytest.approx(1000 / found.latency_ms.p50)
    assert found.metrics["dice"] > 0.8
    assert set(found.class_metrics) == set(bench.recipe.task.classes)
    assert found.method.model_dump(exclude={"device", "versions"}) == {
        "engine": "torch eager", "precision": "fp32", "threads": 1, "batch": 1, "warm_up": 5, "runs": 20, "samples": 20,
    }  # fmt: skip
    assert found.method.device.startswith("cpu: ")
    assert found.method.versions == {"torch": torch.__version__}


def test_runners_take_turns_in_blocks(bench: Workbench) -> None:
    log: list[str] = []
    runners = [Counting("a", log), Counting("b", log)]
    times = side_by_side(runners, np.zeros((1, 1), dtype=np.float32), Benchmark(warm_up=2, runs=15))
    assert [len(found) for found in times] == [15, 15]
    assert "".join(log) == "aa" + "bb" + "a" * 11 + "b" * 11 + "a" * 6 + "b" * 6


def test_larger_batches_are_run_less_often() -> None:
    settings = Benchmark(runs=200, batches=[1, 8, 64])
    assert [num_runs(settings, batch) for batch in (1, 8, 64)] == [200, 25, 10]


def test_the_timed_batch_is_filled_with_real_samples(bench: Workbench) -> None:
    samples = bench.samples("evaluation")
    batch = first(samples, 50)
    assert len(batch) == 50
    np.testing.assert_array_equal(batch[:20], samples.inputs(0, 20))
    np.testing.assert_array_equal(batch[20:40], samples.inputs(0, 20))


def test_percentiles_are_those_of_the_runs() -> None:
    found = percentiles([float(value) for value in range(101)])
    assert (found.p50, found.p90, found.p99) == (50, 90, 99)


def test_times_that_were_taken_side_by_side_are_those_of_the_report(bench: Workbench, exported: Model) -> None:
    runner = engines.load("onnxruntime").open(exported, 1)
    found = measure(exported, runner, bench.samples("evaluation"), bench.recipe, times_ms=[2.0, 4.0, 6.0])
    assert found.latency_ms.p50 == 4
    assert found.throughput_per_second[1] == 250


def test_an_engine_weighs_what_its_runtime_loads(quantized: StageResult) -> None:
    own = quantized.model.candidates("openvino")[0]
    xml = own.path
    assert size_bytes(own, "openvino") == xml.stat().st_size + xml.with_suffix(".bin").stat().st_size
    assert size_bytes(quantized.model, "onnxruntime") == quantized.model.path.stat().st_size


# ---------------------------------------------------------------- counting


def test_macs_are_those_of_the_textbook(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx", channels=3, classes=5)
    assert onnx_macs(tmp_path / "net.onnx", (3, 32, 32)) == 5 * 32 * 32 * 3 * 3 * 3
    assert onnx_parameters(tmp_path / "net.onnx") == 5 * 3 * 3 * 3 == np.prod(model.graph.initializer[0].dims)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_network_and_its_onnx_count_the_same(name: str, tmp_path: Path) -> None:
    module = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    macs, parameters = module_macs(module, (3, 64, 64)), module_parameters(module)
    export(module, tmp_path / "net.onnx")
    assert onnx_macs(tmp_path / "net.onnx", (3, 64, 64)) == macs
    assert onnx_parameters(tmp_path / "net.onnx") == pytest.approx(parameters, rel=0.02)  # BatchNorm is folded


def export(module: torch.nn.Module, path: Path) -> None:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        example = (torch.zeros(2, 3, 64, 64),)
        torch.onnx.export(module, example, path, dynamic_shapes=shapes, external_data=False, verbose=False)


def test_quantizing_leaves_macs_and_parameters(bench: Workbench, exported: Model, quantized: StageResult) -> None:
    samples = bench.samples("evaluation")
    before, after = complexity_of(exported, samples), complexity_of(quantized.model, samples)
    assert before.macs == after.macs == bench.baseline.macs
    assert before.parameters == pytest.approx(after.parameters, rel=0.02)
    assert before.parameters == pytest.approx(bench.baseline.parameters, rel=0.02)


def test_a_fixed_batch_counts_one_sample(tmp_path: Path) -> None:
    small_onnx(tmp_path / "one.onnx", batch=1)
    small_onnx(tmp_path / "four.onnx", batch=4)
    assert onnx_macs(tmp_path / "one.onnx", (1, 32, 32)) == onnx_macs(tmp_path / "four.onnx", (1, 32, 32))


def test_macs_that_cannot_be_told_are_none(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.node[0].input[0] = "reshaped"
    shape = onnx.helper.make_node("NonZero", ["input"], ["places"])  # its shape depends on the values
    model.graph.node.insert(0, onnx.helper.make_node("Reshape", ["input", "places"], ["reshaped"]))
    model.graph.node.insert(0, shape)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    assert onnx_macs(tmp_path / "net.onnx", (1, 32, 32)) is None


# ---------------------------------------------------------------- memory


def test_memory_grows_with_the_batch_and_is_measured_in_a_fresh_process(exported: Model) -> None:
    batches = [np.zeros((count, 1, 32, 32), dtype=np.float32) for count in (1, 256)]
    small, large = (footprint.added_bytes(exported, "onnxruntime", 1, batch) for batch in batches)
    assert small is not None
    assert large is not None
    assert 2**20 < small < large
    assert large - small > 256 * 8 * 32 * 32 * 4  # at least one layer's activations


def test_the_baseline_tells_its_memory(bench: Workbench) -> None:
    assert bench.baseline.peak_memory_bytes is not None
    assert bench.baseline.peak_memory_bytes > bench.source.path.stat().st_size


def test_a_model_that_cannot_run_has_no_memory_figure(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no model")
    model = Model(ModelFormat.ONNX, tmp_path / "net.onnx")
    assert footprint.added_bytes(model, "onnxruntime", 1, np.zeros((1, 1, 8, 8), dtype=np.float32)) is None


def test_the_fresh_process_of_an_engine_needs_no_pytorch() -> None:
    runtimes = "worker.engines.onnxruntime, worker.engines.openvino"
    barred = f"import sys; sys.modules['torch'] = None; import worker.footprint, {runtimes}"
    subprocess.run([sys.executable, "-c", barred], check=True)


def test_an_eager_model_that_refuses_its_input_says_so(bench: Workbench) -> None:
    runner = engines.load("torch eager").open(Model(ModelFormat.TORCH, bench.source.path, UNET), 1)
    with pytest.raises(StageFailed, match=r"\[1, 3, 32, 32\]"):
        runner.run(np.zeros((1, 3, 32, 32), dtype=np.float32))
