"""The workers that are there, what they can do, and why a job that none of them can do has to wait."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared import lifecycle
from shared.db import Sessions, transaction
from shared.ledger import Reason
from shared.models import TOLD_MD5, Job, Worker

ALIVE_SECONDS = 30.0
FORGET_SECONDS = 86400.0
MAX_BYTES = 2**63 - 1
ALIVE = Worker.heartbeat_at > func.now() - timedelta(seconds=ALIVE_SECONDS)


@dataclass(frozen=True)
class Registration:
    """What a worker says of itself when it starts."""

    id: str
    hostname: str
    queues: Sequence[str]
    capabilities: Sequence[str]
    cores: int
    memory_bytes: int
    details: dict[str, Any]


def register(sessions: Sessions, registration: Registration) -> None:
    """Make a worker known, or known anew after a restart."""
    values = {**registration.__dict__, "job_id": None, "started_at": func.now(), "heartbeat_at": func.now()}
    with transaction(sessions) as session:
        session.execute(insert(Worker).values(values).on_conflict_do_update(index_elements=["id"], set_=values))


def beat(sessions: Sessions, worker_id: str, job_id: UUID | None) -> bool:
    """Say that a worker is alive, and what it is at; whether it is still known."""
    alive = update(Worker).where(Worker.id == worker_id).values(heartbeat_at=func.now(), job_id=job_id)
    with transaction(sessions) as session:
        return session.scalar(alive.returning(Worker.id)) is not None


def retire(sessions: Sessions, worker_id: str) -> None:
    """Strike a worker off: it has stopped of its own accord."""
    with transaction(sessions) as session:
        session.execute(delete(Worker).where(Worker.id == worker_id))


def forget_dead(sessions: Sessions) -> None:
    """Strike off workers that have not been heard of for a day."""
    with transaction(sessions) as session:
        long_ago = func.now() - timedelta(seconds=FORGET_SECONDS)
        session.execute(delete(Worker).where(Worker.heartbeat_at < long_ago))


def alive(session: Session) -> Sequence[Worker]:
    """Workers heard of in the last ALIVE_SECONDS."""
    return session.scalars(select(Worker).where(ALIVE).order_by(Worker.id)).all()


def waiting_reason(workers: Sequence[Worker], queue: str, requires: Sequence[str], memory_bytes: int) -> Reason | None:
    """Why none of these workers can do a job; None if one can."""
    serving = [worker for worker in workers if queue in worker.queues]
    if not serving:
        names = sorted({name for worker in workers for name in worker.queues})
        there = f"live workers serve: {', '.join(names)}" if names else "no worker is alive"
        return Reason("no_worker", f"No live worker serves the queue {queue!r} ({there}).", "Start a worker for it.")
    able = [worker for worker in serving if set(requires) <= set(worker.capabilities)]
    if not able:
        closest = min(serving, key=lambda worker: len(set(requires) - set(worker.capabilities)))
        missing = ", ".join(sorted(set(requires) - set(closest.capabilities)))
        return Reason(
            "no_capable_worker",
            f"No live worker can do this job: the closest one lacks {missing}.",
            "Start a worker that has it, or change the recipe.",
        )
    largest = max(worker.memory_bytes for worker in able)
    if largest < memory_bytes:
        message = f"The job needs about {memory_bytes / 2**30:.1f} GiB of memory; the largest live worker that can "
        return Reason("no_capable_worker", message + f"do it has {largest / 2**30:.1f} GiB.", "Start a larger worker.")
    return None


# Jobs that need the same and were told the same form one group: one step of the index each, however many they are.
GROUPS = text(f"""
    WITH RECURSIVE alike AS (
        (SELECT queue, requires, {TOLD_MD5} AS told FROM jobs
         WHERE status = 'queued' ORDER BY queue, requires, {TOLD_MD5} LIMIT 1)
        UNION ALL
        SELECT next.* FROM alike CROSS JOIN LATERAL (
            SELECT queue, requires, {TOLD_MD5} FROM jobs
            WHERE status = 'queued' AND (queue, requires, {TOLD_MD5}) > (alike.queue, alike.requires, alike.told)
            ORDER BY queue, requires, {TOLD_MD5} LIMIT 1
        ) AS next
    )
    SELECT queue, requires, told FROM alike
""")
MEMBERS = text(f"""
    SELECT id, required_memory_bytes FROM jobs
    WHERE status = 'queued' AND queue = :queue AND requires = CAST(:requires AS text[]) AND {TOLD_MD5} = :told
      AND required_memory_bytes > :above AND required_memory_bytes <= :upto
      AND (NOT :told_only OR state_reason ->> 'code' IN ('no_worker', 'no_capable_worker'))
    ORDER BY required_memory_bytes LIMIT :limit
""")


def explain_waiting(sessions: Sessions, limit: int = 100) -> None:
    """Write on queued jobs why no worker takes them, and take it off again where one can; `limit` of a kind at once."""
    with transaction(sessions) as session:
        there = alive(session)
        told = [told for group in session.execute(GROUPS).all() for told in _untold(session, there, group, limit)]
    for job_id, reason in told:
        lifecycle.explain_waiting(sessions, job_id, reason)


def _untold(
    session: Session, there: Sequence[Worker], group: Row[Any], limit: int
) -> Iterator[tuple[UUID, Reason | None]]:
    """Jobs of a group that were told something else than what is so now, with what that is."""
    able = [worker for worker in there if waiting_reason([worker], group.queue, group.requires, 0) is None]
    largest = max((worker.memory_bytes for worker in able), default=-1)

    def members(above: int, upto: int, told_only: bool) -> Sequence[Row[Any]]:
        limits = {"above": above, "upto": upto, "told_only": told_only, "limit": limit}
        return session.execute(MEMBERS, {**group._mapping, **limits}).all()

    if group.told != _md5(None):
        yield from ((job.id, None) for job in members(-1, largest, told_only=True))
    if able or group.told != _md5(waiting_reason(there, group.queue, group.requires, 0)):
        for job in members(largest, MAX_BYTES, told_only=False):
            reason = waiting_reason(there, group.queue, group.requires, job.required_memory_bytes)
            if _md5(reason) != group.told:
                yield job.id, reason


def _md5(reason: Reason | None) -> str:
    return hashlib.md5((reason.message if reason else "").encode()).hexdigest()


def queues_with_work(sessions: Sessions) -> Sequence[str]:
    """Queues of live workers in which a job is due."""
    with transaction(sessions) as session:
        names = sorted({queue for worker in alive(session) for queue in worker.queues})
        # In the order of the index, so that none of the table's other rows is looked at.
        due = select(Job.id).where(Job.status == "queued", Job.available_at <= func.now()).order_by(Job.requires)
        return [name for name in names if session.scalar(due.where(Job.queue == name).limit(1))]
