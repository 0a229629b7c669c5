"""How the ledger's rows change: under a lease or another condition, and always together with the job's next event.

Only shared/lifecycle.py calls this. It says what changes; here is how, and how the same twice changes nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Insert,
    Select,
    exists,
    func,
    insert,
    literal,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.sql.base import ReadOnlyColumnCollection
from uuid6 import uuid7

from shared.db import Sessions, resolved, statements
from shared.errors import Conflict, LeaseLost
from shared.faultpoints import reach
from shared.ledger import Lease, Progress, Stored
from shared.models import JOB_TERMINAL, Artifact, Job, JobEvent, StageRun

Where = Sequence[ColumnElement[bool]]
UNENDED = StageRun.status.in_(("pending", "running"))
ASIDES = ("log", "progress")  # events of the heartbeat's


@dataclass(frozen=True)
class StageChange:
    """What becomes of a stage that has not ended."""

    position: int
    values: dict[str, Any]
    stored: Sequence[Stored] = ()


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
) -> UUID | None:
    """Change the job that matches, and record its next event; returns the job's id, None if no row matched.

    In one statement: however far the database is, the job's row is not held for a second round trip.
    """
    event = _event(_changed(where, values), kind, told or {}, lease)
    job_id = session.execute(event.returning(JobEvent.job_id)).scalar_one_or_none()
    if job_id is not None:
        reach("event.written")
    return job_id


def _changed(where: Where, values: dict[str, Any]) -> CTE:
    values = {**values, "last_sequence": Job.last_sequence + 1}
    changed = update(Job).where(*where).values(values)
    return changed.returning(Job.id, Job.account_id, Job.attempt, Job.last_sequence).cte("changed")


def _event(changed: CTE, kind: str, told: dict[str, Any], lease: Lease | None) -> Insert:
    token = literal(lease.token if lease else None, JobEvent.lease_token.type)
    facts = changed.c.id, changed.c.attempt, changed.c.last_sequence
    row = select(*facts, literal(kind, JobEvent.kind.type), literal(told, JobEvent.data.type), token)
    return insert(JobEvent).from_select(["job_id", "attempt", "sequence", "kind", "data", "lease_token"], row)


def fenced(connection: Connection, lease: Lease, kind: str, told: dict[str, Any]) -> None:
    """Record the next event of the job that the lease holds. Raises LeaseLost."""
    if change(connection, held(lease), {}, kind, told, lease) is None:
        raise LeaseLost


def once(
    sessions: Sessions,
    lease: Lease,
    values: dict[str, Any],
    kind: str,
    told: dict[str, Any],
    stage: StageChange | None = None,
) -> None:
    """What a worker does next under its lease: the same again changes nothing.

    In one statement, and without a transaction around it: however far the database is, no heartbeat waits for this.

    Raises:
        LeaseLost: the job is no longer this worker's.
        Conflict: it has no such stage, or that has ended.
    """
    statement = _deed(lease, values, kind, told, stage)

    def write() -> None:
        while True:
            with statements(sessions) as connection:
                seen = connection.execute(statement).one_or_none()
            if seen is None:
                raise LeaseLost
            if seen.is_written or seen.was_written:
                return
            if not seen.is_open:
                raise Conflict(f"the job has no stage {stage and stage.position} that could still change")
            # An event came between: what was seen is out of date.

    resolved(write)


def _deed(
    lease: Lease, values: dict[str, Any], kind: str, told: dict[str, Any], stage: StageChange | None
) -> Select[bool, bool, bool]:
    """A change of the job, its event, and what happens to the stage; whether it was written before, may be, and is.

    It is written if no event followed those that it sees: one that waited for the job's row sees what was before.
    """
    own = [JobEvent.job_id == lease.job_id, JobEvent.lease_token == lease.token]
    deeds = select((JobEvent.kind == kind) & (JobEvent.data == told)).where(*own, JobEvent.kind.not_in(ASIDES))
    last = deeds.order_by(JobEvent.sequence.desc()).limit(1).scalar_subquery()
    is_open = true() if stage is None else exists(select(StageRun.position).where(*_open(lease.job_id, stage.position)))
    facts = (Job.last_sequence, func.coalesce(last, False).label("was_written"), is_open.label("is_open"))
    seen = select(*facts).where(*held(lease)).cte("seen").prefix_with("MATERIALIZED")
    due = [Job.last_sequence == seen.c.last_sequence, ~seen.c.was_written, seen.c.is_open]
    changed = _changed([*held(lease), *due], values)
    is_written = exists(select(changed.c.id)).label("is_written")
    whole = select(seen.c.was_written, seen.c.is_open, is_written).add_cte(_event(changed, kind, told, lease).cte())
    if stage is not None:
        ended = update(StageRun).where(*_open(changed.c.id, stage.position))
        whole = whole.add_cte(ended.values(**stage.values, attempt=changed.c.attempt).cte())
        if stage.stored:
            whole = whole.add_cte(_pointers(changed.c, stage.stored, stage.position).cte())
    return whole


def left_as(session: Session, lease: Lease, *expected: str) -> str:
    """The status in which this lease's worker left the job. Raises LeaseLost if it did not leave it in such a one."""
    own = [JobEvent.job_id == lease.job_id, JobEvent.lease_token == lease.token]
    kind = session.scalar(select(JobEvent.kind).where(*own, JobEvent.kind.in_(("requeued", *JOB_TERMINAL))))
    status = "queued" if kind == "requeued" else kind
    if status is None or status not in expected:
        raise LeaseLost
    return status


def _open(job_id: Any, position: int) -> list[ColumnElement[bool]]:
    return [StageRun.job_id == job_id, StageRun.position == position, UNENDED]


def show_progress(connection: Connection, lease: Lease, progress: Progress) -> None:
    """Have a stage that runs under this lease show how far it is."""
    stage = [StageRun.job_id == lease.job_id, StageRun.position == progress.position, StageRun.status == "running"]
    own = exists(select(Job.id).where(*held(lease)))
    values = {"progress": progress.fraction, "message": progress.message}
    connection.execute(update(StageRun).where(*stage, own).values(values))


def point_to(session: Session, job_id: UUID, stored: Sequence[Stored]) -> None:
    """Have artifact rows of the job's own, and of its attempt, point to what is in storage."""
    if stored:
        session.execute(_pointers(Job.__table__.c, stored, None, Job.id == job_id))


def _pointers(
    job: ReadOnlyColumnCollection[str, Any], stored: Sequence[Stored], position: int | None, *where: ColumnElement[bool]
) -> Insert:
    """Rows for what is in storage; `job` are the columns that know whose it is."""
    column = Artifact.__table__.c
    rows = []
    for file in stored:
        own = {**file.__dict__, "stage_position": position, "status": "ready", "id": uuid7()}
        told = {name: literal(value, column[name].type) for name, value in own.items()}
        rows.append({"account_id": job.account_id, "job_id": job.id, "attempt": job.attempt, **told})
    found = [select(*row.values()).where(*where) for row in rows]
    return insert(Artifact).from_select(list(rows[0]), union_all(*found), include_defaults=False)
