"""The child's work: measure the baseline, walk the recipe, gate each stage, write the report.

Files stay in this process's directory; the supervisor commits each finished stage before the next begins, so that
another attempt can go on after it.
"""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from shared.errors import StageFailed, UserError
from shared.recipe import ExportOnnx, ModelFormat, OnnxSource, Stage
from shared.report import (
    Baseline,
    GoalResult,
    Measurement,
    Parity,
    Report,
    SideBySide,
    StageReport,
    judge,
    judge_all,
    verdict,
)
from worker import engines, stages, wire
from worker.benchmark import complexity_of, first, measure, percentiles, side_by_side
from worker.context import Model, StageContext, StageResult
from worker.data import Samples, open_samples
from worker.engines import Runner, archive
from worker.environment import environment
from worker.evaluate import parity, parity_inputs, run_in_batches
from worker.loading import check_source

PROGRESS_SECONDS = 0.5
DROPPED_AS = ("no_engine", "quantize_failed")  # failures that leave the model before them as good as it was


def main(file_descriptor: int) -> None:
    """Run the ticket in the current directory, telling the supervisor at the other end of the socket."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    mouth = wire.Mouth(file_descriptor)
    ticket = wire.Ticket.model_validate_json(Path(wire.TICKET).read_text(encoding="utf-8"))
    pipeline = Pipeline(ticket, mouth)
    try:
        mouth.tell(wire.Finished(report=pipeline.run()))
    except UserError as error:
        logging.error("%s", error.detail)
        mouth.tell(pipeline.failure(error.code, error.detail, error.hint))
    except MemoryError as error:
        logging.error("out of memory", exc_info=error)
        hint = "Use a smaller model, image or batch, or a worker with more memory."
        mouth.tell(pipeline.failure("out_of_memory", "The model does not fit into the worker's memory.", hint))
    except Exception as error:
        logging.exception("a fault of the service")
        told = f"The service failed at this job: {type(error).__name__}: {error}"
        mouth.tell(pipeline.failure("internal_error", told[:4000], "The job's log has the trace.", "platform"))


class Pipeline:
    """One attempt at one recipe."""

    def __init__(self, ticket: wire.Ticket, mouth: wire.Mouth) -> None:
        self.ticket, self.recipe, self.mouth = ticket, ticket.recipe, mouth
        self.position: int | None = None
        self.environment = environment()
        self._told_at = 0.0
        self._samples = lru_cache(self._open_samples)

    def run(self) -> Report:
        """Raises UserError where the model, the data or the recipe is at fault."""
        source = self._source()
        reference = self._reference(source)
        baseline = self._baseline(source, reference)
        model, final, reports = source, None, []
        for position, stage in enumerate(self.recipe.stages):
            done = next((done for done in self.ticket.finished if done.report.position == position), None)
            if done is not None:
                report, result = self._restored(done, stage, baseline)
            elif stage.consumes != model.format:
                report, result = self._skipped(position, stage, model), None
            else:
                self.position = position
                context = self._context(position, source, reference, baseline.source)
                report, result = self._stage(position, stage, model, context)
            reports.append(report)
            if result is not None and report.status == "succeeded":
                model, final = result, position
        self.position = None
        together = None if final is None else self._together(source, model)
        return self._report(baseline, reports, final, together)

    def failure(self, code: str, message: str, hint: str | None, fault: str = "user") -> wire.Failed:
        return wire.Failed.model_validate(
            {"position": self.position, "code": code, "message": message, "hint": hint, "fault": fault}
        )

    # ------------------------------------------------------------ the baseline

    def _source(self) -> Model:
        source = self.recipe.source
        check_source(self.ticket.source, source)
        if isinstance(source, OnnxSource):
            return Model(ModelFormat.ONNX, self.ticket.source)
        return Model(ModelFormat.TORCH, self.ticket.source, source.architecture)

    def _reference(self, source: Model) -> Path:
        """The source model's raw outputs on the parity samples, kept for every stage to be held against."""
        path = _directory("baseline") / "reference.npy"
        outputs = run_in_batches(self._open(source).run, parity_inputs(self._samples("evaluation")))
        if not np.isfinite(outputs).all():
            raise StageFailed(
                "The source model puts out NaN or infinite values on the evaluation samples.",
                hint="Check its weights, and that preprocessing is what it was trained with.",
                code="source_not_finite",
            )
        np.save(path, outputs)
        return path

    def _baseline(self, source: Model, reference: Path) -> Baseline:
        known = self.ticket.baseline
        if known is not None and known.environment.fingerprint() == self.environment.fingerprint():
            return known
        self._progress(0.0, "measuring the source model")
        measured = self._measure(source)
        exported = None
        if source.format == ModelFormat.TORCH:
            self._progress(0.5, "measuring its ONNX in ONNX Runtime")
            context = self._context(None, source, reference, measured)
            export = next((stage for stage in self.recipe.stages if stage.kind == "export_onnx"), ExportOnnx())
            exported = self._measure(stages.load("export_onnx").run(export, source, context).model)
        baseline = Baseline(source=measured, onnxruntime=exported, environment=self.environment)
        self.mouth.ask(wire.BaselineMeasured(baseline=baseline))
        return baseline

    # ------------------------------------------------------------ the stages

    def _stage(self, position: int, stage: Stage, model: Model, ctx: StageContext) -> tuple[StageReport, Model | None]:
        self.mouth.ask(wire.StageStarted(position=position))
        logging.info("stage %d: %s", position, stage.kind)
        begin = time.monotonic()
        _seed(self.recipe.seed)
        try:
            result: StageResult = stages.load(stage.kind).run(stage, model, ctx)
        except StageFailed as error:
            if error.code not in DROPPED_AS or stage.on_miss != "keep_best" or model is ctx.source:
                raise
            return self._without(position, stage, error.detail, time.monotonic() - begin), None
        self._progress(0.9, "evaluating and measuring")
        measurement = result.measurement or self._measure(result.model)
        held = result.parity or self._parity(result.model, ctx)
        gate = self._gate(ctx.baseline, measurement)
        missed = _why_missed(gate, held)
        if missed and stage.on_miss == "fail":
            raise StageFailed(f"stage {position} ({stage.kind}): {missed}", code="goal_missed")
        report = StageReport(
            position=position,
            kind=stage.kind,
            status="dropped" if missed and stage.on_miss == "keep_best" else "succeeded",
            reason=missed,
            seconds=time.monotonic() - begin,
            measurement=measurement,
            parity=held,
            gate=gate,
            candidates=result.candidates,
            details={**result.details, "precision": result.model.precision},
        )
        return self._commit(report, result.model), result.model

    def _without(self, position: int, stage: Stage, reason: str, seconds: float) -> StageReport:
        """The stage could make nothing good of this model: the last good one goes on."""
        return self._commit(
            StageReport(position=position, kind=stage.kind, status="dropped", reason=reason, seconds=seconds), None
        )

    def _skipped(self, position: int, stage: Stage, model: Model) -> StageReport:
        reason = f"it needs {stage.consumes}, but the last good model is {model.format}"
        self.mouth.ask(wire.StageStarted(position=position))
        return self._commit(
            StageReport(position=position, kind=stage.kind, status="skipped", reason=reason, seconds=0), None
        )

    def _commit(self, report: StageReport, model: Model | None) -> StageReport:
        files = [] if model is None else _files(report, model)
        answer = self.mouth.ask(wire.StageFinished(report=report, files=files))
        return StageReport.model_validate({**report.model_dump(), "artifacts": answer["artifacts"]})

    def _restored(
        self, done: wire.FinishedStage, stage: Stage, baseline: Baseline
    ) -> tuple[StageReport, Model | None]:
        """A stage that an earlier attempt finished; measured again if that was on another machine."""
        if done.report.measurement is None:
            return done.report, None
        path = done.files["engine" if stage.produces == ModelFormat.ENGINE else "model"]
        variants = {
            role.removeprefix("model."): file for role, file in done.files.items() if role.count(".") == 1
        }
        model = Model(stage.produces, path, precision=done.report.details["precision"], variants=variants)
        if baseline is self.ticket.baseline:
            return done.report, model
        return done.report.model_copy(update={"measurement": self._measure(model)}), model

    # ------------------------------------------------------------ measuring and judging

    def _context(self, position: int | None, source: Model, reference: Path, baseline: Measurement) -> StageContext:
        return StageContext(
            recipe=self.recipe,
            directory=_directory("baseline/onnx" if position is None else f"stages/{position}"),
            samples=self._samples,
            source=source,
            reference=reference,
            baseline=baseline,
            progress=lambda fraction, message="": self._progress(0.9 * fraction, message),
            seed=self.recipe.seed,
            threads=self.ticket.threads,
        )

    def _measure(self, model: Model) -> Measurement:
        samples = self._samples("evaluation")
        if model.format != ModelFormat.ENGINE:
            return measure(model, self._open(model), samples, self.recipe)
        opened = _unpacked(model.path)
        complexity = complexity_of(opened.portable, samples)
        return measure(opened.files, self._open(model), samples, self.recipe, complexity=complexity)

    def _open(self, model: Model) -> Runner:
        """The model, loaded on the runtime that it is judged on."""
        threads = self.recipe.benchmark.threads
        if model.format == ModelFormat.ENGINE:
            opened = _unpacked(model.path)
            engine, model = str(opened.manifest.engine), opened.files
        else:
            engine = "torch eager" if model.format == ModelFormat.TORCH else "onnxruntime"
        runner: Runner = engines.load(engine).open(model, threads)
        return runner

    def _together(self, source: Model, delivered: Model) -> SideBySide:
        """Source and delivered model timed in alternation, so that both figures are of the same minute."""
        self._progress(0.0, "timing source and result in alternation")
        settings = self.recipe.benchmark
        runners = [self._open(source), self._open(delivered)]
        times = side_by_side(runners, first(self._samples("evaluation"), settings.batches[0]), settings)
        return SideBySide(baseline_ms=percentiles(times[0]), delivered_ms=percentiles(times[1]))

    def _parity(self, model: Model, ctx: StageContext) -> Parity:
        outputs = run_in_batches(self._open(model).run, parity_inputs(self._samples("evaluation")))
        return parity(np.load(ctx.reference), outputs, tolerance=1.0)

    def _gate(self, baseline: Measurement, measurement: Measurement) -> list[GoalResult]:
        return [judge(goal, baseline, measurement) for goal in self.recipe.goals if goal.is_quality]

    def _report(
        self, baseline: Baseline, reports: list[StageReport], final: int | None, together: SideBySide | None
    ) -> Report:
        delivered = next((report.measurement for report in reports if report.position == final), None)
        goals = judge_all(self.recipe.goals, baseline.source, delivered, together)
        return Report(
            job=self.ticket.job_id,
            name=self.ticket.name,
            recipe=self.recipe,
            source_sha256=self.ticket.source_sha256,
            data_sha256=self.ticket.data_sha256,
            environment=self.environment,
            baseline=baseline,
            stages=reports,
            final=final,
            side_by_side=together,
            goals=goals,
            verdict=verdict(goals, delivered is not None),
            reason=_sentence(reports, final, goals),
        )

    # ------------------------------------------------------------ what it works with

    def _open_samples(self, part: str) -> Samples:
        ticket, recipe = self.ticket, self.recipe
        return open_samples(ticket.data, ticket.data_format, part, recipe.data, recipe.task)

    def _progress(self, fraction: float, message: str) -> None:
        now = time.monotonic()
        if now - self._told_at >= PROGRESS_SECONDS or fraction == 0:
            self._told_at = now
            fraction = min(max(fraction, 0.0), 1.0)
            self.mouth.tell(wire.Progressed(position=self.position, fraction=fraction, message=message[:500]))


@dataclass(frozen=True)
class Unpacked:
    """An engine's archive, opened."""

    manifest: archive.Manifest
    files: Model
    portable: Model


@lru_cache
def _unpacked(engine: Path) -> Unpacked:
    directory = _directory(f"unpacked/{engine.stem}")
    manifest = archive.read(engine, directory)
    return Unpacked(
        manifest,
        Model(ModelFormat.ENGINE, directory / manifest.entry, precision=manifest.precision),
        Model(ModelFormat.ONNX, directory / manifest.portable, precision=manifest.precision),
    )


def _why_missed(gate: list[GoalResult], held: Parity) -> str | None:
    """What the stage's result misses, as one sentence; None if nothing."""
    if not held.passed:
        return (
            f"its outputs differ from the source model's by {held.relative_error:.3g} of their largest value; "
            f"{held.tolerance:g} is accepted"
        )
    missed = [f"{result.goal.kind} of {result.goal.metric} is {result.goal.value:g}, reached {result.reached:.4g}"
              for result in gate if result.met is False]
    return "; ".join(missed) or None


def _sentence(reports: list[StageReport], final: int | None, goals: list[GoalResult]) -> str:
    if final is None:
        return "No stage left a model that could be delivered; the source model is the best there is."
    delivered = f"The model of stage {final} ({reports[final].kind}) is delivered"
    missed = [f"{result.goal.kind} of {result.goal.metric}" for result in goals if result.met is False]
    unknown = [f"{result.goal.kind} of {result.goal.metric}" for result in goals if result.met is None]
    if missed:
        return f"{delivered}, but it misses: {', '.join(missed)}."
    if unknown:
        return f"{delivered}; not evaluated: {', '.join(unknown)}."
    return f"{delivered}; it meets every goal." if goals else f"{delivered}; no goal was set."


def _files(report: StageReport, model: Model) -> list[wire.File]:
    """The model's files under the names that their owner downloads them by."""
    engine = model.format == ModelFormat.ENGINE
    files = []
    for role, path in model.files().items():
        variant = role.removeprefix("model").removesuffix(".weights")
        files.append(
            wire.File(
                role="engine" if engine else role,
                name=f"{report.position}-{report.kind}{variant}{path.suffix}",
                format=model.format.value if role == "model" else path.suffix.removeprefix("."),
                path=path,
            )
        )
    return files


def _directory(name: str) -> Path:
    path = Path(name)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _seed(seed: int) -> None:
    """The same random numbers in every attempt at a stage."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
