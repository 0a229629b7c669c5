"""A job's stages as a plain script: what a user would run without the service, in one process, on the same files.

    python -m benchmarks.plain_script RECIPE.json WEIGHTS DATA OUT

The source model and its ONNX are measured, then every stage is run, its result evaluated on the data and timed, all
with the worker's own functions. Nothing is uploaded, committed, reported or judged. Prints the seconds of each step,
counted from the start of the process, as one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.no_memory import NoMemory
from shared.recipe import ExportOnnx, ModelFormat, Recipe, TorchSource
from shared.report import Measurement
from worker import engines, stages
from worker.benchmark import first, measure, side_by_side
from worker.context import Model, StageContext, StageResult
from worker.data import Samples, open_samples
from worker.engines import Runner
from worker.evaluate import hold, keep_reference


def main(recipe_path: Path, weights: Path, data: Path, out: Path) -> dict[str, float]:
    """Seconds by step; an `engine.zip` is left below `out`."""
    recipe = Recipe.model_validate_json(recipe_path.read_text(encoding="utf-8"))
    assert isinstance(recipe.source, TorchSource)
    seconds, told_at = {}, psutil.Process().create_time()

    def tell(step: str) -> None:
        nonlocal told_at
        seconds[step], told_at = time.time() - told_at, time.time()

    @lru_cache
    def samples(part: str) -> Samples:
        return open_samples(data, "safetensors", part, recipe.data, recipe.task)

    def opened(model: Model) -> Runner:
        runner: Runner = engines.load(home(model)).open(model, recipe.benchmark.threads)
        return runner

    def figures(model: Model, beside: Model | None = None) -> Measurement:
        runner, settings = opened(model), recipe.benchmark
        if beside is None:
            return measure(model, runner, samples("evaluation"), recipe)
        batch = first(samples("evaluation"), settings.batches[0])
        source_ms, times_ms = side_by_side([opened(beside), runner], batch, settings)
        return measure(
            model, runner, samples("evaluation"), recipe, times_ms=times_ms, baseline_times_ms=source_ms
        )

    def context(name: str, baseline: Measurement) -> StageContext:
        (out / name).mkdir(parents=True)
        return StageContext(
            recipe=recipe,
            directory=out / name,
            samples=samples,
            source=source,
            reference=reference,
            baseline=baseline,
            progress=lambda fraction, message="": None,
            checkpoints=NoMemory(),
            timings=NoMemory(),
            seed=recipe.seed,
            threads=torch.get_num_threads(),
        )

    # the source model, and its ONNX in ONNX Runtime
    tell("start and imports")
    source, reference = Model(ModelFormat.TORCH, weights, recipe.source.architecture), out / "reference.npy"
    keep_reference(opened(source), samples("evaluation"), reference)
    baseline = figures(source)
    figures(stages.load("export_onnx").run(ExportOnnx(), source, context("baseline", baseline)).model, source)
    tell("baseline")

    # the stages
    model = source
    for position, stage in enumerate(recipe.stages):
        seed(recipe.seed)
        result: StageResult = stages.load(stage.kind).run(stage, model, context(f"{position}", baseline))
        model = result.model
        if result.measurement is None:
            figures(model, source)
        if result.parity is None:
            hold(opened(model), samples("evaluation"), reference, 1.0, recipe.task)
        tell(f"{position} {stage.kind}")
    return seconds


def home(model: Model) -> str:
    """The runtime that a model is measured on."""
    return "torch eager" if model.format == ModelFormat.TORCH else "onnxruntime"


def seed(number: int) -> None:
    """The same random numbers in every run."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    torch.use_deterministic_algorithms(True, warn_only=True)


if __name__ == "__main__":
    print(json.dumps(main(*(Path(argument).absolute() for argument in sys.argv[1:]))))
