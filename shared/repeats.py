"""An ended job once more: its owner's retry, and an operator's release of one that was quarantined.

Either is a new job that says what it repeats. The old one stays as it ended, for its owner was told so.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import ColumnElement, func, select

from shared import lifecycle, quarantine
from shared.attempts import QUARANTINED
from shared.db import Sessions, transaction
from shared.errors import Conflict, NotFound
from shared.ledger import Order
from shared.models import JOB_TERMINAL, Job, JobEvent


def retry(
    sessions: Sessions,
    account_id: UUID,
    job_id: UUID,
    idempotency_key: str | None = None,
    max_active_jobs: int | None = None,
) -> tuple[UUID, bool]:
    """Submit an ended job's recipe again; returns (the new job's id, whether it is new).

    Raises:
        NotFound, Conflict: the account has no such job, or it has not ended.
        InvalidRecipe, IdempotencyConflict, TooManyJobs: as for a submit.
    """
    job = _find(sessions, job_id, Job.account_id == account_id)
    if job.status not in JOB_TERMINAL:
        raise Conflict(f"the job is {job.status}; only an ended job can be retried", hint="Cancel it first.")
    return lifecycle.submit(sessions, _again(sessions, job), idempotency_key, max_active_jobs)


def release(sessions: Sessions, job_id: UUID) -> tuple[UUID, bool]:
    """Take a quarantined job's input out of quarantine and submit the job again; a second time gives the same job.

    Raises:
        NotFound, Conflict: there is no such job, or it was not quarantined.
        InvalidRecipe: the language has changed since, and the job's recipe is no longer one.
    """
    job = _find(sessions, job_id)
    if (job.state_reason or {}).get("code") != QUARANTINED:
        raise Conflict(f"job {job_id} is {job.status} and was not quarantined")
    again = _again(sessions, job)
    with transaction(sessions) as session:
        quarantine.lift(session, job_id)
    return lifecycle.submit(sessions, again, f"release {job_id}")


def _again(sessions: Sessions, job: Job) -> Order:
    returned = [JobEvent.job_id == job.id, JobEvent.kind == "requeued", JobEvent.data["cause"].astext == "given_back"]
    with transaction(sessions) as session:
        given_back = session.scalar(select(func.count()).where(*returned)) or 0
    return Order.again(job, given_back)


def _find(sessions: Sessions, job_id: UUID, *where: ColumnElement[bool]) -> Job:
    with transaction(sessions) as session:
        job = session.scalar(select(Job).where(Job.id == job_id, *where))
    if job is None:
        raise NotFound(f"there is no job {job_id}")
    return job
