"""What an unfinished stage left for its next attempt: one file a name, fenced like all that a worker writes.

A checkpoint is an artifact that only workers see. Once it is replaced, or its stage or its job has ended, it is stale:
its object is removed first and its row after it, so that whatever is interrupted is found again.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Select, String, and_, cast, delete, or_, select, update
from sqlalchemy.dialects.postgresql import insert

from shared import lifecycle
from shared.db import Sessions, resolved, transaction
from shared.errors import Conflict
from shared.ledger import Lease, Stored
from shared.models import JOB_TERMINAL, STAGE_DONE, Artifact, Job, StageRun
from shared.storage import Storage

ROLE = "checkpoint"


def keep(sessions: Sessions, lease: Lease, position: int, stored: Stored) -> None:
    """Point to a checkpoint of the running stage, in place of the one of the same name; the old one is stale then.

    It is progress: crashes count anew. The same again changes nothing.

    Raises:
        LeaseLost, Conflict: the job is no longer this worker's, or the stage does not run.
    """
    same = [Artifact.job_id == lease.job_id, Artifact.role == ROLE, Artifact.name == stored.name]
    running = [StageRun.job_id == lease.job_id, StageRun.position == position, StageRun.status == "running"]

    def write() -> None:
        with transaction(sessions) as session:
            runs = session.scalar(select(StageRun.position).where(*running)) is not None
            account_id, attempt = lifecycle.standing(session, lease)  # still: so what was seen is of this attempt
            if not runs:
                raise Conflict(f"stage {position} does not run, so it keeps no checkpoints")
            # The same bytes again are an epoch repeated: no progress.
            repeated = select(Artifact.id).where(*same, Artifact.status == "ready", Artifact.sha256 == stored.sha256)
            is_progress = session.scalar(repeated.limit(1)) is None
            # a job's files have names of their own
            stale = {"status": "pending", "name": Artifact.name + "." + cast(Artifact.id, String)}
            session.execute(update(Artifact).where(*same, Artifact.key != stored.key).values(stale))
            facts = {"account_id": account_id, "job_id": lease.job_id, "stage_position": position, "attempt": attempt}
            row = insert(Artifact).values(**facts, **stored.__dict__, status="ready")
            session.execute(row.on_conflict_do_nothing(index_elements=["key"]))
            lifecycle.fence(session, lease, is_progress=is_progress)

    resolved(write)


def of_job(sessions: Sessions, job_id: UUID) -> Sequence[Artifact]:
    """The checkpoints of the job's unfinished stages."""
    with transaction(sessions) as session:
        unfinished = [StageRun.job_id == Artifact.job_id, StageRun.position == Artifact.stage_position]
        found = (
            select(Artifact)
            .join(StageRun, and_(*unfinished))
            .where(Artifact.job_id == job_id, Artifact.role == ROLE, Artifact.status == "ready")
            .where(StageRun.status.not_in(STAGE_DONE))
            .order_by(Artifact.stage_position, Artifact.name)
        )
        return session.scalars(found).all()


def forget_stale(sessions: Sessions, storage: Storage, job_id: UUID | None = None, limit: int = 100) -> int:
    """Remove checkpoints that nobody will go on from, of one job or of all; returns how many."""
    with transaction(sessions) as session:
        due = session.execute(_stale(job_id).limit(limit)).all()
    for artifact_id, key in due:
        storage.remove(key)
        with transaction(sessions) as session:
            session.execute(delete(Artifact).where(Artifact.id == artifact_id))
    return len(due)


def _stale(job_id: UUID | None) -> Select[UUID, str]:
    of_stage = [StageRun.job_id == Artifact.job_id, StageRun.position == Artifact.stage_position]
    over = or_(Artifact.status == "pending", Job.status.in_(JOB_TERMINAL), StageRun.status.in_(STAGE_DONE))
    found = (
        select(Artifact.id, Artifact.key)
        .join(Job, Job.id == Artifact.job_id)
        .join(StageRun, and_(*of_stage))
        .where(Artifact.role == ROLE, over)
    )
    return found if job_id is None else found.where(Artifact.job_id == job_id)
