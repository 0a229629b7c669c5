"""What one account may have at once: jobs that are queued or running, and bytes of uploads.

Both are counted by triggers, so that the counts hold whoever writes, and the last place is given away once. A claim
changes neither and takes no lock; submits wait for each other only near the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import BigInteger, Connection, ScalarSelect, cast, func, select, text, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.db import Sessions, transaction
from shared.errors import NotFound, StorageQuotaReached, TooManyJobs
from shared.models import Account, AccountUsage

# The part of a submit that finds room for one more job: no row if there is none. A limit of the account's own is
# stronger than the one that is given; where none is given there is none.
ROOM = """
    room AS MATERIALIZED (
        SELECT WHERE CAST(:max_active_jobs AS integer) IS NULL
            OR has_room(CAST(:account_id AS uuid), CAST(:max_active_jobs AS integer))
    )
"""
HAS_ROOM = text(f"WITH {ROOM} SELECT count(*) FROM room")


@dataclass(frozen=True)
class Usage:
    """What an account has, and the limits of its own; None where the service's holds."""

    active_jobs: int
    max_active_jobs: int | None
    stored_bytes: int
    max_stored_bytes: int | None


def demand_job(connection: Connection, account_id: UUID, max_active_jobs: int | None) -> None:
    """See that the account may have one more job; raises TooManyJobs."""
    if connection.scalar(HAS_ROOM, {"account_id": account_id, "max_active_jobs": max_active_jobs}):
        return
    found = select(_sum(AccountUsage.active_jobs), Account.max_active_jobs).where(Account.id == account_id)
    active, own = connection.execute(found).one()
    limit = max_active_jobs if own is None else own
    raise TooManyJobs(
        f"the account has {active:,} of at most {limit:,} jobs queued or running",
        hint="Wait until some of them have ended, or cancel some. Whoever runs the service can allow more.",
    )


def demand_bytes(session: Session, account_id: UUID, size_bytes: int, max_stored_bytes: int) -> None:
    """See that an upload so large still fits, and let no other in before the transaction that announces it is over.

    Raises:
        StorageQuotaReached: it does not fit.
    """
    mine = Account.id == account_id
    own = session.scalar(select(Account.max_stored_bytes).where(mine).with_for_update(key_share=True))
    stored = session.scalar(select(_sum(AccountUsage.stored_bytes)).where(mine)) or 0
    limit = max_stored_bytes if own is None else own
    if stored + size_bytes > limit:
        raise StorageQuotaReached(
            f"the file has {size_bytes:,} bytes, and the account's uploads have {stored:,} of at most {limit:,}",
            hint="What was announced and never completed is given back within the hour; send smaller files, or have "
            "whoever runs the service allow more.",
        )


def usage(sessions: Sessions, account: str) -> Usage:
    """What the account of that name has; raises NotFound."""
    counts = (_sum(AccountUsage.active_jobs), Account.max_active_jobs)
    sizes = (_sum(AccountUsage.stored_bytes), Account.max_stored_bytes)
    with transaction(sessions) as session:
        row = session.execute(select(*counts, *sizes).where(Account.name == account)).one_or_none()
    if row is None:
        raise NotFound(f"there is no account {account!r}")
    return Usage(*row)


def allow(sessions: Sessions, account: str, **limits: int | None) -> Usage:
    """Give an account `max_active_jobs` or `max_stored_bytes` of its own, or with None the service's again.

    What it has beyond a lower limit it keeps. Raises NotFound.
    """
    if limits:
        with transaction(sessions) as session:
            session.execute(update(Account).where(Account.name == account).values(limits))
    return usage(sessions, account)


def _sum(column: InstrumentedAttribute[int]) -> ScalarSelect[int]:
    """Of an account's rows."""
    total = cast(func.coalesce(func.sum(column), 0), BigInteger)
    return select(total).where(AccountUsage.account_id == Account.id).scalar_subquery()
