"""Inputs in quarantine: what made its job crash again and again costs the account's next job one crash and not two.

An input is the same model, data and recipe. Each function is part of its caller's transaction.
"""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from shared.models import Job, Quarantine


def put(session: Session, job_id: UUID) -> None:
    """Put a job's input into quarantine, if it is not there."""
    what = select(Job.account_id, Job.input_sha256, Job.id)
    found = what.where(Job.id == job_id, Job.input_sha256.is_not(None))
    columns = ["account_id", "input_sha256", "job_id"]
    session.execute(insert(Quarantine).from_select(columns, found).on_conflict_do_nothing())


def put_by(session: Session, job_id: UUID) -> UUID | None:
    """The job that put this job's input into quarantine; None if it is not there."""
    return session.scalar(select(Quarantine.job_id).where(*_input_of(job_id)))


def lift(session: Session, job_id: UUID) -> None:
    """Take a job's input out of quarantine, if it is there."""
    session.execute(delete(Quarantine).where(*_input_of(job_id)))


def _input_of(job_id: UUID) -> list[ColumnElement[bool]]:
    return [
        Job.id == job_id,
        Quarantine.account_id == Job.account_id,
        Quarantine.input_sha256 == Job.input_sha256,
    ]
