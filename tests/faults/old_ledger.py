"""What the version of revision 0002 says to the database, as far as a job's life needs it: old code that still runs."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

from psycopg import Connection
from psycopg.types.json import Jsonb

from shared.ledger import Order

SUBMIT = """
    WITH remembered AS (
        INSERT INTO idempotency_keys (account_id, key, request_sha256, job_id)
        SELECT %(account_id)s, %(key)s, %(request_sha256)s, %(id)s WHERE CAST(%(key)s AS text) IS NOT NULL
        ON CONFLICT DO NOTHING
        RETURNING job_id
    ), job AS (
        INSERT INTO jobs (id, account_id, name, tags, recipe, requires, required_memory_bytes, queue, priority,
                          max_attempts, timeout_seconds, last_sequence)
        SELECT %(id)s, %(account_id)s, %(name)s, %(tags)s, CAST(%(recipe)s AS jsonb), %(requires)s,
               %(required_memory_bytes)s, %(queue)s, %(priority)s, %(max_attempts)s, %(timeout_seconds)s, 1
        WHERE CAST(%(key)s AS text) IS NULL OR EXISTS (SELECT FROM remembered)
        RETURNING id
    ), stages AS (
        INSERT INTO stage_runs (job_id, position, kind)
        SELECT job.id, kinds.number - 1, kinds.kind
        FROM job, unnest(CAST(%(kinds)s AS text[])) WITH ORDINALITY AS kinds (kind, number)
    ), event AS (
        INSERT INTO job_events (job_id, sequence, attempt, kind) SELECT id, 1, 0, 'submitted' FROM job
    )
    SELECT id FROM job
"""
CLAIM = """
    WITH candidate AS (
        SELECT best.id, best.priority, accounts.id AS account_id
        FROM accounts CROSS JOIN LATERAL (
            SELECT id, priority FROM jobs
            WHERE account_id = accounts.id AND status = 'queued' AND available_at <= now() AND queue = 'default'
            ORDER BY priority DESC, id LIMIT 32
        ) AS best
    ), chosen AS (
        SELECT job.id FROM candidate JOIN jobs AS job ON job.id = candidate.id
        WHERE job.status = 'queued' AND job.available_at <= now()
        ORDER BY candidate.priority DESC, candidate.id LIMIT 1 FOR UPDATE OF job SKIP LOCKED
    )
    UPDATE jobs SET status = 'running', attempt = attempt + 1, worker_id = 'old', lease_token = %(token)s,
                    lease_expires_at = now() + interval '60 seconds',
                    started_at = coalesce(started_at, now()), state_reason = NULL, last_sequence = last_sequence + 1
    FROM chosen WHERE jobs.id = chosen.id
    RETURNING jobs.id, jobs.attempt, jobs.last_sequence
"""
EVENT = "INSERT INTO job_events (job_id, sequence, attempt, kind, data) VALUES (%s, %s, %s, %s, %s)"
END = """
    UPDATE jobs SET status = 'failed', state_reason = %(reason)s, finished_at = now(), lease_token = NULL,
                    lease_expires_at = NULL, worker_id = NULL, last_sequence = last_sequence + 1
    WHERE id = %(id)s AND lease_token = %(token)s AND status = 'running'
    RETURNING attempt, last_sequence
"""
REASON = Jsonb({"code": "bug", "message": "It broke."})


def submit(connection: Connection[Any], order: Order, key: str) -> UUID:
    """The job's id, new or of the same key before."""
    facts = {"id": uuid4(), "key": key, "request_sha256": order.digest(), **order.values()}
    made = connection.execute(SUBMIT, facts).fetchone()
    earlier = "SELECT job_id FROM idempotency_keys WHERE account_id = %s AND key = %s"
    found = made or connection.execute(earlier, [order.account_id, key]).fetchone()
    assert found is not None
    job_id: UUID = found[0]
    return job_id


def claim(connection: Connection[Any]) -> tuple[UUID, UUID] | None:
    """A job and its lease's token."""
    token = uuid4()
    with connection.transaction():
        row = connection.execute(CLAIM, {"token": token}).fetchone()
        if row is None:
            return None
        job_id, attempt, sequence = row
        connection.execute(EVENT, [job_id, sequence, attempt, "claimed", Jsonb({"worker": "old"})])
    return job_id, token


def fail(connection: Connection[Any], job_id: UUID, token: UUID) -> None:
    """The end of a claimed job, and of its stages."""
    with connection.transaction():
        row = connection.execute(END, {"id": job_id, "token": token, "reason": REASON}).fetchone()
        assert row is not None
        connection.execute(EVENT, [job_id, row[1], row[0], "failed", REASON])
        skipped = "UPDATE stage_runs SET status = 'skipped', finished_at = now() WHERE job_id = %s"
        connection.execute(skipped, [job_id])
