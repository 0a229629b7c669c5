"""A report's row: how large, how fast and how right one model is on one engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.recipe import Recipe
from shared.report import Measurement, Method
from worker.benchmark import Complexity, Timed, first, latency_of, ratio, size_bytes, throughput
from worker.context import Model
from worker.data import Samples
from worker.engines import Runner
from worker.environment import cpu_name
from worker.footprint import added_bytes


@dataclass(frozen=True)
class Timings:
    """Latencies that were taken in turns: of the model, the source model, and its fp32 graph in ONNX Runtime."""

    model: Timed
    source: Timed | None = None
    onnxruntime: Timed | None = None

    def fields(self) -> dict[str, Any]:
        return {
            "latency_ms": latency_of(self.model),
            "baseline_latency_ms": None if self.source is None else latency_of(self.source),
            "speedup": None if self.source is None else ratio(self.source, self.model),
            "speedup_over_onnxruntime": None if self.onnxruntime is None else ratio(self.onnxruntime, self.model),
        }


def measurement(
    model: Model,
    runner: Runner,
    timings: Timings,
    complexity: Complexity,
    recipe: Recipe,
    samples: Samples,
    evaluated: Mapping[str, Any] | None = None,
) -> Measurement:
    """The row of one model, loaded in `runner`. `evaluated` are the row's fields that say how right the model is."""
    return Measurement(
        parameters=complexity.parameters,
        macs=complexity.macs,
        size_bytes=size_bytes(model, runner.engine),
        **timings.fields(),
        **({"metrics": {}} if evaluated is None else evaluated),
        method=Method(
            engine=runner.engine,
            precision=runner.precision,
            device=getattr(runner, "device", f"cpu: {cpu_name()}"),
            threads=runner.threads,
            batch=recipe.benchmark.batches[0],
            warm_up=recipe.benchmark.warm_up,
            runs=len(timings.model.times_ms),
            samples=len(samples),
            versions=runner.versions,
        ),
    )


def with_resources(
    found: Measurement, model: Model, runner: Runner, recipe: Recipe, samples: Samples
) -> Measurement:
    """The row with what is only measured for the baseline and for what is delivered: throughput and memory."""
    batch = first(samples, recipe.benchmark.batches[0])
    return found.model_copy(
        update={
            "throughput_per_second": throughput(runner, samples, recipe.benchmark),
            "peak_memory_bytes": added_bytes(model, runner.engine, runner.threads, batch),
        }
    )
