"""What the database itself refuses, whoever writes to it, and whom it tells of what was written."""

from __future__ import annotations

import itertools
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from shared import lifecycle, repeats, watchers
from shared.db import Sessions, transaction
from shared.ledger import Reason
from shared.models import JOB_STATUSES, JOB_TERMINAL, STAGE_STATUSES
from shared.settings import Settings
from tests.shared.ledger_desk import account, claim, execute, job, submit

JOB_MOVES = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("running", "queued"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
}
STAGE_MOVES = {
    ("pending", "running"),
    ("pending", "cached"),
    ("pending", "skipped"),
    ("pending", "failed"),
    ("running", "pending"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "dropped"),
    ("running", "cached"),
    ("running", "skipped"),
}
MOVE_JOB = """
    UPDATE jobs SET status = :status, attempt = attempt + (status = 'queued' AND :status = 'running')::int,
                    lease_token = CASE WHEN :status = 'running' THEN gen_random_uuid() END
    WHERE id = :id
"""
MOVE_STAGE = "UPDATE stage_runs SET status = :status WHERE job_id = :id AND position = 0"


def _job_in(sessions: Sessions, status: str) -> UUID:
    """A job in that state, brought there by legal moves."""
    job_id = submit(sessions)
    road = {"queued": [], "running": ["running"], "cancelled": ["cancelled"]}.get(status, ["running", status])
    for step in road:
        execute(sessions, MOVE_JOB, id=job_id, status=step)
    return job_id


def _stage_in(sessions: Sessions, status: str) -> UUID:
    job_id = submit(sessions)
    for step in {"pending": [], "running": ["running"]}.get(status, ["running", status]):
        execute(sessions, MOVE_STAGE, id=job_id, status=step)
    return job_id


def test_a_job_moves_only_as_the_ledger_says(sessions: Sessions) -> None:
    for old, new in itertools.permutations(JOB_STATUSES, 2):
        job_id = _job_in(sessions, old)
        if (old, new) in JOB_MOVES:
            execute(sessions, MOVE_JOB, id=job_id, status=new)
            assert job(sessions, job_id).status == new
        else:
            with pytest.raises(IntegrityError, match=f"is {old}: a terminal job|may not go from {old} to {new}"):
                execute(sessions, MOVE_JOB, id=job_id, status=new)
            assert job(sessions, job_id).status == old


def test_a_stage_moves_only_as_the_ledger_says(sessions: Sessions) -> None:
    for old, new in itertools.permutations(STAGE_STATUSES, 2):
        job_id = _stage_in(sessions, old)
        if (old, new) in STAGE_MOVES:
            execute(sessions, MOVE_STAGE, id=job_id, status=new)
        else:
            with pytest.raises(IntegrityError, match=f"is {old}: an ended stage|may not go from {old} to {new}"):
                execute(sessions, MOVE_STAGE, id=job_id, status=new)


@pytest.mark.parametrize("status", JOB_TERMINAL)
def test_nothing_of_a_terminal_job_is_ever_changed(sessions: Sessions, status: str) -> None:
    job_id = _job_in(sessions, status)
    changes = {
        "name": "'x'",
        "state_reason": "'{}'",
        "report": "'{}'",
        "verdict": "'met'",
        "finished_at": "now()",
        "cancel_requested_at": "now()",
        "last_sequence": "99",
        "max_attempts": "99",
        "priority": "99",
    }
    for column, value in changes.items():
        with pytest.raises(IntegrityError, match="a terminal job is never changed"):
            execute(sessions, f"UPDATE jobs SET {column} = {value} WHERE id = :id", id=job_id)
    execute(sessions, "UPDATE jobs SET status = status WHERE id = :id", id=job_id)


def test_nothing_of_an_ended_stage_is_ever_changed(sessions: Sessions) -> None:
    job_id = _stage_in(sessions, "succeeded")
    for column, value in {"report": "'{}'", "attempt": "9", "progress": "0.5", "message": "'x'"}.items():
        with pytest.raises(IntegrityError, match="an ended stage is never changed"):
            execute(sessions, f"UPDATE stage_runs SET {column} = {value} WHERE job_id = :id", id=job_id)


def test_an_attempt_changes_by_a_claim_alone(sessions: Sessions) -> None:
    job_id = submit(sessions, max_attempts=9)
    claim(sessions)
    for attempt in (0, 2, 8):
        with pytest.raises(IntegrityError, match=f"attempt may not go from 1 to {attempt}"):
            execute(sessions, "UPDATE jobs SET attempt = :attempt WHERE id = :id", id=job_id, attempt=attempt)


def test_a_claim_is_one_attempt_more_and_no_other_number(sessions: Sessions) -> None:
    job_id = submit(sessions, max_attempts=9)
    for attempt in (0, 2):
        with pytest.raises(IntegrityError, match="attempt may not go"):
            execute(
                sessions,
                "UPDATE jobs SET status = 'running', lease_token = gen_random_uuid(), attempt = :n WHERE id = :id",
                id=job_id,
                n=attempt,
            )


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        ("UPDATE jobs SET status = 'paused'", "may not go from queued to paused"),
        ("UPDATE jobs SET max_attempts = -1", "ck_jobs_attempt"),
        ("UPDATE jobs SET lease_token = gen_random_uuid()", "ck_jobs_lease"),
        ("INSERT INTO jobs SELECT (jsonb_populate_record(j, '{\"id\": \"01990000-0000-7000-8000-00000000000f\","
         " \"status\": \"paused\"}')).* FROM jobs j", "ck_jobs_status"),
        ("INSERT INTO stage_runs (job_id, position, kind, status) SELECT id, 7, 'x', 'paused' FROM jobs",
         "ck_stage_runs_status"),
        ("INSERT INTO stage_runs (job_id, position, kind) SELECT id, 0, 'x' FROM jobs", "pk_stage_runs"),
        ("INSERT INTO job_events (job_id, sequence, attempt, kind) SELECT id, 1, 0, 'again' FROM jobs",
         "pk_job_events"),
        ("INSERT INTO artifacts (id, account_id, role, name, format, key, sha256, size_bytes, status)"
         " SELECT gen_random_uuid(), account_id, 'm', 'm', 'onnx', 'k', '', 1, 'lost' FROM jobs",
         "ck_artifacts_status"),
        ("INSERT INTO artifacts (id, account_id, job_id, stage_position, role, name, format, key, sha256, size_bytes)"
         " SELECT gen_random_uuid(), account_id, id, 9, 'm', 'm', 'onnx', 'k', '', 1 FROM jobs",
         "fk_artifacts_job_id_stage_position_stage_runs"),
        ("INSERT INTO artifacts (id, account_id, role, name, format, key, sha256, size_bytes)"
         " SELECT gen_random_uuid(), account_id, 'm', 'm', 'onnx', 'same', '', 1 FROM jobs, generate_series(1, 2)",
         "uq_artifacts_key"),
    ],
)
def test_what_no_row_may_be_is_refused(sessions: Sessions, statement: str, constraint: str) -> None:
    submit(sessions)
    with pytest.raises(IntegrityError, match=constraint):
        execute(sessions, statement)


def test_an_account_leaves_with_all_that_it_owns(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    lifecycle.cancel(sessions, owner, job_id)
    repeats.retry(sessions, owner, job_id, "again")
    execute(sessions, "DELETE FROM accounts WHERE id = :id", id=owner)
    for table in ("jobs", "stage_runs", "job_events", "artifacts", "idempotency_keys"):
        with transaction(sessions) as session:
            assert session.scalar(text(f"SELECT count(*) FROM {table}")) == 0


# ---------------------------------------------------------------- who watches is told


def test_watchers_are_told_of_every_event_but_a_submit_and_a_claim(settings: Settings, sessions: Sessions) -> None:
    with psycopg.connect(settings.database_url.replace("+psycopg", ""), autocommit=True) as watcher:
        watcher.execute("LISTEN burnish_job")
        job_id = submit(sessions)
        lease = claim(sessions).lease
        lifecycle.start_stage(sessions, lease, 0)
        lifecycle.settle(sessions, lease, "failed", Reason("bug", "No."))
        told = [notice.payload for notice in watcher.notifies(timeout=10, stop_after=2)]
        more = [notice.payload for notice in watcher.notifies(timeout=0.1)]
        watchers.tell(sessions, job_id)
        claimed = [notice.payload for notice in watcher.notifies(timeout=10, stop_after=1)]
    assert (told, more, claimed) == ([str(job_id)] * 2, [], [str(job_id)])
