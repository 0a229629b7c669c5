"""What must be true of the ledger and the storage at any moment, in plain SQL: the laws that no fault may break."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from sqlalchemy import text

from shared.db import Sessions, transaction
from shared.errors import DigestMismatch, NotFound
from shared.storage import Storage

# Each finds the rows that break a law; its comment is the law.
LAWS = {
    # An acknowledged submit has its job, and a job all that its submit wrote.
    "a remembered submit without its job": """
        SELECT k.account_id, k.key FROM idempotency_keys k LEFT JOIN jobs j ON j.id = k.job_id WHERE j.id IS NULL
    """,
    "a job whose stages are not those of its recipe": """
        SELECT j.id FROM jobs j
        WHERE ARRAY(SELECT stage ->> 'kind' FROM jsonb_array_elements(j.recipe -> 'stages') stage)
            IS DISTINCT FROM ARRAY(SELECT kind FROM stage_runs s WHERE s.job_id = j.id ORDER BY position)
    """,
    # One terminal status, told once, last, and as the row says.
    "an ended job without exactly one final event of its status": """
        SELECT j.id FROM jobs j WHERE j.status IN ('succeeded', 'failed', 'cancelled') AND (
            (SELECT count(*) FROM job_events e
             WHERE e.job_id = j.id AND e.kind IN ('succeeded', 'failed', 'cancelled')) <> 1
            OR (SELECT kind FROM job_events e WHERE e.job_id = j.id ORDER BY sequence DESC LIMIT 1) <> j.status
            OR j.finished_at IS NULL)
    """,
    "a living job with a final event or an end": """
        SELECT j.id FROM jobs j WHERE j.status IN ('queued', 'running') AND (j.finished_at IS NOT NULL OR EXISTS (
            SELECT FROM job_events e WHERE e.job_id = j.id AND e.kind IN ('succeeded', 'failed', 'cancelled')))
    """,
    "an ended job with a stage that has not ended": """
        SELECT j.id, s.position FROM jobs j JOIN stage_runs s ON s.job_id = j.id
        WHERE j.status IN ('succeeded', 'failed', 'cancelled') AND s.status IN ('pending', 'running')
    """,
    "a failed job that does not say why": """
        SELECT id FROM jobs WHERE status = 'failed' AND state_reason ->> 'message' IS NULL
    """,
    # At most one accepted completion a stage, by the attempt that the stage names.
    "a stage finished twice, or by another attempt than it says": """
        SELECT s.job_id, s.position FROM stage_runs s
        LEFT JOIN job_events e ON e.job_id = s.job_id AND e.kind = 'stage_finished'
            AND (e.data ->> 'stage')::int = s.position
        WHERE s.status IN ('succeeded', 'dropped', 'cached')
        GROUP BY s.job_id, s.position, s.attempt
        HAVING count(e.sequence) <> 1 OR max(e.attempt) IS DISTINCT FROM s.attempt
    """,
    "a running stage of a job that does not run": """
        SELECT s.job_id, s.position FROM stage_runs s JOIN jobs j ON j.id = s.job_id
        WHERE s.status = 'running' AND (j.status <> 'running' OR s.attempt <> j.attempt)
    """,
    # Events are gapless and legal; attempts never fall and never pass the maximum.
    "a gap in a job's events": """
        SELECT j.id FROM jobs j LEFT JOIN job_events e ON e.job_id = j.id
        GROUP BY j.id HAVING count(e.sequence) <> j.last_sequence
            OR coalesce(min(e.sequence), 1) <> 1 OR coalesce(max(e.sequence), 0) <> j.last_sequence
    """,
    "an event that may not follow the one before it": """
        SELECT job_id, sequence, before, kind FROM (
            SELECT job_id, sequence, kind, attempt,
                   lag(kind) OVER moves AS before, lag(attempt) OVER moves AS earlier
            FROM job_events
            WHERE kind IN ('submitted', 'claimed', 'requeued', 'succeeded', 'failed', 'cancelled')
            WINDOW moves AS (PARTITION BY job_id ORDER BY sequence)
        ) AS move
        WHERE (coalesce(before, 'nothing'), kind) NOT IN (
                ('nothing', 'submitted'), ('submitted', 'claimed'), ('submitted', 'cancelled'),
                ('requeued', 'claimed'), ('requeued', 'cancelled'), ('claimed', 'requeued'),
                ('claimed', 'succeeded'), ('claimed', 'failed'), ('claimed', 'cancelled'))
            OR attempt <> coalesce(earlier, 0) + (kind = 'claimed')::int
    """,
    "a worker's event outside of a claim": """
        SELECT e.job_id, e.sequence FROM job_events e
        WHERE e.kind IN ('log', 'progress', 'baseline_measured', 'stage_started', 'stage_finished') AND (
            SELECT kind FROM job_events move
            WHERE move.job_id = e.job_id AND move.sequence < e.sequence
              AND move.kind IN ('submitted', 'claimed', 'requeued', 'succeeded', 'failed', 'cancelled')
            ORDER BY sequence DESC LIMIT 1) <> 'claimed'
    """,
    "an attempt that its claims do not account for": """
        SELECT j.id FROM jobs j
        WHERE j.attempt > j.max_attempts
           OR j.attempt <> (SELECT count(*) FROM job_events e WHERE e.job_id = j.id AND e.kind = 'claimed')
    """,
    # A result's row points to the attempt that made it, and not to one that was replaced before it finished.
    "an artifact of another attempt than its stage's": """
        SELECT a.id FROM artifacts a JOIN stage_runs s ON s.job_id = a.job_id AND s.position = a.stage_position
        WHERE a.role <> 'checkpoint'
          AND (a.attempt IS DISTINCT FROM s.attempt OR s.status NOT IN ('succeeded', 'dropped', 'cached'))
    """,
    "an artifact of another account than its job's": """
        SELECT a.id FROM artifacts a JOIN jobs j ON j.id = a.job_id WHERE a.account_id <> j.account_id
    """,
    # One lease a job, none on a job that does not run.
    "a lease on a job that does not run, or a running job without one": """
        SELECT id FROM jobs WHERE (status = 'running') <> (lease_token IS NOT NULL)
            OR (status = 'running') <> (lease_expires_at IS NOT NULL) OR (status = 'running') <> (worker_id IS NOT NULL)
    """,
    # What an account is told to have is what it has.
    "a count of an account's jobs or bytes that a recount does not give": """
        SELECT name, jobs, bytes FROM accounts a CROSS JOIN LATERAL (
            SELECT coalesce(sum(active_jobs), 0) AS jobs, coalesce(sum(stored_bytes), 0) AS bytes
            FROM account_usage WHERE account_id = a.id
        ) AS told
        WHERE jobs <> (SELECT count(*) FROM jobs WHERE account_id = a.id AND status IN ('queued', 'running'))
           OR bytes <> (
                SELECT coalesce(sum(size_bytes), 0) FROM artifacts WHERE account_id = a.id AND role = 'upload')
    """,
}

# Only where nothing is under way any more: no job runs, and what waits says why.
QUIET = {
    "a job that neither ended nor says why it waits": """
        SELECT id, status FROM jobs
        WHERE status = 'running' OR (status = 'queued' AND state_reason ->> 'message' IS NULL)
    """,
}


# Nobody holds a transaction open while it does something else, or has gone.
IDLE = "a connection idle in a transaction"
IN_TRANSACTION = """
    SELECT pid, xact_start::text, query FROM pg_stat_activity
    WHERE datname = current_database() AND state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()
"""
LINGER_SECONDS = 2.0  # for whoever is between two statements, or just ends


def audit(sessions: Sessions, storage: Storage | None = None, *, quiet: bool = False) -> list[str]:
    """Every broken law with its rows; empty if all is well.

    With `storage`, also that each finished file is in storage with its size and sha256, and that no other is there
    than a lost attempt can have left. With `quiet`, also that every job has ended or says why it waits.
    """
    broken = []
    with transaction(sessions) as session:
        for law, breakers in {**LAWS, **(QUIET if quiet else {})}.items():
            broken += [f"{law}: {tuple(row)}" for row in session.execute(text(breakers)).all()]
        ready = "SELECT key, sha256, size_bytes FROM artifacts WHERE status = 'ready'"
        files = session.execute(text(ready)).all()
    broken += _lasting(lambda: _idle(sessions))
    if storage is not None:
        for key, sha256, size_bytes in files:
            broken += _misstored(storage, key, sha256, size_bytes)
        broken += _unaccounted(sessions, storage, quiet)
    return broken


def leftovers(directory: Path) -> list[str]:
    """What still runs or lies below the directory in which workers were started, now that they have ended."""
    return _lasting(lambda: _running(directory) | {f"a directory left over: {path}" for path in _listed(directory)})


def half_uploads(sessions: Sessions, storage: Storage) -> list[str]:
    """Objects of uploads that no row points to: only an api or a storage that died just then may leave them."""
    return [f"an upload of no row: {key}" for key in orphans(sessions, storage) if key.startswith(UPLOADS)]


def orphans(sessions: Sessions, storage: Storage) -> set[str]:
    """Keys in storage that no row points to: what lost attempts left behind."""
    with transaction(sessions) as session:
        known = set(session.scalars(text("SELECT key FROM artifacts")).all())
    return set(storage.list_keys()) - known


UPLOADS = ("uploads/", "incoming/")
PROBE = "ready"  # burnish/local/servers.py writes it, to see that storage works
PRODUCT = re.compile(r"(accounts/[^/]+/jobs/[^/]+)/(\d+)/.+/[0-9a-f]{64}/.+")  # of a job's attempt
JOBS = "SELECT 'accounts/' || account_id || '/jobs/' || id, attempt, status FROM jobs"


def _unaccounted(sessions: Sessions, storage: Storage, quiet: bool) -> list[str]:
    """Objects that no row points to, and that no attempt left which did not succeed.

    Before all is quiet one may also be of a job that is just being forgotten. Uploads are for `half_uploads` to tell.
    """
    with transaction(sessions) as session:
        jobs = {row[0]: row[1:] for row in session.execute(text(JOBS)).all()}
    broken = []
    for key in orphans(sessions, storage) - {PROBE}:
        product = PRODUCT.fullmatch(key)
        folder, number = product.groups() if product else ("", "0")
        attempt, status = jobs.get(folder, (-1, "unknown"))
        if attempt == int(number) and status == "succeeded":
            broken.append(f"an orphan of an attempt that succeeded: {key}")
        elif attempt < int(number) and quiet and not key.startswith(UPLOADS):
            broken.append(f"an object that no attempt can have left: {key}")
    return broken


def _misstored(storage: Storage, key: str, sha256: str, size_bytes: int) -> list[str]:
    try:
        found = storage.digest(key)
    except (NotFound, DigestMismatch) as error:
        return [f"an artifact without its object: {key} ({error})"]
    if found != (sha256, size_bytes):
        return [f"an artifact whose object is another: {key} is {found}, recorded as {(sha256, size_bytes)}"]
    return []


def _idle(sessions: Sessions) -> set[str]:
    with transaction(sessions) as session:
        return {f"{IDLE}: {tuple(row)}" for row in session.execute(text(IN_TRANSACTION)).all()}


def _running(directory: Path) -> set[str]:
    found = set()
    for process in psutil.process_iter(["cwd", "name", "status"]):
        here = Path(process.info["cwd"] or "/").is_relative_to(directory)
        if here and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.add(f"a process left over: {process.pid} {process.info['name']} in {process.info['cwd']}")
    return found


def _listed(directory: Path) -> list[Path]:
    """What attempts work in, below a worker's directory."""
    work = directory / "work"
    return list(work.iterdir()) if work.exists() else []


def _lasting(look: Callable[[], set[str]]) -> list[str]:
    """What is found each time for a while, and so does not go by itself."""
    deadline, pause = time.monotonic() + LINGER_SECONDS, threading.Event()
    found = look()
    while found and time.monotonic() < deadline:
        pause.wait(0.02)
        found &= look()
    return sorted(found)
