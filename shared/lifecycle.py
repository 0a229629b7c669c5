"""The ledger: the only file that changes a job's status.

    submit ──> queued ──claim──> running ──settle──> succeeded | failed | cancelled
                 ^  └──cancel──> cancelled   │
                 └─────give_back, requeue────┘   (requeue fails the job when its attempts or crashes are used up)

Every function owns one transaction and writes the job's next event in it. What a worker writes is fenced by the
token of its lease: zero rows mean that it was replaced. The database's clock is the only clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, func, insert, select, text, update
from sqlalchemy.orm import Session
from uuid6 import uuid7

from shared.db import Sessions, statements, transaction
from shared.errors import Conflict, IdempotencyConflict, LeaseLost, NotFound
from shared.ledger import Capacity, Claim, Heartbeat, Lease, Order, Progress, Reason, Stored
from shared.models import JOB_TERMINAL, Artifact, IdempotencyKey, Job, JobEvent, StageRun

Ending = Literal["succeeded", "failed", "cancelled"]
Cause = Literal["given_back", "lost", "crashed"]
Where = Sequence[ColumnElement[bool]]

MAX_CRASHES = 2

# ---------------------------------------------------------------- the owner's side

SUBMIT = text("""
    WITH remembered AS (
        INSERT INTO idempotency_keys (account_id, key, request_sha256, job_id)
        SELECT :account_id, :key, :request_sha256, :id WHERE CAST(:key AS text) IS NOT NULL
        ON CONFLICT DO NOTHING
        RETURNING job_id
    ), job AS (
        INSERT INTO jobs (id, account_id, name, tags, recipe, requires, required_memory_bytes, queue, priority,
                          retry_of, max_attempts, timeout_seconds, last_sequence)
        SELECT :id, :account_id, :name, :tags, CAST(:recipe AS jsonb), :requires, :required_memory_bytes, :queue,
               :priority, CAST(:retry_of AS uuid), :max_attempts, :timeout_seconds, 1
        WHERE CAST(:key AS text) IS NULL OR EXISTS (SELECT FROM remembered)
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


def submit(sessions: Sessions, order: Order, idempotency_key: str | None = None) -> tuple[UUID, bool]:
    """Write a job, its stages, its first event and its idempotency key; returns (job id, whether it is new).

    Raises:
        IdempotencyConflict: the key was used for another request.
    """
    parameters = {"id": uuid7(), "key": idempotency_key, "request_sha256": order.digest(), **order.values()}
    with statements(sessions) as connection:
        job_id = connection.scalar(SUBMIT, parameters)
        if job_id is not None:
            return job_id, True
        earlier = connection.execute(
            select(IdempotencyKey.job_id, IdempotencyKey.request_sha256).where(
                IdempotencyKey.account_id == order.account_id, IdempotencyKey.key == idempotency_key
            )
        ).one()
    if earlier.request_sha256 != order.digest():
        raise IdempotencyConflict(hint="Use a new key for a new request, or send the same body again.")
    return earlier.job_id, False


def cancel(sessions: Sessions, account_id: UUID, job_id: UUID) -> str:
    """Ask for a job's end; a queued one ends at once, an ended one stays as it is. Returns its status.

    Raises:
        NotFound: the account has no such job.
    """
    mine = [Job.id == job_id, Job.account_id == account_id]
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
            _change(session, mine, {"cancel_requested_at": func.now()}, "cancel_requested")
        return str(job.status)


def retry(sessions: Sessions, account_id: UUID, job_id: UUID, idempotency_key: str | None = None) -> tuple[UUID, bool]:
    """Submit an ended job's recipe again, as a new job that says what it repeats.

    Raises:
        NotFound, Conflict: there is no such job, or it has not ended.
    """
    with transaction(sessions) as session:
        job = session.scalar(select(Job).where(Job.id == job_id, Job.account_id == account_id))
    if job is None:
        raise NotFound(f"there is no job {job_id}")
    if job.status not in JOB_TERMINAL:
        raise Conflict(f"the job is {job.status}; only an ended job can be retried", hint="Cancel it first.")
    return submit(sessions, Order.again(job), idempotency_key)


# ---------------------------------------------------------------- the worker's side

# Candidates are looked up without locks, account by account, so that a long queue of one costs no more than a short
# one and hides no other's; then the best one that nobody else is just taking is locked, and its row checked again.
CLAIM = text("""
    WITH candidate AS (
        SELECT best.id, best.priority, accounts.id AS account_id
        FROM accounts CROSS JOIN LATERAL (
            SELECT id, priority FROM jobs
            WHERE account_id = accounts.id AND status = 'queued' AND available_at <= now() AND queue = ANY(:queues)
              AND requires <@ CAST(:capabilities AS text[]) AND required_memory_bytes <= :memory_bytes
            ORDER BY priority DESC, id LIMIT 32
        ) AS best
    ), account AS MATERIALIZED (
        SELECT id, (SELECT count(*) FROM jobs WHERE account_id = waiting.id AND status = 'running') AS running,
               (SELECT max(started_at) FROM jobs WHERE account_id = waiting.id) AS served_at
        FROM (SELECT DISTINCT account_id AS id FROM candidate) AS waiting
    ), chosen AS (
        SELECT job.id
        FROM candidate JOIN account ON account.id = candidate.account_id JOIN jobs AS job ON job.id = candidate.id
        WHERE job.status = 'queued' AND job.available_at <= now()
        ORDER BY account.running, account.served_at NULLS FIRST, candidate.priority DESC, candidate.id
        LIMIT 1 FOR UPDATE OF job SKIP LOCKED
    )
    UPDATE jobs SET status = 'running', attempt = attempt + 1, worker_id = :worker_id, lease_token = :token,
                    lease_expires_at = now() + make_interval(secs => :lease_seconds),
                    started_at = coalesce(started_at, now()), state_reason = NULL,
                    last_sequence = last_sequence + 1
    FROM chosen WHERE jobs.id = chosen.id
    RETURNING jobs.id, account_id, name, queue, attempt, recipe, baseline, last_sequence
""")


def claim(sessions: Sessions, capacity: Capacity, lease_seconds: float) -> Claim | None:
    """Take the best job that this worker can do: fair between accounts, then priority, then age.

    Fair: first whoever has the fewest jobs running, then whoever was last served the longest ago.
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
    with transaction(sessions) as session:
        row = session.execute(CLAIM, parameters).one_or_none()
        if row is None:
            return None
        _record(session, row.id, row.last_sequence, row.attempt, "claimed", {"worker": capacity.worker_id})
    return Claim(Lease(row.id, token), row.account_id, row.name, row.queue, row.attempt, row.recipe, row.baseline)


def heartbeat(
    sessions: Sessions, lease: Lease, lease_seconds: float, progress: Progress | None = None, log: str = ""
) -> Heartbeat:
    """Renew a lease, tell what is new of the stage's progress and its log, and hear whether to stop.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    renewed = {"lease_expires_at": func.now() + timedelta(seconds=lease_seconds)}
    with transaction(sessions) as session:
        if not session.execute(update(Job).where(*_held(lease)).values(renewed).returning(Job.id)).all():
            raise LeaseLost
        if log:
            _fenced(session, lease, {}, "log", {"text": log})
        if progress is not None:
            told = {"stage": progress.position, "fraction": round(progress.fraction, 4), "message": progress.message}
            _fenced(session, lease, {}, "progress", told)
            running = [StageRun.job_id == lease.job_id, StageRun.position == progress.position]
            values = {"progress": progress.fraction, "message": progress.message}
            session.execute(update(StageRun).where(*running, StageRun.status == "running").values(values))
        overdue = Job.started_at + func.make_interval(0, 0, 0, 0, 0, 0, Job.timeout_seconds) < func.now()
        row = session.execute(select(Job.cancel_requested_at, overdue).where(Job.id == lease.job_id)).one()
    return Heartbeat(cancel_requested=row[0] is not None, overdue=bool(row[1]))


def record_baseline(sessions: Sessions, lease: Lease, baseline: dict[str, Any]) -> None:
    """Keep the measured baseline, so that another attempt compares with the same one. Raises LeaseLost."""
    with transaction(sessions) as session:
        _fenced(session, lease, {"baseline": baseline}, "baseline_measured", {})


def start_stage(sessions: Sessions, lease: Lease, position: int) -> None:
    """Mark a stage as running. Raises LeaseLost, or Conflict if there is no such stage to run."""
    with transaction(sessions) as session:
        attempt = _fenced(session, lease, {}, "stage_started", {"stage": position})
        _update_stage(session, lease, position, status="running", attempt=attempt, started_at=func.now(), progress=0.0)


def finish_stage(
    sessions: Sessions, lease: Lease, position: int, status: str, report: dict[str, Any], stored: Sequence[Stored]
) -> None:
    """Commit a stage's end together with the rows that point to its files; the same again changes nothing.

    Raises:
        LeaseLost, Conflict: the job is no longer this worker's, or there is no such stage to finish.
    """
    same = [StageRun.position == position, StageRun.status == status, StageRun.attempt == Job.attempt]
    with transaction(sessions) as session:
        if session.scalar(select(Job.id).join(StageRun, StageRun.job_id == Job.id).where(*_held(lease), *same)):
            return  # it was committed, and only the answer was lost
        told = {"stage": position, "status": status, "reason": report.get("reason")}
        attempt = _fenced(session, lease, {"crashes": 0}, "stage_finished", told)
        ended = {"status": status, "attempt": attempt, "report": report, "progress": 1.0, "finished_at": func.now()}
        _update_stage(session, lease, position, **ended)
        _point_to(session, lease.job_id, stored, attempt, position)


def settle(
    sessions: Sessions,
    lease: Lease,
    status: Ending,
    reason: Reason | None = None,
    report: dict[str, Any] | None = None,
    stored: Sequence[Stored] = (),
) -> None:
    """Write the one terminal status, with the report and the last files. Raises LeaseLost."""
    with transaction(sessions) as session:
        attempt = _end(session, _held(lease), status, reason, report)
        if attempt is None:
            raise LeaseLost
        _point_to(session, lease.job_id, stored, attempt, None)


def give_back(sessions: Sessions, lease: Lease, reason: Reason, stored: Sequence[Stored] = ()) -> str:
    """Return a job unfinished through no fault of its own: the attempt is not counted. Raises LeaseLost."""
    with transaction(sessions) as session:
        return _requeue(session, _held(lease), reason, cause="given_back", delay_seconds=0, stored=stored)


def requeue(
    sessions: Sessions,
    lease: Lease,
    reason: Reason,
    *,
    cause: Literal["lost", "crashed"],
    delay_seconds: float = 0,
    stored: Sequence[Stored] = (),
) -> str:
    """Return a job for another attempt after a fault of the platform; returns its new status.

    It fails instead when its attempts are used up, or when it crashed twice without finishing a stage between
    (quarantine), and ends as cancelled if that was asked. `delay_seconds` doubles with each attempt, jittered.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """
    with transaction(sessions) as session:
        return _requeue(session, _held(lease), reason, cause, delay_seconds, stored)


# ---------------------------------------------------------------- the sweeper's side


def sweep_leases(sessions: Sessions, limit: int = 100) -> int:
    """Requeue jobs whose worker has let the lease lapse; returns how many."""
    lapsed = [Job.status == "running", Job.lease_expires_at < func.now()]
    with transaction(sessions) as session:
        due = select(Job.id).where(*lapsed).order_by(Job.lease_expires_at).limit(limit)
        ids = session.scalars(due.with_for_update(skip_locked=True)).all()
        for job_id in ids:
            reason = Reason("worker_lost", "The worker that ran the job stopped answering.")
            _requeue(session, [*lapsed, Job.id == job_id], reason, cause="lost", delay_seconds=0)
    return len(ids)


def explain_waiting(sessions: Sessions, job_id: UUID, reason: Reason | None) -> None:
    """Say on a queued job why it waits, or that nothing holds it up any more."""
    told = reason.as_dict() if reason else None
    current = Job.state_reason.is_not(None) if reason is None else Job.state_reason.is_distinct_from(told)
    with transaction(sessions) as session:
        waits = [Job.id == job_id, Job.status == "queued", current]
        _change(session, waits, {"state_reason": told}, "waiting", told)


# ---------------------------------------------------------------- how a row changes


def _requeue(
    session: Session, holds: Where, reason: Reason, cause: Cause, delay_seconds: float, stored: Sequence[Stored] = ()
) -> str:
    job = session.execute(
        select(Job.id, Job.attempt, Job.max_attempts, Job.crashes, Job.cancel_requested_at)
        .where(*holds)
        .with_for_update()
    ).one_or_none()
    if job is None:
        raise LeaseLost
    _point_to(session, job.id, stored, job.attempt, None)
    crashes = job.crashes + (cause == "crashed")
    if job.cancel_requested_at is not None:
        _end(session, holds, "cancelled", Reason("cancelled", "Cancelled while it ran.", fault="user"))
        return "cancelled"
    if crashes >= MAX_CRASHES:
        enough = f"The job ended its process {crashes} times without finishing a stage."
        _end(session, holds, "failed", reason.after(enough, code="quarantined"))
        return "failed"
    if cause != "given_back" and job.attempt >= job.max_attempts:
        _end(session, holds, "failed", reason.after(f"All {job.max_attempts} attempts are used up."))
        return "failed"
    delay = timedelta(seconds=delay_seconds * 2 ** min(job.attempt - 1, 6))
    values = {
        "status": "queued",
        "state_reason": reason.as_dict(),
        "crashes": crashes,
        # Attempt numbers name artifacts and are never reused, so an attempt that must not count moves the maximum.
        "max_attempts": job.max_attempts + (cause == "given_back"),
        "available_at": func.now() + delay * (0.5 + func.random()),
        **_NO_LEASE,
    }
    _change(session, holds, values, "requeued", {"cause": cause, **reason.as_dict()})
    interrupted = update(StageRun).where(StageRun.job_id == job.id, StageRun.status == "running")
    session.execute(interrupted.values(status="pending", progress=0, message=None))
    return "queued"


def _end(
    session: Session, where: Where, status: Ending, reason: Reason | None, report: dict[str, Any] | None = None
) -> int | None:
    """The job's attempt number if a row matched and is now terminal."""
    told = reason.as_dict() if reason else None
    verdict = report["verdict"] if report else None
    values = {"status": status, "state_reason": told, "finished_at": func.now(), "report": report, "verdict": verdict}
    row = _change(session, where, {**values, **_NO_LEASE}, status, told or {"verdict": verdict})
    if row is None:
        return None
    job_id, attempt = row
    unended = update(StageRun).where(StageRun.job_id == job_id, _UNENDED).values(finished_at=func.now())
    if status == "failed" and reason is not None and reason.stage is not None:
        failed = unended.where(StageRun.position == reason.stage)
        session.execute(failed.values(status="failed", message=reason.message))
    session.execute(unended.values(status="skipped"))
    return attempt


_NO_LEASE: dict[str, Any] = {"lease_token": None, "lease_expires_at": None, "worker_id": None}
_UNENDED = StageRun.status.in_(("pending", "running"))


def _held(lease: Lease) -> list[ColumnElement[bool]]:
    return [Job.id == lease.job_id, Job.lease_token == lease.token, Job.status == "running"]


def _fenced(session: Session, lease: Lease, values: dict[str, Any], kind: str, told: dict[str, Any]) -> int:
    row = _change(session, _held(lease), values, kind, told)
    if row is None:
        raise LeaseLost
    return row[1]


def _change(
    session: Session, where: Where, values: dict[str, Any], kind: str, told: dict[str, Any] | None = None
) -> tuple[UUID, int] | None:
    """Change the job that matches, and record its next event; returns (job id, attempt), None if no row matched."""
    changed = update(Job).where(*where).values(**values, last_sequence=Job.last_sequence + 1)
    row = session.execute(changed.returning(Job.id, Job.attempt, Job.last_sequence)).one_or_none()
    if row is None:
        return None
    _record(session, row.id, row.last_sequence, row.attempt, kind, told or {})
    return row.id, row.attempt


def _record(session: Session, job_id: UUID, sequence: int, attempt: int, kind: str, told: dict[str, Any]) -> None:
    event = {"job_id": job_id, "sequence": sequence, "attempt": attempt, "kind": kind, "data": told}
    session.execute(insert(JobEvent).values(event))


def _update_stage(session: Session, lease: Lease, position: int, **values: Any) -> None:
    stage = [StageRun.job_id == lease.job_id, StageRun.position == position]
    changed = update(StageRun).where(*stage, _UNENDED).values(**values).returning(StageRun.position)
    if session.execute(changed).one_or_none() is None:
        raise Conflict(f"the job has no stage {position} that could still change")


def _point_to(session: Session, job_id: UUID, stored: Sequence[Stored], attempt: int, position: int | None) -> None:
    if not stored:
        return
    account_id = session.scalar(select(Job.account_id).where(Job.id == job_id))
    facts = {"account_id": account_id, "job_id": job_id, "stage_position": position, "attempt": attempt}
    session.execute(insert(Artifact), [{**facts, **file.__dict__, "status": "ready"} for file in stored])
