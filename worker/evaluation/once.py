"""Every model is evaluated once on each engine, however many stages look at it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shared.metrics import METRICS
from shared.recipe import ModelFormat, Recipe
from shared.report import Agreement, Bound
from worker import engines
from worker.context import Graph, Model
from worker.data import Samples
from worker.engines import Runner
from worker.evaluation.agreement import as_metrics, bounds_of, compare
from worker.evaluation.metrics import Evaluation, evaluate
from worker.evaluation.statistics import bounds

ROUNDING = 5e-4  # a relative RMS error up to which two engines compute the same but for rounding, to fp16 at most
SAME_OUTPUTS = "outputs equal the source model's but for rounding"
MAX_SCORES = 20_000  # samples; beyond them a report keeps no score for each


@dataclass(frozen=True)
class Evaluated:
    """How right a model is: its metrics on the evaluation part, and its agreement with the network it was made of.

    `metrics` are the task's means and, but for the source model, the agreement with the source model's outputs.
    """

    evaluation: Evaluation
    agreement: Agreement
    metrics: dict[str, float]
    bounds: list[Bound] = field(default_factory=list)

    def fields(self, recipe: Recipe) -> dict[str, Any]:
        """What a report's row says of it."""
        return {**fields_of(self.evaluation, recipe), "metrics": self.metrics, "bounds": self.bounds}


def fields_of(evaluation: Evaluation, recipe: Recipe) -> dict[str, Any]:
    """What a report's row says of an evaluation; with the scores by sample of the leading metric and of the goals'."""
    names = {*recipe.task.metrics[:1], *(goal.metric for goal in recipe.goals_in_force)}
    scores = {name: found for name, found in evaluation.scores.items() if name in names and len(found) <= MAX_SCORES}
    return {
        "metrics": evaluation.means,
        "class_metrics": evaluation.by_class,
        "scores": {name: np.round(found, 6).tolist() for name, found in scores.items()},
    }


class Evaluations:
    """What was evaluated so far in this attempt.

    `source` opens the source model; `source_outputs` are its outputs on the samples that agreement is judged on.
    """

    def __init__(
        self, recipe: Recipe, samples: Callable[[str], Samples], source: Callable[[], tuple[Model, Runner]]
    ) -> None:
        self.recipe, self._samples, self._open_source = recipe, samples, source
        self.source_outputs: Path | None = None
        self._known: dict[tuple[str, ...], Evaluation] = {}
        self._agreements: dict[tuple[str, ...], Agreement] = {}
        self._rule: Literal["broken", "close"] = "broken" if recipe.has_quality_goal else "close"

    def requested(self) -> set[str]:
        """The dear metrics that a goal names."""
        goals = self.recipe.goals_in_force
        return {goal.metric for goal in goals if goal.metric in METRICS and METRICS[goal.metric].on_request}

    def metrics_of(self, model: Model, runner: Runner, requested: Collection[str] | None = None) -> Evaluation:
        """The task's metrics of one model on one engine. Raises what `evaluate` raises."""
        wanted = sorted(self.requested() if requested is None else set(requested))
        key = identity(model, runner)
        known = self._known.get(key)
        if known is None or not set(wanted) <= known.means.keys():
            samples, batch = self._samples("evaluation"), self._batch(runner)
            known = evaluate(runner.run, samples, self.recipe.task, requested=wanted, batch=batch)
            self._known[key] = known
        return known

    def agreement_of(self, model: Model, runner: Runner, reference: Path) -> Agreement:
        """The agreement of one model on one engine with kept outputs. Raises StageFailed (output_mismatch)."""
        key = (*identity(model, runner), str(reference))
        if key not in self._agreements:
            samples = self._samples("evaluation")
            batch = self._batch(runner)
            self._agreements[key] = compare(runner, samples, reference, self.recipe.task, self._rule, batch)
        return self._agreements[key]

    def of(self, reference: Path, model: Model, runner: Runner, requested: Collection[str] | None = None) -> Evaluated:
        """Metrics, agreement (with the `reference` outputs) and bounds of a model that a stage made."""
        assert self.source_outputs is not None
        evaluation = self.metrics_of(model, runner, requested)
        agreement = self.agreement_of(model, runner, reference)
        with_source = self.agreement_of(model, runner, self.source_outputs)
        metrics = {**evaluation.means, **as_metrics(with_source)}
        found = [*self._bounds(evaluation), *bounds_of(with_source, self.recipe.goals_in_force)]
        if metrics["rms_error"] <= ROUNDING:
            found = [bound.model_copy(update={"bound": bound.value, "method": SAME_OUTPUTS}) for bound in found]
        return Evaluated(evaluation, agreement, metrics, found)

    def _batch(self, runner: Runner) -> int:
        """Samples a run: as many as are timed, since a runtime may compile other code for other numbers."""
        fixed: int | None = getattr(runner, "fixed_batch", None)
        return fixed or self.recipe.benchmark.batches[0]

    def _bounds(self, evaluation: Evaluation) -> list[Bound]:
        goals = [goal for goal in self.recipe.goals_in_force if goal.metric in METRICS]
        if not goals:
            return []
        source = self.metrics_of(*self._open_source())
        groups = self._samples("evaluation").groups
        return bounds(goals, source, evaluation, None if groups is None else np.asarray(groups), self.recipe.seed)


def identity(model: Model, runner: Runner) -> tuple[str, ...]:
    """What makes two evaluations the same: the bytes that the engine loads, and how it runs them."""
    if model.format == ModelFormat.TORCH:
        files = [model.path]
        if isinstance(model.architecture, Graph):
            files.append(model.architecture.path)
            built_from = "graph"
        else:
            assert model.architecture is not None
            built_from = f"{model.architecture.model_dump_json()} {model.pruned}"
    else:
        files, built_from = engines.load(runner.engine).files(model.path), ""
    return (runner.engine, runner.precision, built_from, *(_sha256(path) for path in files))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
