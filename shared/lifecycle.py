"""The ledger: the only file that changes a job's status.

    submit ──> queued ──claim──> running ──settle──> succeeded | failed | cancelled
                 ^  └──cancel──> cancelled   │
                 └──────────requeue──────────┘   (or the job's end, as shared/attempts.py judges)

Every function owns one transaction and writes the job's next event in it. What a worker writes is fenced by the
token of its lease, and its events bear it: zero rows mean that the worker was replaced, or that it wrote the same
before and only the answer was lost, which its event tells. The database's clock is the only clock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from sqlalchemy import Row, TextClause, func, select, text, update
from sqlalchemy.orm import Session
from uuid6 import uuid7

from shared import entries, quarantine, quotas, replays
from shared.attempts import RETRIES, Attempt, Cause, judge
from shared.db import Sessions, resolved, statements, transaction
from shared.errors import LeaseLost, NotFound
from shared.fairness import NEXT_JOB
from shared.faultpoints import reach
from shared.ledger import Capacity, Claim, Heartbeat, Lease, Order, Progress, Reason, Stored
from shared.models import Job, StageRun

Ending = Literal["succeeded", "failed", "cancelled"]

# ---------------------------------------------------------------- the owner's side

SUBMIT = text(f"""
    WITH {quotas.ROOM}, remembered AS (
        INSERT INTO idempotency_keys (account_id, key, request_sha256, job_id)
        SELECT :account_id, :key, :request_sha256, :id FROM room WHERE CAST(:key AS text) IS NOT NULL
        ON CONFLICT DO NOTHING
        RETURNING job_id
    ), job AS (
        INSERT INTO jobs (id, account_id, name, tags, recipe, requires, required_memory_bytes, queue, priority,
                          retry_of, input_sha256, use_cache, max_attempts, timeout_seconds, last_sequence)
        SELECT :id, :account_id, :name, :tags, CAST(:recipe AS jsonb), :requires, :required_memory_bytes, :queue,
               :priority, CAST(:retry_of AS uuid), :input_sha256, :use_cache, :max_attempts, :timeout_seconds, 1
        FROM room WHERE CAST(:key AS text) IS NULL OR EXISTS (SELECT FROM remembered)
        ON CONFLICT (id) DO NOTHING
        RETURNING id
    ), stages AS (
        INSERT INTO stage_runs (job_id, position, kind)
        SELECT job.id, kinds.number - 1, kinds.kind
        FROM job, unnest(CAST(:kinds AS text[])) WITH ORDINALITY AS kinds (kind, number)
    ), event AS (
        INSERT INTO job_events (job_id, sequence, attempt, kind) SELECT id, 1, 0, 'submitted' FROM job
    )
    SELECT id FROM job
""")


def submit(
    sessions: Sessions, order: Order, idempotency_key: str | None = None, max_active_jobs: int | None = None
) -> tuple[UUID, bool]:
    """Write a job, its stages, its first event and its idempotency key; returns (job id, whether it is new).

    Raises:
        IdempotencyConflict: the key was used for another request.
        TooManyJobs: the account has its limit of active jobs, by default `max_active_jobs`.
    """
    job_id = uuid7()
    sent = {"id": job_id, "key": idempotency_key, "request_sha256": order.digest(), **order.values()}

    def write() -> tuple[UUID, bool]:
        with statements(sessions) as connection:
            reach("submit.begun")
            if connection.scalar(SUBMIT, {**sent, "max_active_jobs": max_active_jobs}) is not None:
                reach("submit.committed")
                return job_id, True
            if (earlier := replays.find(connection, sent)) is not None:
                return earlier, earlier == job_id
            quotas.demand_job(connection, order.account_id, max_active_jobs)
        return write()  # in this moment room was made, or the key's job was so old that it was forgotten

    return resolved(write)


def cancel(sessions: Sessions, account_id: UUID, job_id: UUID) -> str:
    """Ask for a job's end; a queued one ends at once, an ended one stays as it is. Returns its status.

    Raises:
        NotFound: the account has no such job.
    """
    mine = [Job.id == job_id, Job.account_id == account_id]

    def write() -> str:
        with transaction(sessions) as session:
            # Locked first: between a look and a write, a worker could take the job or give it back.
            found = select(Job.status, Job.cancel_requested_at).where(*mine).with_for_update()
            job = session.execute(found).one_or_none()
            if job is None:
                raise NotFound(f"there is no job {job_id}")
            if job.status == "queued":
                _end(session, mine, "cancelled", Reason("cancelled", "Cancelled while it waited.", fault="user"))
                return "cancelled"
            if job.status == "running" and job.cancel_requested_at is None:
                entries.change(session, mine, {"cancel_requested_at": func.now()}, "cancel_requested")
            return str(job.status)

    return resolved(write)


# ---------------------------------------------------------------- the worker's side

CLAIM = text(f"""
    WITH RECURSIVE {NEXT_JOB}, claimed AS (
        UPDATE jobs SET status = 'running', attempt = attempt + 1, worker_id = :worker_id, lease_token = :token,
                        lease_expires_at = now() + make_interval(secs => :lease_seconds),
                        started_at = coalesce(started_at, now()), state_reason = NULL,
                        last_sequence = last_sequence + 1
        FROM chosen WHERE jobs.id = chosen.id
        RETURNING jobs.id, account_id, name, queue, attempt, recipe, baseline, use_cache, last_sequence
    ), event AS (
        INSERT INTO job_events (job_id, sequence, attempt, lease_token, kind, data)
        SELECT id, last_sequence, attempt, :token, 'claimed', jsonb_build_object('worker', CAST(:worker_id AS text))
        FROM claimed
    )
    SELECT id, account_id, name, queue, attempt, recipe, baseline, use_cache FROM claimed
""")
CLAIMED = text("""
    SELECT id, account_id, name, queue, attempt, recipe, baseline, use_cache FROM jobs
    WHERE status = 'running' AND lease_token = :token
""")


def claim(sessions: Sessions, capacity: Capacity, lease_seconds: float) -> Claim | None:
    """Take the best job that this worker can do: fair between accounts, then priority, then age.

    Fair: first whoever has the fewest jobs running, then whoever was last served the longest ago. Who watches the job
    is for the caller to tell.
    """
    token = uuid4()
    parameters = {
        "queues": list(capacity.queues),
        "capabilities": list(capacity.capabilities),
        "memory_bytes": capacity.memory_bytes,
        "worker_id": capacity.worker_id,
        "token": token,
        "lease_seconds": lease_seconds,
    }

    asked_at: list[float] = []  # once there is a connection, which may be long in coming

    def ask(statement: TextClause) -> Row[Any] | None:
        with statements(sessions) as connection:
            asked_at.append(time.monotonic())
            return connection.execute(statement, parameters).one_or_none()

    # A claim that is still being committed as it is looked for is not found: its lease lapses.
    row = resolved(lambda: ask(CLAIM), lambda: ask(CLAIMED))
    if row is None:
        return None
    return Claim(Lease(row.id, token), asked_at[0], *list(row)[1:])


def heartbeat(
    sessions: Sessions, lease: Lease, lease_seconds: float, progress: Progress | None = None, log: str = ""
) -> Heartbeat:
    """Renew a lease and hear whether to stop, in one round trip; then `tell` what there is to tell.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    overdue = Job.started_at + func.make_interval(0, 0, 0, 0, 0, 0, Job.timeout_seconds) < func.now()
    until = {"lease_expires_at": func.now() + timedelta(seconds=lease_seconds)}
    renewed = update(Job).where(*entries.held(lease)).values(until)
    with statements(sessions) as connection:
        row = connection.execute(renewed.returning(Job.cancel_requested_at, overdue, Job.last_sequence)).one_or_none()
    if row is None:
        raise LeaseLost
    tell(sessions, lease, progress, log)
    return Heartbeat(cancel_requested=row[0] is not None, overdue=bool(row[1]), last_sequence=row[2])


def tell(sessions: Sessions, lease: Lease, progress: Progress | None, log: str) -> None:
    """Write what is new of the running stage's progress and of the log. Raises LeaseLost.

    Each by one statement of its own: a heartbeat must not wait for the job's row.
    """
    if progress is None and not log:
        return
    with statements(sessions) as connection:
        if log:
            entries.fenced(connection, lease, "log", {"text": log})
        if progress is not None:
            told = {"stage": progress.position, "fraction": round(progress.fraction, 4), "message": progress.message}
            entries.fenced(connection, lease, "progress", told)
            entries.show_progress(connection, lease, progress)


def record_baseline(sessions: Sessions, lease: Lease, baseline: dict[str, Any]) -> None:
    """Keep the measured baseline, so that another attempt compares with the same one. Raises LeaseLost."""
    entries.once(sessions, lease, {"baseline": baseline}, "baseline_measured", {})


def start_stage(sessions: Sessions, lease: Lease, position: int) -> None:
    """Mark a stage as running. Raises LeaseLost, or Conflict if there is no such stage to run."""
    started = {"status": "running", "started_at": func.now(), "progress": 0.0}
    entries.once(sessions, lease, {}, "stage_started", {"stage": position}, entries.StageChange(position, started))


def finish_stage(
    sessions: Sessions,
    lease: Lease,
    position: int,
    status: str,
    report: dict[str, Any],
    stored: Sequence[Stored],
    cache_key: str | None = None,
) -> None:
    """Commit a stage's end together with the rows that point to its files. It is progress: crashes count anew.

    Raises:
        LeaseLost, Conflict: the job is no longer this worker's, or there is no such stage to finish.
    """
    ended = {"status": status, "report": report, "progress": 1.0, "finished_at": func.now(), "cache_key": cache_key}
    told = {"stage": position, "status": status, "reason": report.get("reason")}
    change = entries.StageChange(position, ended, stored)
    entries.once(sessions, lease, {"crashes": 0}, "stage_finished", told, change)


def standing(session: Session, lease: Lease) -> tuple[UUID, int]:
    """Whose the job is, and the attempt's number, as they stand now; `fence` is what makes sure. Raises LeaseLost."""
    row = session.execute(select(Job.account_id, Job.attempt).where(*entries.held(lease))).one_or_none()
    if row is None:
        raise LeaseLost
    return row.account_id, row.attempt


def fence(session: Session, lease: Lease, *, is_progress: bool = False) -> None:
    """Hold the job until the caller's transaction ends, its crashes counted anew if it is progress. Raises LeaseLost.

    The last before the commit: until then heartbeats wait, for one round trip.
    """
    values = {"crashes": 0 if is_progress else Job.crashes}
    if session.scalar(update(Job).where(*entries.held(lease)).values(values).returning(Job.id)) is None:
        raise LeaseLost


def settle(
    sessions: Sessions,
    lease: Lease,
    status: Ending,
    reason: Reason | None = None,
    report: dict[str, Any] | None = None,
    stored: Sequence[Stored] = (),
) -> None:
    """Write the one terminal status, with the report and the last files. Raises LeaseLost."""

    def write() -> None:
        with transaction(sessions) as session:
            if not _end(session, entries.held(lease), status, reason, report, lease):
                entries.left_as(session, lease, status)
                return
            entries.point_to(session, lease.job_id, stored)
            if status == "succeeded":
                quarantine.lift(session, lease.job_id)

    resolved(write)


def requeue(
    sessions: Sessions,
    lease: Lease,
    reason: Reason,
    *,
    cause: Cause,
    delay_seconds: float = 0,
    stored: Sequence[Stored] = (),
) -> str:
    """Return a job for another attempt after a fault of the platform; returns its new status.

    It fails instead when its attempts are used up, or when it crashed too often without progress (quarantine), and
    ends as cancelled if that was asked. `delay_seconds` is what the cause's patience multiplies, jittered.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """

    def write() -> str:
        with transaction(sessions) as session:
            status = _requeue(session, entries.held(lease), reason, cause, delay_seconds, stored, lease)
            return status or entries.left_as(session, lease, "queued", "failed", "cancelled")

    return resolved(write)


# ---------------------------------------------------------------- the sweeper's side


def sweep_leases(sessions: Sessions, limit: int = 100, delay_seconds: float = 0) -> int:
    """Requeue jobs whose worker has let the lease lapse; returns how many. `delay_seconds`: as for requeue."""
    lapsed = [Job.status == "running", Job.lease_expires_at < func.now()]
    reason = Reason("worker_lost", "The worker that ran the job stopped answering.")
    with transaction(sessions) as session:
        due = session.scalars(select(Job.id).where(*lapsed).order_by(Job.lease_expires_at).limit(limit)).all()
    swept = 0
    for job_id in due:  # one by one, each looked at again: its worker, or another sweeper, may have been faster
        with transaction(sessions) as session:
            swept += _requeue(session, [*lapsed, Job.id == job_id], reason, "lost", delay_seconds) is not None
    return swept


def explain_waiting(sessions: Sessions, job_id: UUID, reason: Reason | None) -> None:
    """Say on a queued job why it waits, or that nothing holds it up any more."""
    told = reason.as_dict() if reason else None
    current = Job.state_reason.is_not(None) if reason is None else Job.state_reason.is_distinct_from(told)
    with transaction(sessions) as session:
        waits = [Job.id == job_id, Job.status == "queued", current]
        entries.change(session, waits, {"state_reason": told}, "waiting", told)


# ---------------------------------------------------------------- how a row changes


def _requeue(
    session: Session,
    holds: entries.Where,
    reason: Reason,
    cause: Cause,
    delay_seconds: float = 0,
    stored: Sequence[Stored] = (),
    lease: Lease | None = None,
) -> str | None:
    """The job's new status; None if no row matched. Without a lease, one that is being written is passed over."""
    facts = select(Job.id, Job.attempt, Job.max_attempts, Job.crashes, Job.cancel_requested_at)
    job = session.execute(facts.where(*holds).with_for_update(skip_locked=lease is None)).one_or_none()
    if job is None:
        return None
    entries.point_to(session, job.id, stored)
    marked_by = quarantine.put_by(session, job.id) if RETRIES[cause].blames_input else None
    cancelled = job.cancel_requested_at is not None
    attempt = Attempt(job.attempt, job.max_attempts, job.crashes, cancelled, marked_by)
    outcome = judge(attempt, cause, reason, delay_seconds)
    if outcome.status != "queued":
        _end(session, holds, outcome.status, outcome.reason, None, lease)
        if outcome.quarantines:
            quarantine.put(session, job.id)
        return outcome.status
    values = {
        "status": "queued",
        "state_reason": outcome.reason.as_dict(),
        "crashes": outcome.crashes,
        "max_attempts": outcome.max_attempts,
        "available_at": func.now() + timedelta(seconds=outcome.delay_seconds) * (0.5 + func.random()),
        **_NO_LEASE,
    }
    entries.change(session, holds, values, "requeued", {"cause": cause, **outcome.reason.as_dict()}, lease)
    interrupted = update(StageRun).where(StageRun.job_id == job.id, StageRun.status == "running")
    session.execute(interrupted.values(status="pending", progress=0, message=None))
    return "queued"


def _end(
    session: Session,
    where: entries.Where,
    status: Ending,
    reason: Reason | None,
    report: dict[str, Any] | None = None,
    lease: Lease | None = None,
) -> bool:
    """Whether a row matched; the job is terminal now."""
    told = reason.as_dict() if reason else None
    verdict = report["verdict"] if report else None
    values = {"status": status, "state_reason": told, "finished_at": func.now(), "report": report, "verdict": verdict}
    job_id = entries.change(session, where, {**values, **_NO_LEASE}, status, told or {"verdict": verdict}, lease)
    if job_id is None:
        return False
    unended = update(StageRun).where(StageRun.job_id == job_id, entries.UNENDED).values(finished_at=func.now())
    if status == "failed" and reason is not None and reason.stage is not None:
        failed = unended.where(StageRun.position == reason.stage)
        session.execute(failed.values(status="failed", message=reason.message))
    session.execute(unended.values(status="skipped"))
    return True


_NO_LEASE: dict[str, Any] = {"lease_token": None, "lease_expires_at": None, "worker_id": None}
