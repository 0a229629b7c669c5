"""A stage's context for benchmarks that only train: no engine is built, and nothing is kept for a later attempt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.no_memory import NoMemory
from shared.recipe import Recipe
from worker import engines
from worker.context import Model, StageContext
from worker.data import Samples
from worker.engines import Runner
from worker.evaluation.once import Evaluations


def training_context(
    recipe: Recipe, source: Model, samples: Callable[[str], Samples], directory: Path, *, seed: int, threads: int
) -> StageContext:
    """The context of a stage that trains in `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    runner: Runner = engines.load("torch eager").open(source, threads)
    reference = directory / "reference.npy"
    evaluations = Evaluations(recipe, samples, lambda: (source, runner))
    return StageContext(
        recipe=recipe,
        directory=directory,
        samples=samples,
        source=source,
        reference=reference,
        evaluate=partial(evaluations.of, reference),
        onnxruntime=lambda: (source, runner),
        baseline=None,
        progress=lambda fraction, message="": None,
        checkpoints=NoMemory(),
        timings=NoMemory(),
        seed=seed,
        threads=threads,
    )
