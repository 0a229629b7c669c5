"""The child's work: measure the baseline, walk the recipe, gate each stage, write the report.

Files stay in this process's directory; the supervisor commits each finished stage before the next begins.
"""

from __future__ import annotations

import logging
import random
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from shared.errors import StageFailed, UserError
from shared.judging import judge_all, verdict_of
from shared.recipe import ExportOnnx, ModelFormat, Quantize, Recipe, Stage
from shared.report import Baseline, Measurement, Report, StageReport
from worker import stages, wire
from worker.causes import MachineFault, cause_of
from worker.cleanup import clean, refuse_quantized
from worker.context import Model, StageContext, StageResult
from worker.data import Samples, open_samples
from worker.engines import Runner
from worker.environment import environment
from worker.evaluation.agreement import keep_reference
from worker.evaluation.plausibility import check_expectations
from worker.evaluation.preview import write_preview
from worker.figures import Figures, holds, open_model
from worker.gating import gated, may_be_delivered
from worker.handover import built_of, directory, files_of, rebuilt_of
from worker.loading import open_source, others_of
from worker.memory import Memory, Timings
from worker.presets import resolved
from worker.rejudging import has_bounds, judged_again, still_chosen, unpaid_before, within_tolerance
from worker.vetting import load_onnx_checked
from worker.wording import headline, legible, warnings_of

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
        told = "The model does not fit into the worker's memory."
        mouth.tell(pipeline.failure("out_of_memory", told, hint, cause="out_of_memory"))
    except Exception as error:
        logging.exception("a fault of the service")
        told = f"The service failed at this job: {type(error).__name__}: {error}"
        hint = "The job's log has the trace."
        mouth.tell(pipeline.failure("internal_error", told, hint, "platform", cause_of(error)))


class Pipeline:
    """One attempt at one recipe."""

    def __init__(self, ticket: wire.Ticket, mouth: wire.Mouth) -> None:
        self.ticket, self.recipe, self.mouth = ticket, ticket.recipe, mouth
        self.others: tuple[str, ...] = ()  # the network's inputs beside the images
        self.position: int | None = None
        self.environment = environment()
        self._told_at = 0.0
        self._samples = lru_cache(self._open_samples)
        self._source_graph = lru_cache(self._clean_source_graph)

    def run(self) -> Report:
        """Raises UserError where the model, the data or the recipe is at fault."""
        source = self.source = self._source()
        self._check_calibration()
        reference = self._reference(source)
        self.figures = Figures(self.recipe, self._samples, source, reference, self._source_graph, self._progress)
        write_preview(self._samples("evaluation"), self.recipe.data.preprocessing, Path(wire.PICTURE))
        baseline = self._baseline()
        check_expectations(self.recipe, baseline.source)
        network = source if source.format == ModelFormat.TORCH else None
        cached_stages = self.ticket.cached.stages if self.ticket.cached is not None else []
        model, final, reports = source, None, []
        for position, stage in enumerate(self.recipe.stages):
            done, cached = _of(position, self.ticket.finished), _of(position, cached_stages)
            reused = self._reused(cached, stage, baseline) if cached is not None and done is None else None
            if cached is not None and (reused is None or reused[0].status != cached.report.status):
                cached_stages = []  # what follows was made of another model
            if done is not None:
                report, result = self._restored(done, stage, baseline, self.ticket.baseline)
            elif reused is not None:
                report, result = reused
            elif stage.consumes != model.format:
                report, result = self._skipped(position, stage, model), None
            else:
                self.position = position
                context = self._context(position, source, reference, baseline.source, network)
                report, result = self._stage(position, stage, model, context)
            reports.append(report)
            if result is not None and report.status in ("succeeded", "cached"):
                model = result
                final = position if may_be_delivered(report, self.recipe) else final
                network = model if model.format == ModelFormat.TORCH else network
                if (trained := model.trained()) is not None:
                    reference = self._reference(trained, position)
        self.position = None
        return self._report(baseline, reports, final)

    def failure(
        self, code: str, message: str, hint: str | None, fault: str = "user", cause: MachineFault | None = None
    ) -> wire.Failed:
        """The job's end in so many words as may be said: an error can quote all of a stranger's file."""
        words = {
            "code": legible(code, wire.MAX_CODE),
            "message": legible(message, wire.MAX_MESSAGE),
            "hint": None if hint is None else legible(hint, wire.MAX_HINT),
        }
        return wire.Failed.model_validate({"position": self.position, "fault": fault, "cause": cause, **words})

    # ------------------------------------------------------------ the baseline

    def _source(self) -> Model:
        """The source model, vetted; and what the recipe leaves to it and to its libraries, settled."""
        data = self.recipe.data.model_copy(update={"preprocessing": resolved(self.recipe.data.preprocessing)})
        self.recipe = self.recipe.model_copy(update={"data": data})
        source = open_source(self.ticket.source, self.recipe.source, directory("baseline"))
        self.others = others_of(source)
        if source.precision != "fp32" and any(isinstance(stage, Quantize) for stage in self.recipe.stages):
            refuse_quantized(load_onnx_checked(source.path))
        return source

    def _check_calibration(self) -> None:
        """Read what will calibrate before hours of work rest on it."""
        for stage in self.recipe.stages:
            if isinstance(stage, Quantize) and "calibration" in stage.parts():
                samples = self._samples("calibration")
                samples.check(samples.draw(stage.calibration_samples, self.recipe.seed))

    def _reference(self, network: Model, position: int | None = None) -> Path:
        """Raw outputs on some evaluation samples, for the stages to come to be compared with.

        They are the source model's until a stage trains: int8 and engines must agree with the network that was
        trained, and whether that is as good as the source is what its metrics tell.
        """
        path = directory("baseline") / ("source.npy" if position is None else f"stage-{position}.npy")
        runner = open_model(network, self.recipe.benchmark.threads)
        goals = self.recipe.goals_in_force if position is None else ()
        if keep_reference(runner, self._samples("evaluation"), path, goals=goals):
            return path
        if position is None:
            raise StageFailed(
                "The source model puts out NaN or infinite values on the evaluation samples.",
                hint="Check its weights, and that preprocessing is what it was trained with.",
                code="source_not_finite",
            )
        raise StageFailed(
            f"What stage {position} trained puts out NaN or infinite values on the evaluation samples.",
            hint="Use a lower learning rate, or on_miss: keep_best, which drops such a stage.",
            code="diverged",
        )

    def _baseline(self) -> Baseline:
        cached = self.ticket.cached.baseline if self.ticket.cached is not None else None
        for known in (self.ticket.baseline, cached):
            if known is not None and holds(known, self.recipe, self.environment):
                if known is not self.ticket.baseline:
                    self.mouth.ask(wire.BaselineMeasured(baseline=known))
                return known
        baseline = self.figures.baseline(self.environment)
        self.mouth.ask(wire.BaselineMeasured(baseline=baseline))
        return baseline

    def _clean_source_graph(self) -> tuple[Model, Runner]:
        """The source model as cleaned fp32 ONNX, in ONNX Runtime: what every speedup is told against as well."""
        if self.source.format == ModelFormat.TORCH:
            words = next((stage for stage in self.recipe.stages if stage.kind == "export_onnx"), ExportOnnx())
            graph = self._exported_source(words).model
        else:
            graph = Model(ModelFormat.ONNX, directory("baseline/onnx") / "clean.onnx", precision=self.source.precision)
            clean(self.source.path, graph.path)
        return graph, self.figures.open(graph)

    @lru_cache  # noqa: B019  (a pipeline lives as long as its process)
    def _exported_source(self, words: ExportOnnx) -> StageResult:
        context = self._context(None, self.source, self.figures.source_outputs, None)
        result: StageResult = stages.load("export_onnx").run(words, self.source, context)
        return result

    # ------------------------------------------------------------ the stages

    def _stage(self, position: int, stage: Stage, model: Model, ctx: StageContext) -> tuple[StageReport, Model | None]:
        self.mouth.ask(wire.StageStarted(position=position))
        logging.info("stage %d: %s", position, stage.kind)
        begin = time.monotonic()
        _seed(self.recipe.seed)
        try:
            result = self._run_stage(stage, model, ctx)
        except StageFailed as error:
            if error.code not in DROPPED_AS or stage.on_miss != "keep_best" or model is ctx.source:
                raise
            return self._unmade(position, stage, "dropped", error.detail, time.monotonic() - begin), None
        self._progress(0.9, "evaluating and measuring")
        row = result.measurement or self.figures.of(result.model)
        if position == len(self.recipe.stages) - 1 and result.measurement is None:
            row = self.figures.finished(row, result.model)
        agreement = result.agreement or self.figures.agreement(result.model, ctx.reference)
        report = StageReport(
            position=position,
            kind=stage.kind,
            status="succeeded",
            seconds=time.monotonic() - begin,
            measurement=row,
            agreement=agreement,
            candidates=result.candidates,
            targets=result.targets,
            details={**result.details, **built_of(result.model)},
        )
        assert ctx.baseline is not None
        report = gated(report, self.recipe, ctx.baseline, result.unpaid)
        return self._commit(report, result.model), result.model

    def _run_stage(self, stage: Stage, model: Model, ctx: StageContext) -> StageResult:
        if isinstance(stage, ExportOnnx) and model is ctx.source:
            return self._exported_source(stage)  # as it was exported to be timed
        result: StageResult = stages.load(stage.kind).run(stage, model, ctx)
        return result

    def _unmade(
        self, position: int, stage: Stage, status: Literal["dropped", "skipped"], reason: str, seconds: float
    ) -> StageReport:
        """The stage made nothing of the last good model: that goes on."""
        report = StageReport(position=position, kind=stage.kind, status=status, reason=reason, seconds=seconds)
        return self._commit(report, None)

    def _skipped(self, position: int, stage: Stage, model: Model) -> StageReport:
        reason = f"it needs {stage.consumes}, but the last good model is {model.format}"
        self.mouth.ask(wire.StageStarted(position=position))
        return self._unmade(position, stage, "skipped", reason, 0)

    def _commit(self, report: StageReport, model: Model | None) -> StageReport:
        return self._tell(report, [] if model is None else files_of(report, model))

    def _tell(self, report: StageReport, files: list[wire.File]) -> StageReport:
        answer = self.mouth.ask(wire.StageFinished(report=report, files=files))
        return StageReport.model_validate({**report.model_dump(), "artifacts": answer["artifacts"]})

    def _reused(
        self, cached: wire.FinishedStage, stage: Stage, baseline: Baseline
    ) -> tuple[StageReport, Model | None] | None:
        """A stage that an earlier job finished, as this job's own, judged by this job's goals.

        Measured again if that was on another machine. None where this job would have made something else of it.
        """
        assert self.ticket.cached is not None
        report = cached.report
        if not still_chosen(report, self.recipe, baseline.source) or not within_tolerance(report, stage):
            return None
        self.position = report.position
        self.mouth.ask(wire.StageStarted(position=report.position))
        logging.info("stage %d: %s, from the cache", report.position, stage.kind)
        begin = time.monotonic()
        report, model = self._restored(cached, stage, baseline, self.ticket.cached.baseline)
        if report.measurement is not None and not report.targets:
            unpaid = unpaid_before(cached.report, self.recipe)
            succeeded = report.model_copy(update={"status": "cached"})
            report = gated(succeeded, self.recipe, baseline.source, unpaid)
        files = [
            wire.File(role=note.role, name=note.name, format=note.format, path=cached.files[note.role])
            for note in report.artifacts
        ]
        fresh = {"seconds": time.monotonic() - begin, "artifacts": []}
        return self._tell(report.model_copy(update=fresh), files), model

    def _restored(
        self, done: wire.FinishedStage, stage: Stage, baseline: Baseline, measured_with: Baseline | None
    ) -> tuple[StageReport, Model | None]:
        """A stage that is finished, measured again if its figures belong to another baseline or lack a goal's bound."""
        report = done.report
        if report.measurement is None:
            return report, None
        path = done.files["engine" if stage.produces == ModelFormat.ENGINE else "model"]
        model = Model(stage.produces, path, **rebuilt_of(report.details, done.files))
        if baseline == measured_with and has_bounds(report.measurement, self.recipe):
            if not report.targets:
                return report, model
            targets = [judged_again(target, self.recipe, baseline.source) for target in report.targets]
            return report.model_copy(update={"targets": targets, "candidates": targets[0].candidates}), model
        if "cached_from" in report.details:
            origin = {**report.details["cached_from"], "measured_again": True}
            report = report.model_copy(update={"details": {**report.details, "cached_from": origin}})
        if report.targets:
            return self._remeasured(report, done.files, baseline), model
        return report.model_copy(update={"measurement": self.figures.of(model)}), model

    def _remeasured(self, report: StageReport, files: dict[str, Path], baseline: Baseline) -> StageReport:
        """A build stage's engines measured on this machine, those of them that were run where they were built."""
        targets = list(report.targets)
        for position, target in enumerate(report.targets):
            if target.evaluated:
                path = files["engine" if position == 0 else f"engine.{target.target}"]
                engine = Model(ModelFormat.ENGINE, path, precision=str(target.precision))
                row = self.figures.finished(self.figures.of(engine), engine)
                measured = target.model_copy(update={"measurement": row})
                targets[position] = judged_again(measured, self.recipe, baseline.source)
        first_target = {"measurement": targets[0].measurement, "candidates": targets[0].candidates}
        return report.model_copy(update={"targets": targets, **first_target})

    # ------------------------------------------------------------ measuring and judging

    def _context(
        self,
        position: int | None,
        source: Model,
        reference: Path,
        baseline: Measurement | None,
        network: Model | None = None,
    ) -> StageContext:
        return StageContext(
            recipe=self._as_seen(position),
            directory=directory("baseline/onnx" if position is None else f"stages/{position}"),
            samples=self._samples,
            source=source,
            reference=reference,
            evaluate=partial(self.figures.evaluations.of, reference),
            onnxruntime=self._source_graph,
            baseline=baseline,
            progress=lambda fraction, message="": self._progress(0.9 * fraction, message),
            checkpoints=Memory(-1 if position is None else position, self.mouth, self.ticket.checkpoints),
            timings=Timings(self.mouth, self.ticket.timings),
            seed=self.recipe.seed,
            threads=self.ticket.threads,
            network=network,
        )

    def _as_seen(self, position: int | None) -> Recipe:
        """The recipe as far as a stage may depend on it: without the stages after it, unless it looks ahead."""
        if position is None or self.recipe.stages[position].looks_ahead:
            return self.recipe
        return self.recipe.model_copy(update={"stages": self.recipe.stages[: position + 1]})

    def _report(self, baseline: Baseline, reports: list[StageReport], final: int | None) -> Report:
        delivered = next((report for report in reports if report.position == final), None)
        goals = judge_all(self.recipe.goals_in_force, baseline.source, delivered)
        verdict = verdict_of(baseline.source, delivered, goals)
        return Report(
            job=self.ticket.job_id,
            name=self.ticket.name,
            recipe=self.ticket.recipe,
            preprocessing=self.recipe.data.preprocessing,
            source_sha256=self.ticket.source_sha256,
            data_sha256=self.ticket.data_sha256,
            environment=self.environment,
            baseline=baseline,
            stages=reports,
            final=final,
            goals_assumed=not self.recipe.goals,
            goals=goals,
            verdict=verdict,
            reason=headline(self.recipe, baseline, reports, final, goals),
            warnings=[*baseline.doubts, *warnings_of(reports)],
        )

    # ------------------------------------------------------------ what it works with

    def _open_samples(self, part: str) -> Samples:
        ticket, recipe = self.ticket, self.recipe
        return open_samples(ticket.data, ticket.data_format, part, recipe.data, recipe.task, self.others)

    def _progress(self, fraction: float, message: str) -> None:
        now = time.monotonic()
        if now - self._told_at >= PROGRESS_SECONDS or fraction == 0:
            self._told_at = now
            fraction, message = min(max(fraction, 0.0), 1.0), legible(message, wire.MAX_PROGRESS)
            self.mouth.tell(wire.Progressed(position=self.position, fraction=fraction, message=message))


def _of(position: int, stages: list[wire.FinishedStage]) -> wire.FinishedStage | None:
    return next((done for done in stages if done.report.position == position), None)


def _seed(seed: int) -> None:
    """The same random numbers in every attempt at a stage."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
