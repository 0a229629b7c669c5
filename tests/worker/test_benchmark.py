"""The stop-watch counts what it says it counts, and says how sure it is of a ratio."""

from __future__ import annotations

import fcntl
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision.models

from shared.errors import StageFailed
from shared.recipe import Benchmark, ModelFormat
from tests.worker.workbench import UNET, Workbench, small_onnx
from worker import engines, footprint, timing_lock
from worker.benchmark import (
    MAX_RUNS,
    MIN_RUNS,
    SECONDS_PER_RUNNER,
    SLOW_MIN_RUNS,
    Timed,
    complexity_of,
    first,
    latency_of,
    ratio,
    same_speed,
    size_bytes,
    throughput,
    time_in_turns,
)
from worker.complexity import module_macs, module_parameters, onnx_macs, onnx_parameters
from worker.context import Model, StageResult
from worker.data import Floats, Samples

INPUTS = np.zeros((1, 1), dtype=np.float32)
ADAPTIVE = Benchmark(warm_up=2)


@pytest.fixture(autouse=True)
def lock_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock that no other test waits for."""
    path = tmp_path / "timing.lock"
    monkeypatch.setenv(timing_lock.VARIABLE, str(path))
    return path


class Clock:
    """Time that passes only while a runner runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A runner whose n-th run takes `seconds(n)`."""

    engine, precision, threads = "fake", "fp32", 1

    def __init__(self, clock: Clock, seconds: Callable[[int], float], on_run: Callable[[], object] = int) -> None:
        self.clock, self.seconds, self.on_run = clock, seconds, on_run
        self.versions: dict[str, str] = {}
        self.runs = itertools.count()
        self.batches: list[int] = []

    def run(self, inputs: Floats) -> Floats:
        self.on_run()
        self.clock.now += self.seconds(next(self.runs))
        self.batches.append(len(inputs))
        return inputs

    def run_all(self, inputs: Floats) -> list[Floats]:
        return [self.run(inputs)]


def steady(seconds: float) -> Callable[[int], float]:
    return lambda run: seconds


def noisy(seconds: float, spread: float, seed: int = 0) -> Callable[[int], float]:
    factors = np.exp(np.random.default_rng(seed).normal(0, spread, 100_000))
    return lambda run: seconds * float(factors[run])


def blocks(times: Sequence[float], size: int = 4) -> Timed:
    return Timed([list(times[start : start + size]) for start in range(0, len(times), size)])


# ---------------------------------------------------------------- how many runs


def test_runners_take_turns_in_blocks_and_have_as_many_runs_as_the_recipe_says() -> None:
    clock, log = Clock(), list[str]()
    runners = [Fake(clock, steady(0.01), lambda name=name: log.append(name)) for name in "ab"]  # type: ignore[misc]
    timed = time_in_turns(runners, INPUTS, Benchmark(warm_up=2, runs=10), clock=clock)
    assert [[len(block) for block in one.blocks] for one in timed] == [[4, 4, 2]] * 2
    assert [one.warm_up for one in timed] == [7, 7]
    assert "".join(log) == "a" * 7 + "b" * 7 + 2 * ("a" * 5 + "b" * 5) + "a" * 3 + "b" * 3
    assert timed[0].times_ms == pytest.approx([10.0] * 10)


def test_twenty_runs_do_where_the_ratio_is_certain() -> None:
    clock = Clock()
    timed = time_in_turns([Fake(clock, steady(0.02)), Fake(clock, steady(0.01))], INPUTS, ADAPTIVE, clock=clock)
    assert [len(one.times_ms) for one in timed] == [MIN_RUNS, MIN_RUNS]


def test_runs_go_on_until_the_interval_is_narrow() -> None:
    clock = Clock()
    runners = [Fake(clock, noisy(0.02, 0.02, seed=1)), Fake(clock, noisy(0.01, 0.02, seed=2))]
    timed = time_in_turns(runners, INPUTS, ADAPTIVE, clock=clock)
    compared = ratio(*timed)
    assert MIN_RUNS < len(timed[0].times_ms) < MAX_RUNS
    assert compared.high - compared.low < 0.02 * compared.value
    before = ratio(*(Timed(one.blocks[:-1]) for one in timed))
    assert before.high - before.low >= 0.02 * before.value


def test_one_uncertain_runner_of_several_keeps_all_running_up_to_the_limit() -> None:
    clock = Clock()
    runners = [Fake(clock, steady(0.02)), Fake(clock, steady(0.01)), Fake(clock, noisy(0.01, 0.5))]
    timed = time_in_turns(runners, INPUTS, ADAPTIVE, clock=clock)
    assert [len(one.times_ms) for one in timed] == [MAX_RUNS] * 3


@pytest.mark.parametrize(("spread", "runs"), [(0.0, MIN_RUNS), (0.5, MAX_RUNS)])
def test_of_one_runner_alone_its_median_is_to_be_certain(spread: float, runs: int) -> None:
    clock = Clock()
    [timed] = time_in_turns([Fake(clock, noisy(0.01, spread))], INPUTS, ADAPTIVE, clock=clock)
    assert len(timed.times_ms) == runs


def test_nothing_counts_until_the_latency_is_steady() -> None:
    clock = Clock()
    slow_start = Fake(clock, lambda run: max(0.01, 0.1 * 0.9**run))  # 10 ms from the 22nd run on
    [timed] = time_in_turns([slow_start], INPUTS, ADAPTIVE, clock=clock)
    assert timed.warm_up > 22
    assert max(timed.times_ms) == pytest.approx(10)


def test_a_latency_that_never_gets_steady_is_timed_all_the_same() -> None:
    clock = Clock()
    [timed] = time_in_turns([Fake(clock, lambda run: 0.001 * 1.02**run)], INPUTS, ADAPTIVE, clock=clock)
    assert timed.warm_up <= 2 + 100
    assert len(timed.times_ms) == MAX_RUNS


def test_of_a_fast_model_more_runs_make_a_block_so_that_no_block_is_a_moment() -> None:
    """Runs of .1 ms after runs of 100 ms of another model: four of them would be timed on its caches and clock."""
    clock = Clock()
    fast, middling, slow = time_in_turns(
        [Fake(clock, steady(seconds)) for seconds in (0.0001, 0.001, 0.1)], INPUTS, ADAPTIVE, max_runs=20, clock=clock
    )
    assert [len(block) for block in fast.blocks] == [48] * 5
    assert [len(block) for block in middling.blocks] == [12] * 5
    assert [len(block) for block in slow.blocks] == [4] * 5
    assert ratio(slow, fast).value == pytest.approx(1000)


def test_runs_stop_at_the_caller_s_limit() -> None:
    clock = Clock()
    timed = time_in_turns(
        [Fake(clock, noisy(0.01, 0.5, seed=seed)) for seed in range(2)], INPUTS, ADAPTIVE, max_runs=24, clock=clock
    )
    assert [len(one.times_ms) for one in timed] == [24, 24]


def test_a_very_slow_model_is_run_less_often_and_for_a_bounded_time() -> None:
    clock = Clock()
    runners = [Fake(clock, noisy(5, 0.5, seed=1)), Fake(clock, noisy(5, 0.5, seed=2))]
    timed = time_in_turns(runners, INPUTS, Benchmark(warm_up=1), clock=clock)
    num_runs = len(timed[0].times_ms)
    assert SLOW_MIN_RUNS <= num_runs < MIN_RUNS
    assert sum(map(sum, (one.times_ms for one in timed))) < 1000 * SECONDS_PER_RUNNER * 2


def test_a_slow_and_certain_model_has_its_few_runs() -> None:
    clock = Clock()
    [timed] = time_in_turns([Fake(clock, steady(20))], INPUTS, Benchmark(warm_up=1), clock=clock)
    assert len(timed.times_ms) == SLOW_MIN_RUNS


def test_the_machine_is_locked_while_it_is_timed_and_free_afterwards(lock_path: Path) -> None:
    clock, states = Clock(), list[bool]()

    def is_locked() -> bool:
        file_descriptor = os.open(lock_path, os.O_RDONLY)
        try:
            fcntl.flock(file_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file_descriptor)
        return False

    time_in_turns([Fake(clock, steady(0.01), lambda: states.append(is_locked()))], INPUTS, ADAPTIVE, clock=clock)
    assert states
    assert all(states)
    assert not is_locked()


def test_progress_is_reported_between_blocks() -> None:
    clock, messages = Clock(), list[str]()
    time_in_turns([Fake(clock, steady(0.01))], INPUTS, Benchmark(runs=10), on_wait=messages.append, clock=clock)
    assert messages == ["timing: 4 of at most 10 runs", "timing: 8 of at most 10 runs"]


# ---------------------------------------------------------------- throughput


def numbers(count: int) -> Samples:
    return Samples("evaluation", count, lambda index: np.full((1, 2, 2), index, dtype=np.float32), None)


def test_throughput_is_of_every_batch_size_and_takes_fewer_runs() -> None:
    clock = Clock()
    runner = Fake(clock, steady(0.01))
    assert throughput(runner, numbers(3), Benchmark(batches=[1, 8]), clock=clock) == pytest.approx({1: 100, 8: 800})
    assert set(runner.batches) == {1, 8}
    assert runner.batches.count(8) < MIN_RUNS


def test_throughput_of_the_batch_that_was_timed_already_is_not_timed_again() -> None:
    clock = Clock()
    runner = Fake(clock, steady(0.01))
    found = throughput(runner, numbers(3), Benchmark(batches=[2, 8]), timed=Timed([[4.0, 5.0, 6.0]]), clock=clock)
    assert found == pytest.approx({2: 400, 8: 800})
    assert set(runner.batches) == {8}


def test_the_timed_batch_is_filled_with_real_samples() -> None:
    batch = first(numbers(3), 7)
    assert isinstance(batch, np.ndarray)
    assert batch[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]


# ---------------------------------------------------------------- comparing


def test_a_ratio_is_of_medians_and_its_interval_holds_it() -> None:
    compared = ratio(blocks([20.0, 20.2, 20.4, 90.0] * 5), blocks([10.0, 10.1, 10.2, 10.3] * 5))
    assert compared.value == pytest.approx(20.3 / 10.15)
    assert compared.low <= compared.value <= compared.high


def test_the_same_times_give_the_same_interval() -> None:
    rng = np.random.default_rng(0)
    a, b = (blocks(rng.normal(10, 1, 40).tolist()) for _ in range(2))
    assert ratio(a, b) == ratio(a, b)


def test_load_that_falls_on_both_in_their_turns_does_not_widen_the_interval() -> None:
    load = np.repeat(np.random.default_rng(0).uniform(1, 2, 10), 4)  # of each turn
    busy = ratio(blocks((20 * load).tolist()), blocks((10 * load).tolist()))
    assert (busy.low, busy.value, busy.high) == pytest.approx((2, 2, 2))


def test_the_interval_holds_the_true_ratio_nineteen_times_of_twenty() -> None:
    """Also where runs of one block are disturbed together, and only some blocks are."""
    rng = np.random.default_rng(0)

    def timed(latency: float) -> Timed:
        disturbed = 1 + 0.05 * (rng.random((10, 1)) < 0.3)
        return Timed((latency * disturbed * np.exp(rng.normal(0, 0.02, (10, 4)))).tolist())

    intervals = [ratio(timed(20.0), timed(10.0)) for _ in range(400)]
    covered = np.mean([one.low <= 2 <= one.high for one in intervals])
    assert 0.93 <= covered <= 0.99


@pytest.mark.parametrize(("before", "after"), [(8, 12), (4, 4)])
def test_what_was_not_timed_in_turns_of_several_blocks_is_not_compared(before: int, after: int) -> None:
    with pytest.raises(ValueError, match="only what was timed in turns"):
        ratio(blocks([1.0] * before), blocks([1.0] * after))


@pytest.mark.parametrize(
    ("a", "b", "is_tie"),
    [
        ([10.0] * 20, [10.1] * 20, True),  # certain, and smaller than what one engine differs by from itself
        ([10.0] * 20, [11.0] * 20, False),
        ([10.0, 10.1] * 10, [10.24, 10.26] * 10, True),  # its interval lies above 1, and reaches into the noise
        ([10.0, 14.0, 9.0, 13.0] * 5, [10.5, 12.0, 11.0, 13.0] * 5, True),  # the interval holds 1
    ],
)
def test_a_difference_within_the_noise_is_a_tie(a: list[float], b: list[float], is_tie: bool) -> None:
    assert same_speed(blocks(a, 1), blocks(b, 1)) is is_tie
    assert same_speed(blocks(b, 1), blocks(a, 1)) is is_tie


def test_percentiles_are_those_of_the_runs_and_the_99th_needs_five_hundred() -> None:
    few = latency_of(blocks([float(value) for value in range(101)]))
    assert (few.p50, few.p90, few.p99) == (50, 90, None)
    many = latency_of(blocks([float(value % 101) for value in range(505)]))
    assert (many.p50, many.p90, many.p99) == (50, 90, 99)
    assert latency_of(blocks([1.0] * 499)).p99 is None
    assert latency_of(blocks([1.0] * 500)).p99 == 1


# ---------------------------------------------------------------- size


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
    source = complexity_of(bench.source, samples)
    assert before.macs == after.macs == source.macs
    assert before.parameters == pytest.approx(after.parameters, rel=0.02)
    assert before.parameters == pytest.approx(source.parameters, rel=0.02)


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
