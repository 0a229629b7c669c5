"""How the ledger's rows change: under a lease or another condition, and always together with the job's next event.

Only shared/lifecycle.py calls this. It says what changes; here is how, and how the same twice changes nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, exists, insert, literal, select, update
from sqlalchemy.orm import Session

from shared.db import Sessions, resolved, transaction
from shared.errors import Conflict, LeaseLost
from shared.faultpoints import reach
from shared.ledger import Lease, Progress, Stored
from shared.models import JOB_TERMINAL, Artifact, Job, JobEvent, StageRun

Where = Sequence[ColumnElement[bool]]
UNENDED = StageRun.status.in_(("pending", "running"))


def held(lease: Lease) -> list[ColumnElement[bool]]:
    """The fence: the row that a lease's worker may still write to."""
    return [Job.id == lease.job_id, Job.lease_token == lease.token, Job.status == "running"]


def change(
    session: Session | Connection,
    where: Where,
    values: dict[str, Any],
    kind: str,
    told: dict[str, Any] | None = None,
    lease: Lease | None = None,
) -> tuple[UUID, int] | None:
    """Change the job that matches, and record its next event; returns (job id, attempt), None if no row matched.

    In one statement: however far the database is, the job's row is not held for a second round trip.
    """
    values = {**values, "last_sequence": Job.last_sequence + 1}
    changed = update(Job).where(*where).values(values).returning(Job.id, Job.attempt, Job.last_sequence).cte("changed")
    token = literal(lease.token if lease else None, JobEvent.lease_token.type)
    row = select(changed, literal(kind, JobEvent.kind.type), literal(told or {}, JobEvent.data.type), token)
    names = ["job_id", "attempt", "sequence", "kind", "data", "lease_token"]
    event = insert(JobEvent).from_select(names, row).returning(JobEvent.job_id, JobEvent.attempt)
    written = session.execute(event).one_or_none()
    if written is None:
        return None
    reach("event.written")
    return written.job_id, written.attempt


def fenced(
    session: Session | Connection, lease: Lease, values: dict[str, Any], kind: str, told: dict[str, Any]
) -> int:
    """Change the job that the lease holds, and record its next event; returns the attempt. Raises LeaseLost."""
    row = change(session, held(lease), values, kind, told, lease)
    if row is None:
        raise LeaseLost
    return row[1]


def once(
    sessions: Sessions,
    lease: Lease,
    values: dict[str, Any],
    kind: str,
    told: dict[str, Any],
    write_stage: Callable[[Session, int], None],
) -> None:
    """What a worker does next under its lease: the same again changes nothing. `write_stage` is given the attempt."""
    own = [JobEvent.job_id == lease.job_id, JobEvent.lease_token == lease.token]
    deeds = select(JobEvent.kind, JobEvent.data).where(*own, JobEvent.kind.not_in(("log", "progress")))

    def write() -> None:
        with transaction(sessions) as session:
            if session.scalar(select(Job.id).where(*held(lease)).with_for_update()) is None:
                raise LeaseLost
            if session.execute(deeds.order_by(JobEvent.sequence.desc()).limit(1)).one_or_none() != (kind, told):
                write_stage(session, fenced(session, lease, values, kind, told))

    resolved(write)


def left_as(session: Session, lease: Lease, *expected: str) -> str:
    """The status in which this lease's worker left the job. Raises LeaseLost if it did not leave it in such a one."""
    own = [JobEvent.job_id == lease.job_id, JobEvent.lease_token == lease.token]
    kind = session.scalar(select(JobEvent.kind).where(*own, JobEvent.kind.in_(("requeued", *JOB_TERMINAL))))
    status = "queued" if kind == "requeued" else kind
    if status is None or status not in expected:
        raise LeaseLost
    return status


def update_stage(session: Session, lease: Lease, position: int, **values: Any) -> None:
    """Change a stage that has not ended; raises Conflict if there is no such stage."""
    stage = [StageRun.job_id == lease.job_id, StageRun.position == position]
    changed = update(StageRun).where(*stage, UNENDED).values(**values).returning(StageRun.position)
    if session.execute(changed).one_or_none() is None:
        raise Conflict(f"the job has no stage {position} that could still change")


def show_progress(connection: Connection, lease: Lease, progress: Progress) -> None:
    """Have a stage that runs under this lease show how far it is."""
    stage = [StageRun.job_id == lease.job_id, StageRun.position == progress.position, StageRun.status == "running"]
    own = exists(select(Job.id).where(*held(lease)))
    values = {"progress": progress.fraction, "message": progress.message}
    connection.execute(update(StageRun).where(*stage, own).values(values))


def point_to(session: Session, job_id: UUID, stored: Sequence[Stored], attempt: int, position: int | None) -> None:
    """Have artifact rows point to what is in storage."""
    if not stored:
        return
    account_id = session.scalar(select(Job.account_id).where(Job.id == job_id))
    facts = {"account_id": account_id, "job_id": job_id, "stage_position": position, "attempt": attempt}
    session.execute(insert(Artifact), [{**facts, **file.__dict__, "status": "ready"} for file in stored])
