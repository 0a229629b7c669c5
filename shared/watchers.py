"""Those who watch a job: the database tells them of every event as it is committed, and of a claim a worker does."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import text

from shared.db import Sessions, statements

CHANNEL = "burnish_job"

# A commit that notifies waits for every other one that does, so this one does not wait for the disk.
TELL = text(f"SELECT set_config('synchronous_commit', 'off', true), pg_notify('{CHANNEL}', CAST(:job_id AS text))")


def tell(sessions: Sessions, job_id: UUID) -> None:
    """Have who watches a job look at it again. What is not told is seen at the job's next event.

    Raises:
        DatabaseUnavailable: nobody was told.
    """
    with statements(sessions) as connection:
        connection.execute(TELL, {"job_id": str(job_id)})
