"""A job's stages as a plain script: what a user would run without the service, in one process, on the same files.

    python -m benchmarks.plain_script RECIPE.json WEIGHTS DATA OUT

The source model and its ONNX are measured, then every stage is run, its result evaluated on the data and timed, all
with the worker's own functions and each thing once. Nothing is uploaded, committed or reported. Prints the seconds of
each step, counted from the start of the process, as one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.no_memory import NoMemory
from shared.recipe import ExportOnnx, ModelFormat, Recipe, TorchSource
from shared.report import Measurement
from worker import engines, stages
from worker.benchmark import complexity_of, first, time_in_turns
from worker.context import Model, StageContext, StageResult
from worker.data import Samples, open_samples
from worker.engines import Runner
from worker.evaluation.agreement import keep_reference
from worker.evaluation.once import Evaluations, fields_of
from worker.measurement import Timings, measurement, with_resources


def main(recipe_path: Path, weights: Path, data: Path, out: Path) -> dict[str, float]:
    """Seconds by step; an `engine.zip` is left below `out`."""
    recipe = Recipe.model_validate_json(recipe_path.read_text(encoding="utf-8"))
    assert isinstance(recipe.source, TorchSource)
    seconds, step_began_at = {}, psutil.Process().create_time()

    def end(step: str) -> None:
        nonlocal step_began_at
        seconds[step], step_began_at = time.time() - step_began_at, time.time()

    @lru_cache
    def samples(part: str) -> Samples:
        return open_samples(data, "safetensors", part, recipe.data, recipe.task)

    def opened(model: Model) -> Runner:
        home = "torch eager" if model.format == ModelFormat.TORCH else "onnxruntime"
        runner: Runner = engines.load(home).open(model, recipe.benchmark.threads)
        return runner

    # the source model, and its ONNX in ONNX Runtime
    end("start and imports")
    evaluation_part, settings = samples("evaluation"), recipe.benchmark
    batch = first(evaluation_part, settings.batches[0])
    source, reference = Model(ModelFormat.TORCH, weights, recipe.source.architecture), out / "reference.npy"
    runner = opened(source)
    evaluations = Evaluations(recipe, samples, lambda: (source, runner))
    keep_reference(runner, evaluation_part, reference)
    evaluations.source_outputs = reference

    def context(name: str, baseline: Measurement | None) -> StageContext:
        (out / name).mkdir(parents=True)
        return StageContext(
            recipe=recipe,
            directory=out / name,
            samples=samples,
            source=source,
            reference=reference,
            evaluate=partial(evaluations.of, reference),
            onnxruntime=lambda: (export.model, exported),
            baseline=baseline,
            progress=lambda fraction, message="": None,
            checkpoints=NoMemory(),
            timings=NoMemory(),
            seed=recipe.seed,
            threads=torch.get_num_threads(),
        )

    evaluation = evaluations.metrics_of(source, runner, ("hd95", "nsd"))
    words = next((stage for stage in recipe.stages if isinstance(stage, ExportOnnx)), ExportOnnx())
    export: StageResult = stages.load("export_onnx").run(words, source, context("export", None))
    exported = opened(export.model)
    evaluations.of(reference, export.model, exported)
    source_ms, _ = time_in_turns([runner, exported], batch, settings)
    row = measurement(
        source,
        runner,
        Timings(source_ms),
        complexity_of(source, evaluation_part),
        recipe,
        evaluation_part,
        fields_of(evaluation, recipe),
    )
    baseline = with_resources(row, source, runner, recipe, evaluation_part)
    end("baseline")

    # the stages
    model = source
    for position, stage in enumerate(recipe.stages):
        seed(recipe.seed)
        is_export = isinstance(stage, ExportOnnx) and model is source
        run = stages.load(stage.kind).run
        result: StageResult = export if is_export else run(stage, model, context(f"{position}", baseline))
        model = result.model
        if result.measurement is None and not is_export:
            its = opened(model)
            evaluations.of(reference, model, its)
            time_in_turns([runner, exported, its], batch, settings)
        end(f"{position} {stage.kind}")
    return seconds


def seed(number: int) -> None:
    """The same random numbers in every run."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    torch.use_deterministic_algorithms(True, warn_only=True)


if __name__ == "__main__":
    print(json.dumps(main(*(Path(argument).absolute() for argument in sys.argv[1:]))))
