"""TensorRT's timings of its kernels, kept for an account's later jobs: one file a GPU and version of TensorRT.

They are an artifact of the account, of no job, that only workers see. They save time and decide nothing: they are never
shared between accounts, as a stranger's model was in the process that wrote them, and losing them costs a longer build.
The newest wins; the one before it stays for an hour, for those who are about to read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import delete, func, insert, or_, select, update

from shared import lifecycle
from shared.db import Sessions, resolved, transaction
from shared.ledger import Lease, Stored
from shared.models import Artifact
from shared.storage import Storage

ROLE = "timings"
MAX_BYTES = 32 * 2**20  # of one file
MAX_FILES = 10  # of an account: the newest
GRACE = timedelta(hours=1)


def keep(sessions: Sessions, lease: Lease, stored: Stored) -> None:
    """Point to the account's newest timings of that name; the one before, and the oldest of too many, lapse.

    The same again changes nothing.

    Raises:
        LeaseLost: the job is no longer this worker's.
    """

    def write() -> None:
        with transaction(sessions) as session:
            account_id, _ = lifecycle.standing(session, lease)
            # one writer at a time
            session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"{ROLE} {account_id}", 0))))
            if session.scalar(select(Artifact.id).where(Artifact.key == stored.key)) is not None:
                return
            mine = [Artifact.account_id == account_id, Artifact.role == ROLE, Artifact.status == "ready"]
            newest = select(Artifact.id).where(*mine, Artifact.name != stored.name)
            others = newest.order_by(Artifact.id.desc()).limit(MAX_FILES - 1).subquery()
            lapsed = or_(Artifact.name == stored.name, Artifact.id.not_in(select(others.c.id)))
            expiry = {"status": "pending", "expires_at": func.now() + GRACE}
            session.execute(update(Artifact).where(*mine, lapsed).values(expiry))
            session.execute(insert(Artifact).values(account_id=account_id, **stored.__dict__, status="ready"))
            lifecycle.fence(session, lease)

    resolved(write)


def of_account(sessions: Sessions, account_id: UUID) -> Sequence[Artifact]:
    """The account's timings, one a name."""
    mine = [Artifact.account_id == account_id, Artifact.role == ROLE, Artifact.status == "ready"]
    with transaction(sessions) as session:
        return session.scalars(select(Artifact).where(*mine).order_by(Artifact.name)).all()


def forget_lapsed(sessions: Sessions, storage: Storage, limit: int = 100) -> int:
    """Remove what was replaced an hour ago, the object first, so that what is interrupted is found again."""
    lapsed = [Artifact.role == ROLE, Artifact.status == "pending", Artifact.expires_at < func.now()]
    with transaction(sessions) as session:
        due = session.execute(select(Artifact.id, Artifact.key).where(*lapsed).limit(limit)).all()
    for artifact_id, key in due:
        storage.remove(key)
        with transaction(sessions) as session:
            session.execute(delete(Artifact).where(Artifact.id == artifact_id))
    return len(due)
