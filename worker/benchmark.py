"""How large and how fast a model is: the only stop-watch, the same for the source model and for every engine.

Latency is the wall time of `run` on one batch of real samples, from NumPy array to NumPy array, after a warm-up, with
a fixed number of threads. What is compared is timed in turns, in blocks of a few runs, so that a change in the
machine's load falls on all. Runs of one block share that load and are not independent, so intervals come from
resampling whole blocks. While something is timed, no other process of this machine times (worker.timing_lock).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from shared.recipe import Benchmark, ModelFormat
from shared.report import Latency, Ratio
from worker import engines, timing_lock
from worker.complexity import module_macs, module_parameters, onnx_macs, onnx_parameters
from worker.context import Model
from worker.data import Samples
from worker.engines import Runner
from worker.feed import Inputs
from worker.loading import load_module
from worker.timing_lock import OnWait

MIN_RUNS, MAX_RUNS = 20, 200
BLOCK_RUNS = 4
BLOCK_SECONDS, MOST_IN_PLACE_OF_ONE = 0.01, 12  # of a model that takes less than 2.5 ms, more runs are one's block
WIDTH_RATIO = 0.02  # an interval narrower than this, relative to its value, is narrow enough
SLOW_SECONDS = 1.0  # a model whose run takes longer is run less often:
SLOW_MIN_RUNS, SLOW_BLOCK_RUNS = 8, 2
SECONDS_PER_RUNNER = 60.0  # once there are enough runs, no more are taken after so long

WARM_UP_BLOCK_RUNS = 5
MAX_WARM_UP_BLOCKS = 20
WARM_UP_SECONDS = 10.0
STEADY_RATIO = 0.03  # medians of two blocks that differ by less are equal

MIN_P99_RUNS = 500
MIN_THROUGHPUT_RUNS, MAX_THROUGHPUT_RUNS = 8, 40
THROUGHPUT_SECONDS = 15.0

NOISE_RATIO = 0.015  # one engine, opened twice, differs from itself by so much: its memory lies elsewhere
RESAMPLES = 1000
CONFIDENCE = 0.95

Clock = Callable[[], float]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Complexity:
    """What the network is in itself, whatever runs it."""

    parameters: int | None
    macs: int | None


@dataclass(frozen=True)
class Timed:
    """Latencies of one runner in ms, by block. Of runners that took turns, blocks of one index were timed together.

    `warm_up` are the runs before the first that counts.
    """

    blocks: list[list[float]]
    warm_up: int = 0

    @property
    def times_ms(self) -> list[float]:
        return [latency_ms for block in self.blocks for latency_ms in block]

    @property
    def p50(self) -> float:
        return float(np.median(self.times_ms))


# ---------------------------------------------------------------- timing


def time_in_turns(
    runners: Sequence[Runner],
    inputs: Inputs,
    settings: Benchmark,
    *,
    max_runs: int = MAX_RUNS,
    on_wait: OnWait | None = None,
    clock: Clock = time.perf_counter,
) -> list[Timed]:
    """Latencies of each runner on one batch; all have equally many blocks of runs, which take turns.

    So many runs as `settings.runs` says; if it is None, 20 to `max_runs`, until the 95 % interval of every runner's
    ratio to the first is narrower than 2 % (of one runner alone: that of its median). A model that takes more than a
    second a run gets at least 8, and once each has its minimum nothing is timed for longer than a minute a runner. Of
    one that takes less than 2.5 ms up to 12 runs stand in place of each, so that a block lasts 10 ms.

    `on_wait` is called with a message while this waits for the machine's lock, and between blocks.
    """
    with timing_lock.held(on_wait):
        warm_ups = [_warm_up(runner, inputs, settings.warm_up, clock) for runner in runners]
        is_slow = max(seconds for _, seconds in warm_ups) > SLOW_SECONDS
        limits = _Limits(
            block_runs=SLOW_BLOCK_RUNS if is_slow else BLOCK_RUNS,
            min_runs=settings.runs or (SLOW_MIN_RUNS if is_slow else MIN_RUNS),
            max_runs=settings.runs or max_runs,
            seconds=SECONDS_PER_RUNNER * len(runners),
            times=[1 if settings.runs else _in_place_of_one(seconds) for _, seconds in warm_ups],
        )
        timed = [Timed([], runs) for runs, _ in warm_ups]
        _time_blocks(runners, inputs, timed, limits, on_wait, clock)
    return timed


def time_quickly(runners: Sequence[Runner], inputs: Inputs, *, on_wait: OnWait | None = None) -> list[Timed]:
    """Latencies by the fewest runs, to order models by: those that are chosen from are timed again."""
    return time_in_turns(runners, inputs, Benchmark(warm_up=3), max_runs=MIN_RUNS, on_wait=on_wait)


@dataclass(frozen=True)
class _Limits:
    block_runs: int
    min_runs: int
    max_runs: int
    seconds: float
    times: Sequence[int]  # of each runner, how many runs there are for each that these limits count


def _in_place_of_one(seconds: float) -> int:
    """How many runs of such a length make blocks of 10 ms."""
    return min(math.ceil(BLOCK_SECONDS / BLOCK_RUNS / max(seconds, 1e-9)), MOST_IN_PLACE_OF_ONE)


def _time_blocks(
    runners: Sequence[Runner],
    inputs: Inputs,
    timed: Sequence[Timed],
    limits: _Limits,
    on_wait: OnWait | None,
    clock: Clock,
) -> None:
    """Append blocks to `timed`, one of each runner in turn, until the limits or the intervals say that it is enough.

    The run before each block is not counted: it fills the caches that the runner before has emptied.
    """
    stop_at = clock() + limits.seconds
    runs = 0
    while runs < limits.max_runs:
        count = min(limits.block_runs, limits.max_runs - runs)
        for runner, one, times in zip(runners, timed, limits.times, strict=True):
            runner.run(inputs)
            one.blocks.append([1000 * _seconds(runner, inputs, clock) for _ in range(count * times)])
        runs += count
        if runs >= limits.min_runs and (clock() >= stop_at or _is_narrow(timed)):
            return
        if on_wait is not None:
            on_wait(f"timing: {runs} of at most {limits.max_runs} runs")


def _warm_up(runner: Runner, inputs: Inputs, min_runs: int, clock: Clock) -> tuple[int, float]:
    """Run until two blocks in a row have the same median, within bounds; the runs, and seconds of one run then."""
    stop_at = clock() + WARM_UP_SECONDS
    seconds = [_seconds(runner, inputs, clock) for _ in range(min_runs)]
    median = float(np.median(seconds[-WARM_UP_BLOCK_RUNS:]))
    for _ in range(MAX_WARM_UP_BLOCKS):
        if clock() >= stop_at:
            break
        before = median
        seconds += [_seconds(runner, inputs, clock) for _ in range(WARM_UP_BLOCK_RUNS)]
        median = float(np.median(seconds[-WARM_UP_BLOCK_RUNS:]))
        if abs(median / before - 1) < STEADY_RATIO:
            break
    return len(seconds), median


def _seconds(runner: Runner, inputs: Inputs, clock: Clock) -> float:
    begin = clock()
    runner.run(inputs)
    return clock() - begin


def throughput(
    runner: Runner,
    samples: Samples,
    settings: Benchmark,
    *,
    timed: Timed | None = None,
    on_wait: OnWait | None = None,
    clock: Clock = time.perf_counter,
) -> dict[int, float]:
    """Samples a second by batch size, from the median latency; `timed` are the first batch's latencies, if known.

    Only a median is reported, so fewer runs do than for a latency.
    """
    medians = {} if timed is None else {settings.batches[0]: timed.p50}
    for batch in settings.batches:
        if batch in medians:
            continue
        inputs = first(samples, batch)
        with timing_lock.held(on_wait):
            warm_up, seconds = _warm_up(runner, inputs, 1, clock)
            one = Timed([], warm_up)
            block_runs = SLOW_BLOCK_RUNS if seconds > SLOW_SECONDS else BLOCK_RUNS
            times = [_in_place_of_one(seconds)]
            limits = _Limits(block_runs, MIN_THROUGHPUT_RUNS, MAX_THROUGHPUT_RUNS, THROUGHPUT_SECONDS, times)
            _time_blocks([runner], inputs, [one], limits, on_wait, clock)
        medians[batch] = one.p50
    return {batch: 1000 * batch / medians[batch] for batch in settings.batches}


def first(samples: Samples, batch: int) -> Inputs:
    """The batch that is timed: the first samples, over again where there are fewer than the batch needs."""
    return samples.feed([index % len(samples) for index in range(batch)])


# ---------------------------------------------------------------- comparing


def ratio(before: Timed, after: Timed) -> Ratio:
    """How many times faster `after` is: a ratio of medians with its 95 % interval. Both were timed in turns."""
    num_blocks = len(before.blocks)
    if num_blocks != len(after.blocks) or num_blocks < 2:
        raise ValueError("only what was timed in turns is compared, of two blocks or more")
    value = before.p50 / after.p50
    weights = _weights(num_blocks)
    margin = _margin(np.log(_medians(before, weights)) - np.log(_medians(after, weights)), num_blocks)
    return Ratio(value=value, low=value * math.exp(-margin), high=value * math.exp(margin))


def same_speed(a: Timed, b: Timed) -> bool:
    """Whether they are a tie: their ratio's interval does not rule out that they differ by noise alone.

    Both were timed in turns.
    """
    compared = ratio(a, b)
    return math.log(compared.low) <= NOISE_RATIO and math.log(compared.high) >= -NOISE_RATIO


def latency_of(timed: Timed) -> Latency:
    """Median and 90th percentile; the 99th only of 500 runs or more, for of fewer it is about the largest."""
    p50, p90, p99 = (float(value) for value in np.percentile(timed.times_ms, (50, 90, 99)))
    return Latency(p50=p50, p90=p90, p99=p99 if len(timed.times_ms) >= MIN_P99_RUNS else None)


def _is_narrow(timed: Sequence[Timed]) -> bool:
    """Whether every ratio to the first runner is known well enough; of one runner alone, its median."""
    if len(timed) == 1:
        num_blocks = len(timed[0].blocks)
        margin = _margin(np.log(_medians(timed[0], _weights(num_blocks))), num_blocks)
        return 2 * margin < WIDTH_RATIO
    ratios = (ratio(timed[0], other) for other in timed[1:])
    return all(one.high - one.low < WIDTH_RATIO * one.value for one in ratios)


def _weights(num_blocks: int) -> npt.NDArray[np.int64]:
    """How often each block is drawn in each resample, (resamples, blocks). The same every time: seeded."""
    return np.random.default_rng(0).multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=RESAMPLES)


def _medians(timed: Timed, weights: npt.NDArray[np.int64]) -> Floats:
    """The median latency of each resample, (resamples,): a run counts as often as its block was drawn."""
    times = np.array(timed.times_ms)
    block_of_run = np.repeat(np.arange(len(timed.blocks)), [len(block) for block in timed.blocks])
    order = np.argsort(times)
    times = times[order]
    cumulative = weights[:, block_of_run[order]].cumsum(axis=1)  # (resamples, runs)
    half = cumulative[:, -1:] / 2
    medians: Floats = (times[(cumulative >= half).argmax(axis=1)] + times[(cumulative > half).argmax(axis=1)]) / 2
    return medians


def _margin(resampled: Floats, num_blocks: int) -> float:
    """Half the width of the 95 % interval: the bootstrap's standard error, by Student's t for so few blocks.

    Resampling n blocks understates the variance by (n - 1) / n.
    """
    standard_error = float(resampled.std()) * math.sqrt(num_blocks / (num_blocks - 1))
    return standard_error * float(stdtrit(num_blocks - 1, (1 + CONFIDENCE) / 2))


# ---------------------------------------------------------------- size


def size_bytes(model: Model, engine: str) -> int:
    """Bytes of the files that the runtime loads: of an engine its own files, not the portable ONNX beside them."""
    return sum(file.stat().st_size for file in engines.load(engine).files(model.path))


def complexity_of(model: Model, samples: Samples) -> Complexity:
    """Parameters and MACs of a PyTorch or ONNX model for one sample of this data."""
    sample = samples.inputs(0, 1).shape[1:]
    if model.format == ModelFormat.TORCH:
        module = load_module(model)
        return Complexity(module_parameters(module), module_macs(module, sample))
    assert model.format == ModelFormat.ONNX
    return Complexity(onnx_parameters(model.path), onnx_macs(model.path, sample))
