"""What an account may read of its jobs: queries that change nothing and find only the account's own rows.

Those that a submit or a waiting client pays for are SQL as it is sent: composing them costs more than running them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import ColumnElement, RowMapping, Select, select, text
from sqlalchemy.orm import Session

from shared import checkpoints
from shared.db import Sessions, reads, transaction
from shared.errors import Conflict, NotFound, ReportNotReady
from shared.models import JOB_TERMINAL, Artifact, Job, JobEvent, Worker
from shared.report import Report
from shared.schemas import Event
from shared.workers import ALIVE


@dataclass(frozen=True)
class Standing:
    """Where a job stands, as far as one who waits for it must know."""

    last_sequence: int
    ended: bool


# ---------------------------------------------------------------- jobs


COLUMNS = """
    id, name, tags, status, state_reason, verdict, attempt, max_attempts, priority, queue, retry_of,
           cancel_requested_at, created_at, started_at, finished_at, last_sequence, recipe,
           (SELECT jsonb_agg(to_jsonb(stage) ORDER BY stage.position) FROM (
                SELECT position, kind, status, attempt, progress, message, started_at, finished_at
                FROM stage_runs WHERE job_id = jobs.id
           ) AS stage) AS stages
    FROM jobs WHERE account_id = :account_id
"""
LAST_ID = UUID(int=2**128 - 1)
# Of one job alone: for a page of them, every report would be read whole.
OF_THE_REPORT = "report->>'reason' AS headline, COALESCE(report->'warnings', '[]') AS warnings"
JOB = text(f"SELECT {OF_THE_REPORT}, {COLUMNS} AND id = :job_id")
TAGGED = "tags @> CAST(:tags AS text[])"
JOBS = text(f"SELECT {COLUMNS} AND id < :before AND {TAGGED} ORDER BY id DESC LIMIT :limit")
# The newest of each status, and of these the newest: a walk through all jobs would pass over many for one of a rare
# status. Written as one stretch of ix_jobs_list_by_status, or the planner may take that walk.
JOBS_OF_STATUS = text(f"""
    SELECT {COLUMNS} AND id IN (
        SELECT found.id FROM unnest(CAST(:statuses AS text[])) AS asked, LATERAL (
            SELECT id FROM jobs
            WHERE (account_id, status) >= (:account_id, asked)
              AND (account_id, status, id) < (:account_id, asked, :before) AND {TAGGED}
            ORDER BY account_id DESC, status DESC, id DESC LIMIT :limit
        ) AS found ORDER BY found.id DESC LIMIT :limit
    ) ORDER BY id DESC
""")


def job(sessions: Sessions, account_id: UUID, job_id: UUID) -> RowMapping:
    """One job with its stages, named as in schemas.Job; NotFound if the account has no such job."""
    with reads(sessions) as connection:
        found = connection.execute(JOB, {"account_id": account_id, "job_id": job_id}).mappings().one_or_none()
    if found is None:
        raise _no_job(job_id)
    return found


def jobs(
    sessions: Sessions,
    account_id: UUID,
    *,
    statuses: Sequence[str] = (),
    tags: Sequence[str] = (),
    before: UUID | None = None,
    limit: int,
) -> Sequence[RowMapping]:
    """The account's jobs, newest first: in one of the statuses, with all of the tags, older than `before`."""
    # Always a bound, so that also a plan that is kept for all pages begins where the page does.
    asked = {"account_id": account_id, "tags": list(tags), "before": before or LAST_ID, "limit": limit}
    with reads(sessions) as connection:
        if not statuses:
            return connection.execute(JOBS, asked).mappings().all()
        return connection.execute(JOBS_OF_STATUS, {**asked, "statuses": sorted(set(statuses))}).mappings().all()


STANDING = text("SELECT last_sequence, status FROM jobs WHERE id = :job_id AND account_id = :account_id")


def standing(sessions: Sessions, account_id: UUID, job_id: UUID) -> Standing:
    """A job's newest sequence number, and whether it has ended; NotFound if the account has no such job."""
    with reads(sessions) as connection:
        row = connection.execute(STANDING, {"account_id": account_id, "job_id": job_id}).one_or_none()
    if row is None:
        raise _no_job(job_id)
    return Standing(row.last_sequence, row.status in JOB_TERMINAL)


def report(sessions: Sessions, account_id: UUID, job_id: UUID) -> Report:
    """A job's report; NotFound, ReportNotReady while there is none, or Conflict where it cannot be read any more."""
    with transaction(sessions) as session:
        row = session.execute(select(Job.report, Job.status).where(*_mine(account_id, job_id))).one_or_none()
    if row is None:
        raise _no_job(job_id)
    if row.report is None:
        if row.status in JOB_TERMINAL:
            raise ReportNotReady(f"the job is {row.status} and left no report", hint="Its state_reason says why.")
        raise ReportNotReady(f"the job is {row.status}", hint="Wait until it has ended: GET /v1/jobs/{id}?wait=60.")
    try:
        return Report.model_validate(row.report)
    except ValidationError:
        raise Conflict(
            "the job's report is in the language of another version", hint="Download it as it is: its file report.json."
        ) from None


# ---------------------------------------------------------------- events


EVENTS = text("""
    SELECT sequence, at, attempt, kind, data FROM job_events
    WHERE job_id = :job_id AND sequence > :after ORDER BY sequence LIMIT :limit
""")


def events(sessions: Sessions, job_id: UUID, *, after: int, limit: int) -> list[Event]:
    """Events of a job whose number is above `after`, in order. The caller has seen that the job is the account's."""
    with reads(sessions) as connection:
        rows = connection.execute(EVENTS, {"job_id": job_id, "after": after, "limit": limit}).mappings().all()
    return [Event.model_validate(row) for row in rows]


# ---------------------------------------------------------------- artifacts


def artifacts(sessions: Sessions, account_id: UUID, job_id: UUID) -> Sequence[Artifact]:
    """Files of a job, oldest first; NotFound if the account has no such job."""
    with transaction(sessions) as session:
        found = session.scalars(_files(account_id, job_id).order_by(Artifact.id)).all()
        if not found:
            _demand_job(session, account_id, job_id)
    return found


def artifact(sessions: Sessions, account_id: UUID, job_id: UUID, name: str) -> Artifact:
    """One file of a job by its name; NotFound."""
    with transaction(sessions) as session:
        found = session.scalar(_files(account_id, job_id).where(Artifact.name == name))
        if found is None:
            _demand_job(session, account_id, job_id)
            raise NotFound(f"job {job_id} has no file named {name!r}", hint="GET /v1/jobs/{id}/artifacts lists them.")
    return found


def log(sessions: Sessions, account_id: UUID, job_id: UUID, attempt: int | None = None) -> Artifact | str:
    """The log of one attempt, or of the newest that has one: the file kept at its end, else what it told so far.

    Raises:
        NotFound: the account has no such job, or there is no log yet.
    """
    kept = _files(account_id, job_id).where(Artifact.role == "log").order_by(Artifact.attempt.desc()).limit(1)
    told = select(JobEvent.attempt, JobEvent.data["text"].astext)
    told = told.where(JobEvent.job_id == job_id, JobEvent.kind == "log").order_by(JobEvent.sequence)
    if attempt is not None:
        kept, told = kept.where(Artifact.attempt == attempt), told.where(JobEvent.attempt == attempt)
    with transaction(sessions) as session:
        _demand_job(session, account_id, job_id)
        file = session.scalar(kept)
        newest = (file.attempt or 0) if file is not None else 0
        lines = session.execute(told.where(JobEvent.attempt > newest)).all()
    if lines:
        return "".join(text for of_attempt, text in lines if of_attempt == lines[-1][0])
    if file is None:
        which = "no log yet" if attempt is None else f"no log of attempt {attempt}"
        raise NotFound(f"job {job_id} has {which}")
    return file


def _files(account_id: UUID, job_id: UUID) -> Select[Artifact]:
    mine = [Artifact.job_id == job_id, Artifact.account_id == account_id]
    return select(Artifact).where(*mine, Artifact.status == "ready", Artifact.role != checkpoints.ROLE)


def _demand_job(session: Session, account_id: UUID, job_id: UUID) -> None:
    if session.scalar(select(Job.id).where(*_mine(account_id, job_id))) is None:
        raise _no_job(job_id)


def _mine(account_id: UUID, job_id: UUID) -> list[ColumnElement[bool]]:
    return [Job.id == job_id, Job.account_id == account_id]


def _no_job(job_id: UUID) -> NotFound:
    return NotFound(f"there is no job {job_id}")


# ---------------------------------------------------------------- workers


def workers(sessions: Sessions) -> Sequence[RowMapping]:
    """Every worker that is known, named as in schemas.Worker."""
    columns = (
        *(Worker.id, Worker.hostname, Worker.queues, Worker.capabilities, Worker.cores, Worker.memory_bytes),
        *(Worker.details, Worker.started_at, Worker.heartbeat_at),
        *(Worker.job_id.is_not(None).label("busy"), ALIVE.label("alive")),
    )
    with transaction(sessions) as session:
        return session.execute(select(*columns).order_by(Worker.id)).mappings().all()
