"""How large and how fast a model is: the only stop-watch, the same for the baseline and for every engine.

Latency is the wall time of `run` on one batch of real samples, from NumPy array to NumPy array, after a warm-up, with
a fixed number of threads. A build stage's candidates, and at the job's end the source model and what is delivered, are
timed in alternation, so that a change in the machine's load falls on all of them; other rows are timed one by one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.recipe import Benchmark, ModelFormat, Recipe
from shared.report import Latency, Measurement, Method
from worker import engines
from worker.complexity import module_macs, module_parameters, onnx_macs, onnx_parameters
from worker.context import Model
from worker.data import Samples
from worker.engines import Runner
from worker.environment import cpu_name
from worker.evaluate import evaluate
from worker.feed import Inputs
from worker.footprint import added_bytes
from worker.loading import load_module

BLOCK_RUNS = 10
MIN_THROUGHPUT_RUNS = 10


@dataclass(frozen=True)
class Complexity:
    """What the network is in itself, whatever runs it."""

    parameters: int | None
    macs: int | None


def measure(
    model: Model,
    runner: Runner,
    samples: Samples,
    recipe: Recipe,
    *,
    complexity: Complexity | None = None,
    times_ms: Sequence[float] | None = None,
    baseline_times_ms: Sequence[float] | None = None,
) -> Measurement:
    """Everything that the report tells of a model: it is evaluated, timed, weighed and counted.

    `runner` is the model, loaded; it runs every evaluation sample and all timed batches. Of a model that is an engine,
    `path` is the runtime's own file and `complexity` must be given. `times_ms` are latencies at the first batch size
    that `side_by_side` took already, `baseline_times_ms` those of the source model in the same turns.
    """
    settings = recipe.benchmark
    metrics, class_metrics = evaluate(runner.run, samples, recipe.task)
    times = {settings.batches[0]: times_ms} if times_ms is not None else {}
    for batch in settings.batches:
        if batch not in times:
            times[batch] = side_by_side([runner], first(samples, batch), settings, num_runs(settings, batch))[0]
    weighed = complexity or complexity_of(model, samples)
    return Measurement(
        parameters=weighed.parameters,
        macs=weighed.macs,
        size_bytes=size_bytes(model, runner.engine),
        latency_ms=percentiles(times[settings.batches[0]]),
        baseline_latency_ms=None if baseline_times_ms is None else percentiles(baseline_times_ms),
        throughput_per_second={batch: 1000 * batch / float(np.median(found)) for batch, found in times.items()},
        peak_memory_bytes=added_bytes(model, runner.engine, runner.threads, first(samples, settings.batches[0])),
        metrics=metrics,
        class_metrics=class_metrics,
        method=Method(
            engine=runner.engine,
            precision=runner.precision,
            device=getattr(runner, "device", f"cpu: {cpu_name()}"),
            threads=runner.threads,
            batch=settings.batches[0],
            warm_up=settings.warm_up,
            runs=settings.runs,
            samples=len(samples),
            versions=runner.versions,
        ),
    )


def side_by_side(
    runners: Sequence[Runner], inputs: Inputs, settings: Benchmark, runs: int | None = None
) -> list[list[float]]:
    """Latencies in ms of each runner on one batch, in blocks of ten runs that take turns.

    One run before each block is not counted: it fills the caches that the runner before has emptied.
    """
    runs = runs or settings.runs
    times: list[list[float]] = [[] for _ in runners]
    for runner in runners:
        for _ in range(settings.warm_up):
            runner.run(inputs)
    while len(times[0]) < runs:
        for runner, found in zip(runners, times, strict=True):
            runner.run(inputs)
            found += [_time_ms(runner, inputs) for _ in range(min(BLOCK_RUNS, runs - len(found)))]
    return times


def _time_ms(runner: Runner, inputs: Inputs) -> float:
    begin = time.perf_counter_ns()
    runner.run(inputs)
    return (time.perf_counter_ns() - begin) / 1e6


def num_runs(settings: Benchmark, batch: int) -> int:
    """All runs at the batch that latency is told at; fewer where a run is many samples and only its median is told."""
    if batch == settings.batches[0]:
        return settings.runs
    return max(MIN_THROUGHPUT_RUNS, settings.runs * settings.batches[0] // batch)


def first(samples: Samples, batch: int) -> Inputs:
    """The batch that is timed: the first samples, over again where there are fewer than the batch needs."""
    return samples.feed([index % len(samples) for index in range(batch)])


def percentiles(times_ms: Sequence[float]) -> Latency:
    """Median, 90th and 99th percentile."""
    p50, p90, p99 = (float(value) for value in np.percentile(times_ms, (50, 90, 99)))
    return Latency(p50=p50, p90=p90, p99=p99)


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
