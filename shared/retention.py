"""What is kept and for how long: files that nothing points to, uploads that were never completed, jobs of long ago.

Nothing goes that a row points to: of a job the rows go first and its files after them, so that whatever is interrupted
leaves files that nothing points to, and those are found again. Any number of collectors may work side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from uuid import UUID

from sqlalchemy import text

from shared import uploads
from shared.db import Sessions, reads, transaction
from shared.settings import Settings
from shared.storage import Storage

PAGE = 500
JOBS_AT_ONCE, FORGET_SECONDS = 10, 600  # a long job has a hundred thousand events, and they go with it
PRODUCTS = "accounts"  # what workers store, under keys of job and attempt


@dataclass(frozen=True)
class Collected:
    """How many were removed, or would be."""

    jobs: int
    uploads: int
    files: int
    unfinished_transfers: int


def collect(sessions: Sessions, storage: Storage, settings: Settings, *, dry_run: bool = False) -> Collected:
    """Remove all that nobody keeps any more, or with `dry_run` only count it."""
    days = settings.job_retention_days
    return Collected(
        uploads=forget_uploads(sessions, storage, dry_run=dry_run),
        files=forget_files(sessions, storage, settings, dry_run=dry_run),
        unfinished_transfers=forget_transfers(sessions, storage, settings, dry_run=dry_run),
        jobs=forget_jobs(sessions, storage, days, dry_run=dry_run) if days else 0,
    )


# ---------------------------------------------------------------- jobs

DUE = "finished_at < now() - make_interval(secs => :seconds) AND status IN ('succeeded', 'failed', 'cancelled')"
COUNT = text(f"SELECT count(*) FROM jobs WHERE {DUE}")
FORGET = text(f"""
    WITH due AS (
        SELECT id FROM jobs WHERE {DUE} ORDER BY finished_at LIMIT :limit FOR UPDATE SKIP LOCKED
    ), keys AS (
        DELETE FROM idempotency_keys USING due WHERE idempotency_keys.job_id = due.id
    )
    DELETE FROM jobs USING due WHERE jobs.id = due.id RETURNING jobs.id, jobs.account_id
""")


def forget_jobs(sessions: Sessions, storage: Storage, days: float, *, dry_run: bool = False) -> int:
    """Remove jobs that ended so long ago, with all that they left and the idempotency keys they were sent under.

    After that, an old key makes a new job.
    """
    asked = {"seconds": days * 86400.0}
    if dry_run:
        with reads(sessions) as connection:
            return int(connection.execute(COUNT, asked).scalar_one())
    forgotten = 0
    while True:
        with transaction(sessions) as session:
            session.execute(text(f"SET LOCAL statement_timeout = '{FORGET_SECONDS}s'"))
            gone = session.execute(FORGET, {**asked, "limit": JOBS_AT_ONCE}).all()
        for job_id, account_id in gone:
            for key in storage.list_keys(f"{PRODUCTS}/{account_id}/jobs/{job_id}/"):
                storage.remove(key)
        forgotten += len(gone)
        if len(gone) < JOBS_AT_ONCE:
            return forgotten


# ---------------------------------------------------------------- uploads

EXPIRED = text(
    "SELECT count(*) FROM artifacts WHERE role = :role AND status = 'pending' AND expires_at < now()"
)


def forget_uploads(sessions: Sessions, storage: Storage, *, dry_run: bool = False) -> int:
    """Remove uploads that were announced and never completed, once their time is over."""
    if dry_run:
        with reads(sessions) as connection:
            return int(connection.execute(EXPIRED, {"role": uploads.ROLE}).scalar_one())
    forgotten = 0
    while found := uploads.forget_expired(sessions, storage, limit=PAGE):
        forgotten += found
    return forgotten


# ---------------------------------------------------------------- files that nothing points to

# A worker stores a file before it writes the row that points to it, and may write that row for as long as the attempt
# that the key names runs. Once that is over no row can come any more, for attempts only rise.
UNKNOWN = text("""
    SELECT found.key FROM unnest(CAST(:keys AS text[])) AS found (key)
    WHERE NOT EXISTS (SELECT FROM artifacts WHERE artifacts.key = found.key)
      AND NOT EXISTS (
          SELECT FROM jobs WHERE status = 'running'
            AND jobs.id::text = split_part(found.key, '/', 4) AND attempt::text = split_part(found.key, '/', 5)
      )
""")


def forget_files(sessions: Sessions, storage: Storage, settings: Settings, *, dry_run: bool = False) -> int:
    """Remove files of the service's that no row points to and that none will, older than their time of grace."""
    forgotten = 0
    for folder, seconds in _grace(settings).items():
        for key in unknown(sessions, storage.list_keys(f"{folder}/", older_than_seconds=seconds)):
            forgotten += 1
            if not dry_run:
                storage.remove(key)
    return forgotten


def forget_transfers(sessions: Sessions, storage: Storage, settings: Settings, *, dry_run: bool = False) -> int:
    """Give up transfers in parts that were never finished, older than a file's time of grace."""
    forgotten = 0
    for folder in _grace(settings):
        began = dict(storage.list_multiparts(f"{folder}/", older_than_seconds=settings.orphan_grace_seconds))
        for key in unknown(sessions, began.values()):
            for multipart_id in [found for found, of_key in began.items() if of_key == key]:
                forgotten += 1
                if not dry_run:
                    storage.abort_multipart(key, multipart_id)
    return forgotten


def unknown(sessions: Sessions, keys: Iterable[str]) -> Iterator[str]:
    """Those of the keys that no row points to or will."""
    remaining = iter(keys)
    while page := list(islice(remaining, PAGE)):
        with reads(sessions) as connection:
            found = connection.scalars(UNKNOWN, {"keys": sorted(set(page))}).all()
        yield from found


def _grace(settings: Settings) -> dict[str, float]:
    """Seconds for which a file may lie in a folder of the bucket before its row is written."""
    return {
        PRODUCTS: settings.orphan_grace_seconds,
        uploads.KEPT: settings.orphan_grace_seconds,
        uploads.INCOMING: settings.presign_seconds,  # whose row is written before the first byte arrives
    }


# ---------------------------------------------------------------- rows that point to nothing

READY = text("""
    SELECT id, key, sha256, size_bytes, etag FROM artifacts
    WHERE status = 'ready' AND id > :after AND (CAST(:account_id AS uuid) IS NULL OR account_id = :account_id)
    ORDER BY id LIMIT :limit
""")


def missing_files(sessions: Sessions, storage: Storage, account_id: UUID | None = None) -> Sequence[str]:
    """Keys that a finished file's row names, of an account's or of all, where storage does not hold its bytes."""
    missing, after = list[str](), UUID(int=0)
    while True:
        with reads(sessions) as connection:
            asked = {"after": after, "account_id": account_id, "limit": PAGE}
            rows = connection.execute(READY, asked).all()
        missing += [row.key for row in rows if not storage.holds(row)]
        if len(rows) < PAGE:
            return missing
        after = rows[-1].id
