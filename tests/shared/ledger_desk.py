"""What the tests of the ledger order, claim and look up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, Engine, event, select, text

from shared import accounts, lifecycle
from shared.db import Sessions, transaction
from shared.ledger import Capacity, Claim, Order, Reason, Stored
from shared.models import Job, JobEvent, StageRun
from shared.recipe import Recipe

LEASE_SECONDS = 30.0
RECIPE = Recipe.model_validate(
    {
        "source": {"onnx": "01990000-0000-7000-8000-000000000001"},
        "task": {"kind": "segmentation", "classes": ["other", "lesion"], "background": 0},
        "data": {"artifact": "01990000-0000-7000-8000-000000000002"},
        "stages": [{"kind": "quantize"}, {"kind": "build_engine"}],
    }
)
LOST = Reason("worker_lost", "The worker fell silent.")
CRASHED = Reason("child_crashed", "The process died of signal 11.", stage=0)
ABLE = Capacity("worker-1", ["default"], RECIPE.requirements(), memory_bytes=2**33)


def account(sessions: Sessions, name: str = "clinic") -> UUID:
    return accounts.ensure_account(sessions, name)


def order(account_id: UUID, **changes: Any) -> Order:
    facts: dict[str, Any] = {"name": "unet", "recipe": RECIPE, "timeout_seconds": 3600.0}
    return Order(account_id=account_id, **{**facts, **changes})


def submit(sessions: Sessions, account_id: UUID | None = None, **changes: Any) -> UUID:
    job_id, _new = lifecycle.submit(sessions, order(account_id or account(sessions), **changes))
    return job_id


def claim(sessions: Sessions, capacity: Capacity = ABLE, lease_seconds: float = LEASE_SECONDS) -> Claim:
    """A claim that must succeed."""
    claimed = lifecycle.claim(sessions, capacity, lease_seconds)
    assert claimed is not None, "nothing to claim"
    return claimed


def job(sessions: Sessions, job_id: UUID) -> Job:
    with transaction(sessions) as session:
        return session.scalars(select(Job).where(Job.id == job_id)).one()


def stages(sessions: Sessions, job_id: UUID) -> Sequence[StageRun]:
    with transaction(sessions) as session:
        return session.scalars(select(StageRun).where(StageRun.job_id == job_id).order_by(StageRun.position)).all()


def events(sessions: Sessions, job_id: UUID) -> list[str]:
    """The kinds of a job's events, in their order."""
    with transaction(sessions) as session:
        told = select(JobEvent.kind).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)
        return list(session.scalars(told).all())


def stored(name: str = "model.onnx", key: str | None = None) -> Stored:
    return Stored("model", name, "onnx", key or f"artifacts/{uuid4()}", "ab" * 32, 3)


def lapse(sessions: Sessions, job_id: UUID) -> None:
    """Let a running job's lease be over, as if its worker had fallen silent."""
    execute(sessions, "UPDATE jobs SET lease_expires_at = now() - interval '1 second' WHERE id = :id", id=job_id)


def due(sessions: Sessions, job_id: UUID) -> None:
    """Have a job that waits for its next attempt be due at once."""
    execute(sessions, "UPDATE jobs SET available_at = now() WHERE id = :id AND status = 'queued'", id=job_id)


def execute(sessions: Sessions, statement: str, **parameters: Any) -> None:
    with transaction(sessions) as session:
        session.execute(text(statement), parameters)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls in threads that start together; what each returned, or the error that it raised."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(run, call) for call in calls]
    return [future.exception() or future.result() for future in futures]


def waits_for_a_lock(sessions: Sessions) -> bool:
    """Whether somebody waits in this database for what another holds."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with transaction(sessions) as session:
        return bool(session.scalar(text(waiting)))


@contextmanager
def lost_answer(sessions: Sessions, *, committed: bool) -> Iterator[None]:
    """The first commit in here loses its connection, after it was carried out or before it was."""
    engine = sessions.kw["bind"]
    assert isinstance(engine, Engine)
    lost = []

    def at_commit(connection: Connection) -> None:
        raw: Any = connection.connection.dbapi_connection
        if not lost:
            lost.append(True)
            if committed:
                raw.commit()
            raw.close()

    def at_statement(connection: Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        raw: Any = connection.connection.dbapi_connection
        if raw.autocommit and not lost:
            lost.append(True)
            if committed:
                cursor.execute(statement, parameters)
            raw.close()

    event.listen(engine, "commit", at_commit)
    event.listen(engine, "before_cursor_execute", at_statement)
    try:
        yield
    finally:
        event.remove(engine, "commit", at_commit)
        event.remove(engine, "before_cursor_execute", at_statement)
    assert lost
