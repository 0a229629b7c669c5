"""One attempt at one job: fetch its files, spawn the child, commit what it finishes, and write how it ended.

The supervisor alone holds credentials and writes to the ledger and to storage; the child computes. No database
session is open while it does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sqlalchemy.exc import DataError, IntegrityError

from shared import checkpoints, lifecycle, timings
from shared.attempts import Cause
from shared.db import Sessions
from shared.errors import (
    Conflict,
    DatabaseUnavailable,
    DigestMismatch,
    LeaseLost,
    NotFound,
    ServiceError,
    StorageUnavailable,
)
from shared.faultpoints import reach
from shared.judging import judge_all, judge_target, verdict_of, verdict_of_target
from shared.ledger import Claim, Progress, Reason
from shared.log import get_logger
from shared.report import ArtifactNote, Baseline, Report, StageReport
from shared.settings import Settings
from shared.storage import Storage
from worker import wire
from worker.causes import cause_of
from worker.custody import Custody, Forged, OtherVersion
from worker.heart import Heart, StopCause
from worker.premises import Workplace
from worker.process import ChildProcess
from worker.wording import legible

T = TypeVar("T")
SEND_AGAIN = "Retry the job, with the file sent again first if it is one that you uploaded."
SUBMIT_AGAIN = "Submit the job again, with a recipe of this version."
INPUT_FAULTS: dict[type[ServiceError], tuple[str, str]] = {
    NotFound: ("input_missing", SEND_AGAIN),
    DigestMismatch: ("digest_mismatch", SEND_AGAIN),
    OtherVersion: (OtherVersion.code, SUBMIT_AGAIN),
}


@dataclass(frozen=True)
class Tools:
    """What every attempt of one worker uses.

    `pulse` is the same database by connections of its own, for what must be in time: none has to be waited for, or
    opened in a hurry. `hurried` is set when a worker that stops is not to wait for a stage.
    """

    settings: Settings
    sessions: Sessions
    pulse: Sessions
    storage: Storage
    threads: int
    memory_bytes: int
    hurried: threading.Event = field(default_factory=threading.Event)


def supervise(claim: Claim, tools: Tools, draining: threading.Event) -> str | None:
    """Run one claimed job to its end or until it must be given up; returns its new status, None if the lease is lost.

    `draining` is set when this worker is to stop: the attempt ends at the next finished stage, or after
    `drain_seconds`, and the job is given back.
    """
    directory = tools.settings.work_directory / f"{claim.lease.job_id}-{claim.attempt}"
    log = directory / f"attempt-{claim.attempt}.log"
    workplace = Workplace(directory)
    child = ChildProcess(
        directory,
        log,
        threads=tools.threads,
        memory_bytes=tools.memory_bytes,
        timing_lock=tools.settings.timing_lock,
    )
    heart = Heart(tools.sessions, tools.pulse, claim, tools.settings, log, child.kill)
    attempt = _Attempt(claim, tools, draining, child, heart, directory)
    with ExitStack() as afterwards:  # the last first, and each whatever the others raise
        afterwards.callback(workplace.vacate)
        afterwards.callback(child.close)
        afterwards.callback(heart.stop)
        afterwards.callback(child.kill)
        heart.start()
        try:
            status = attempt.run(workplace, log)
            attempt.custody.forget_stale_checkpoints()
        except LeaseLost:
            status = None
    get_logger().info("attempt_ended", job_id=str(claim.lease.job_id), attempt=claim.attempt, status=status)
    return status


@dataclass(frozen=True)
class _Ending:
    """How the attempt is to be written down."""

    status: lifecycle.Ending | Cause
    reason: Reason | None = None
    report: Report | None = None


class _Attempt:
    def __init__(
        self,
        claim: Claim,
        tools: Tools,
        draining: threading.Event,
        child: ChildProcess,
        heart: Heart,
        directory: Path,
    ) -> None:
        self.claim, self.tools, self.draining = claim, tools, draining
        self.child, self.heart = child, heart
        self.custody = Custody(claim, tools.storage, tools.sessions, directory, heart.heard, self._is_stopped)
        self.position: int | None = None
        self.drained_by = time.monotonic() + tools.settings.drain_seconds
        self.ticket: wire.Ticket
        self.baseline: Baseline | None = None
        self.committed: dict[int, StageReport] = {}

    def run(self, workplace: Workplace, log: Path) -> str:
        try:
            ending = self._work(workplace)
            if ending.report is None and self.heart.cause is not None:
                ending = self._stopped(self.heart.cause)
            status = self._write(ending, log)
        except (DataError, IntegrityError) as error:
            status = self._write(self._refused(error), log)
        reach("ending.committed")
        return status

    def _work(self, workplace: Workplace) -> _Ending:
        try:
            workplace.occupy()
            self.ticket = ticket = self._insist(lambda: self.custody.fetch(self.tools.threads, self._interrupted))
            self.committed = {done.report.position: done.report for done in ticket.finished}
            self.baseline = ticket.baseline
            reach("inputs.fetched")
            return self._listen(self.child.start(ticket))
        except InterruptedError:
            return self._crash("it was stopped before it began")
        except (NotFound, DigestMismatch, OtherVersion) as error:
            code, hint = INPUT_FAULTS[type(error)]
            return _Ending("failed", Reason(code, error.detail, hint))
        except StorageUnavailable as error:
            return _Ending("storage", Reason("storage_unavailable", error.detail))
        except OSError as error:
            cause = cause_of(error)
            code = "worker_files" if cause == "open_files" else "worker_disk"
            return _Ending(cause or "lost", Reason(code, f"The worker could not keep the job's files: {error}"))
        except (ValueError, Conflict) as error:
            told = legible(f"The job's process broke the protocol: {error}", wire.MAX_MESSAGE)
            return _Ending("failed", Reason("protocol_broken", told))

    def _interrupted(self) -> bool:
        self.heart.heard()  # a long download is no silent child
        return self._is_stopped()

    def _is_stopped(self) -> bool:
        self._stop_if_drained()
        return self.heart.cause is not None

    def _listen(self, ear: wire.Ear) -> _Ending:
        while True:
            self._stop_if_drained()
            if not self.child.readable(timeout_seconds=0.2):
                continue
            lines = ear.lines()
            if lines is None:
                return self._crash(self.child.death())
            for line in lines:
                ending = self._hear(wire.parse(line), ear)
                if ending is not None:
                    return ending

    def _stop_if_drained(self) -> None:
        if not self.draining.is_set():
            self.drained_by = time.monotonic() + self.tools.settings.drain_seconds
        elif self.tools.hurried.is_set() or time.monotonic() > self.drained_by:
            self.heart.end_child("drained")

    def _hear(self, said: wire.Said, ear: wire.Ear) -> _Ending | None:
        self.heart.heard()
        write = (self.tools.sessions, self.claim.lease)
        match said:
            case wire.Progressed():
                self.heart.carry(Progress(said.position, said.fraction, said.message))
            case wire.BaselineMeasured():
                self.baseline = said.baseline
                baseline = said.baseline.model_dump(mode="json")
                self._insist(lambda: lifecycle.record_baseline(*write, baseline))
                reach("baseline.committed")
                ear.answer({})
            case wire.StageStarted():
                self.position = said.position
                self._insist(lambda: lifecycle.start_stage(*write, said.position))
                reach("stage.started")
                ear.answer({})
            case wire.Checkpointed():
                self._keep(said, ear)
            case wire.Timed():
                self._keep_timings(said, ear)
            case wire.StageFinished():
                self._commit(said, ear)
            case wire.Finished():
                return self._accept(said.report)
            case wire.Failed():
                reason = Reason(said.code, said.message, said.hint, said.position, said.fault)
                return _Ending(said.cause or "failed", reason)
        return None

    def _keep(self, said: wire.Checkpointed, ear: wire.Ear) -> None:
        if said.position != self.position:
            raise Forged(f"it kept a checkpoint of stage {said.position}, which does not run")
        stored = self.custody.store_checkpoint(said)
        reach("checkpoint.stored")
        self._insist(lambda: checkpoints.keep(self.tools.sessions, self.claim.lease, said.position, stored))
        reach("checkpoint.committed")
        self.custody.forget_stale_checkpoints()
        if self.draining.is_set():
            self.heart.end_child("drained")
        ear.answer({})

    def _keep_timings(self, said: wire.Timed, ear: wire.Ear) -> None:
        stored = self.custody.store_timings(said)
        if stored is not None:
            self._insist(lambda: timings.keep(self.tools.sessions, self.claim.lease, stored))
        ear.answer({})

    def _commit(self, said: wire.StageFinished, ear: wire.Ear) -> None:
        stored = self.custody.store(said)
        notes = [ArtifactNote.model_validate(file, from_attributes=True) for file in stored]
        report = said.report.model_copy(update={"artifacts": notes})
        position, told = report.position, report.model_dump(mode="json")
        self.heart.forget()
        reach("stage.stored")
        self._insist(
            lambda: lifecycle.finish_stage(
                *(self.tools.sessions, self.claim.lease, position, report.status, told, stored),
                cache_key=self.custody.cache_key(position),
            )
        )
        reach("stage.committed")
        self.custody.forget_stale_checkpoints()
        self.committed[position] = report
        self.position = None
        if self.draining.is_set():
            self.heart.end_child("drained")
        ear.answer({"artifacts": told["artifacts"]})

    def _accept(self, report: Report) -> _Ending:
        """The child's report, if it tells of this job, of the stages as they were committed, and judges rightly."""
        told = [(stage.position, stage.status, stage.artifacts) for stage in report.stages]
        known = [(stage.position, stage.status, stage.artifacts) for _, stage in sorted(self.committed.items())]
        if told != known:
            raise Forged("its report differs from what was committed stage by stage")
        ticket = self.ticket
        facts = (report.job, report.recipe, report.source_sha256, report.data_sha256)
        if facts != (ticket.job_id, ticket.recipe, ticket.source_sha256, ticket.data_sha256):
            raise Forged("its report is of another job")
        if report.baseline != self.baseline:
            raise Forged("its report compares with another baseline than it measured")
        self._check_judgement(report)
        return _Ending("succeeded", report=report)

    def _check_judgement(self, report: Report) -> None:
        """Goals and verdict again, from the report's own figures. Raises Forged."""
        goals, baseline = self.ticket.recipe.goals_in_force, report.baseline.source
        delivered = next((stage for stage in report.stages if stage.position == report.final), None)
        results = judge_all(goals, baseline, delivered)
        right = report.goals == results and report.verdict == verdict_of(baseline, delivered, results)
        for target in delivered.targets if delivered is not None else []:
            own = judge_target(goals, baseline, target)
            right &= target.goals == own and target.verdict == verdict_of_target(target, baseline, own)
        if not right:
            raise Forged("its report does not judge by its own figures")

    def _crash(self, death: str, cause: Cause = "crashed") -> _Ending:
        position = "before the first stage" if self.position is None else f"in stage {self.position}"
        reason = Reason(
            "child_crashed",
            f"The job's process ended {position}: {death}.",
            "Look at the job's log. Out of memory: use a smaller batch or model, or a larger worker.",
            self.position,
        )
        return _Ending(cause, reason)

    def _stopped(self, cause: StopCause) -> _Ending:
        match cause:
            case "cancelled":
                return _Ending("cancelled", Reason("cancelled", "Cancelled while it ran.", fault="user"))
            case "overdue":
                told = ("timeout", "The job ran into its time limit.", "Raise timeout_seconds.")
                return _Ending("failed", Reason(*told, stage=self.position, fault="user"))
            case "stalled":
                silence = f"it gave no sign of life for {self.tools.settings.stall_seconds:g} s"
                return self._crash(silence, "stalled")
            case "drained":
                reason = Reason("worker_stopping", "The worker was stopped; the job goes on with the next one.")
                return _Ending("given_back", reason)
            case "lease_lost":
                raise LeaseLost

    def _refused(self, error: DataError | IntegrityError) -> _Ending:
        """The database does not take what the child said: a lie that nothing before it knew of, or a fault of ours."""
        get_logger().error("ledger_refused", job_id=str(self.claim.lease.job_id), exc_info=error)
        told = legible(f"The ledger could not keep what the job's process said: {error.orig}", wire.MAX_MESSAGE)
        return _Ending("failed", Reason("internal_error", told, stage=self.position))

    def _write(self, ending: _Ending, log: Path) -> str:
        """Write the ending to the ledger, with the files that go with it; returns the job's new status."""
        stored = self.custody.store_log(log)
        if ending.report is not None or ending.status == "failed":
            stored += self.custody.store_picture()
        if ending.report is not None:
            try:
                stored.append(self.custody.store_report(ending.report))
            except StorageUnavailable as error:
                ending = _Ending("storage", Reason("storage_unavailable", error.detail))
        self.heart.rest()
        reach("ending.stored")
        report = None if ending.report is None else ending.report.model_dump(mode="json")
        reason = ending.reason or Reason("done", "The job is done.")
        write = (self.tools.sessions, self.claim.lease)
        match ending.status:
            case "succeeded" | "failed" | "cancelled" as status:
                self._insist(lambda: lifecycle.settle(*write, status, ending.reason, report, stored))
                return status
            case cause:
                delay_seconds = self.tools.settings.retry_delay_seconds
                return self._insist(
                    lambda: lifecycle.requeue(*write, reason, cause=cause, delay_seconds=delay_seconds, stored=stored)
                )

    def _insist(self, write: Callable[[], T]) -> T:
        """Write to the ledger, again while the database is away, until the lease or the worker is given up."""
        while True:
            try:
                return write()
            except DatabaseUnavailable:
                if self.heart.is_lost or self.tools.hurried.is_set():
                    raise LeaseLost from None
                threading.Event().wait(self.tools.settings.heartbeat_seconds)
