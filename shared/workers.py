"""The workers that are there, what they can do, and why a job that none of them can do has to wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import aggregate_order_by, insert
from sqlalchemy.orm import Session

from shared import lifecycle
from shared.db import Sessions, transaction
from shared.ledger import Reason
from shared.models import Job, Worker

ALIVE_SECONDS = 30.0
FORGET_SECONDS = 86400.0
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


def beat(sessions: Sessions, worker_id: str, job_id: UUID | None) -> None:
    """Say that a worker is alive, and what it is at."""
    with transaction(sessions) as session:
        session.execute(
            update(Worker).where(Worker.id == worker_id).values(heartbeat_at=func.now(), job_id=job_id)
        )


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


def explain_waiting(sessions: Sessions, limit: int = 100) -> None:
    """Write on queued jobs why no worker takes them, and take it off again where one can."""
    needs = (Job.queue, Job.requires, Job.required_memory_bytes, Job.state_reason)
    can = (
        select(Worker.id)
        .where(
            ALIVE,
            Job.queue == func.any(Worker.queues),
            Worker.capabilities.contains(Job.requires),
            Worker.memory_bytes >= Job.required_memory_bytes,
        )
        .exists()
    )
    told = Job.state_reason["code"].astext.in_(("no_worker", "no_capable_worker"))
    # Jobs that need the same and were told the same are looked at together: a long queue is mostly alike.
    alike = select(func.array_agg(aggregate_order_by(Job.id, Job.id))[1:limit], *needs)
    with transaction(sessions) as session:
        workers = alive(session)
        stuck = session.execute(alike.where(Job.status == "queued", ~can).group_by(*needs)).all()
        freed = session.scalars(select(Job.id).where(Job.status == "queued", told, can).limit(limit)).all()
    for ids, queue, requires, memory_bytes, earlier in stuck:
        reason = waiting_reason(workers, queue, requires, memory_bytes)
        if reason is not None and reason.as_dict() != earlier:
            for job_id in ids:
                lifecycle.explain_waiting(sessions, job_id, reason)
    for job_id in freed:
        lifecycle.explain_waiting(sessions, job_id, None)


def queues_with_work(sessions: Sessions) -> Sequence[str]:
    """Queues of live workers in which a job is due."""
    with transaction(sessions) as session:
        names = sorted({queue for worker in alive(session) for queue in worker.queues})
        due = select(Job.id).where(Job.status == "queued", Job.available_at <= func.now())
        return [name for name in names if session.scalar(due.where(Job.queue == name).limit(1))]
