"""The figures of one attempt's models: each is evaluated once, and timed in turns with the source model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from shared.metrics import METRICS
from shared.recipe import ModelFormat, Recipe
from shared.report import Agreement, Baseline, Environment, Measurement
from worker import engines
from worker.benchmark import Timed, complexity_of, first, time_in_turns
from worker.context import Model
from worker.data import Samples
from worker.engines import Runner
from worker.evaluation.once import Evaluations, fields_of, identity
from worker.evaluation.plausibility import doubts
from worker.handover import unpacked
from worker.measurement import Timings, measurement, with_resources


class Figures:
    """Measures the source model and what stages made of it.

    `source_outputs` are the source model's raw outputs, on the samples that agreement is judged on; `source_graph`
    gives its cleaned fp32 ONNX, loaded in ONNX Runtime. `on_progress` hears what is measured.
    """

    def __init__(
        self,
        recipe: Recipe,
        samples: Callable[[str], Samples],
        source: Model,
        source_outputs: Path,
        source_graph: Callable[[], tuple[Model, Runner]],
        on_progress: Callable[[float, str], None],
    ) -> None:
        self.recipe, self.source, self.source_outputs = recipe, source, source_outputs
        self.source_graph, self.on_progress = source_graph, on_progress
        self.evaluations = Evaluations(recipe, samples, lambda: (source, self.open(source)))
        self.evaluations.source_outputs = source_outputs
        self._samples = samples
        self._rows: dict[tuple[str, ...], Measurement] = {}  # by what a model is

    def open(self, model: Model) -> Runner:
        """The model, loaded on the runtime that it is judged on."""
        return open_model(model, self.recipe.benchmark.threads)

    def baseline(self, environment: Environment) -> Baseline:
        """The source model, evaluated with every metric, and timed in turns with its own graph in ONNX Runtime."""
        samples, runner = self._samples("evaluation"), self.open(self.source)
        self.on_progress(0.0, "evaluating the source model")
        evaluation = self.evaluations.metrics_of(self.source, runner, self._dear_metrics())
        graph, beside = self.source_graph()
        source_ms, graph_ms = self._time([runner, beside], 0.5)
        row = measurement(
            self.source,
            runner,
            Timings(source_ms),
            complexity_of(self.source, samples),
            self.recipe,
            samples,
            fields_of(evaluation, self.recipe),
        )
        return Baseline(
            source=with_resources(row, self.source, runner, self.recipe, samples),
            onnxruntime=self._row(graph, graph, beside, Timings(graph_ms, source_ms, graph_ms)),
            environment=environment,
            doubts=doubts(evaluation, self.recipe.task),
        )

    def of(self, model: Model) -> Measurement:
        """The model's row, timed in turns with the source model and with its graph in ONNX Runtime."""
        runner, files = self.open(model), _files(model)
        known = self._rows.get(identity(files, runner))
        if known is not None:
            return known
        times = self._time([self.open(self.source), self.source_graph()[1], runner], 0.95)
        source_ms, graph_ms, model_ms = times
        counted = unpacked(model.path).portable if model.format == ModelFormat.ENGINE else model
        return self._row(files, counted, runner, Timings(model_ms, source_ms, graph_ms))

    def finished(self, row: Measurement, model: Model) -> Measurement:
        """The row with what only the baseline and what is delivered are measured for."""
        samples, runner, files = self._samples("evaluation"), self.open(model), _files(model)
        evaluated = self.evaluations.of(self.source_outputs, files, runner, self._dear_metrics())
        row = row.model_copy(update=evaluated.fields(self.recipe))
        return with_resources(row, files, runner, self.recipe, samples)

    def agreement(self, model: Model, reference: Path) -> Agreement:
        """The model's agreement with the network it was made of."""
        return self.evaluations.agreement_of(_files(model), self.open(model), reference)

    def _row(self, files: Model, counted: Model, runner: Runner, timings: Timings) -> Measurement:
        """`counted` is the model whose parameters and MACs are told: of an engine its portable ONNX."""
        samples = self._samples("evaluation")
        evaluated = self.evaluations.of(self.source_outputs, files, runner)
        complexity = complexity_of(counted, samples)
        row = measurement(files, runner, timings, complexity, self.recipe, samples, evaluated.fields(self.recipe))
        self._rows[identity(files, runner)] = row
        return row

    def _time(self, runners: list[Runner], progress: float) -> list[Timed]:
        batch = first(self._samples("evaluation"), self.recipe.benchmark.batches[0])
        on_wait = partial(self.on_progress, progress)
        return time_in_turns(runners, batch, self.recipe.benchmark, on_wait=on_wait)

    def _dear_metrics(self) -> set[str]:
        return {name for name in self.recipe.task.metrics if METRICS[name].on_request}


def open_model(model: Model, threads: int) -> Runner:
    """A PyTorch network in eager mode, an ONNX file in ONNX Runtime, an engine in its own runtime."""
    if model.format == ModelFormat.ENGINE:
        engine, model = str(unpacked(model.path).manifest.engine), unpacked(model.path).files
    else:
        engine = "torch eager" if model.format == ModelFormat.TORCH else "onnxruntime"
    runner: Runner = engines.load(engine).open(model, threads)
    return runner


def _files(model: Model) -> Model:
    """What the runtime loads: of an engine's zip the files in it."""
    return unpacked(model.path).files if model.format == ModelFormat.ENGINE else model


def holds(known: Baseline, recipe: Recipe, environment: Environment) -> bool:
    """Whether a baseline that was measured before is this job's: the same figures, of the same machine."""
    method, settings = known.source.method, recipe.benchmark
    same_batch = (method.threads, method.batch) == (settings.threads, settings.batches[0])
    same_batches = set(known.source.throughput_per_second) == set(settings.batches)
    return same_batch and same_batches and known.environment.fingerprint() == environment.fingerprint()
