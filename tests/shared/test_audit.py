"""The audit finds what it is there to find: each law, broken behind the ledger's back, is named."""

from __future__ import annotations

import hashlib

import pytest
from sqlalchemy import text

from shared import lifecycle
from shared.db import Sessions, transaction
from shared.ledger import Reason, Stored
from shared.storage import Storage
from tests.audit import LAWS, QUIET, audit, orphans
from tests.shared.ledger_desk import account, claim, order, stored, submit

REASON = Reason("bug", "No.")
BREAKS = {
    "a remembered submit without its job": "UPDATE idempotency_keys SET job_id = gen_random_uuid()",
    "a job whose stages are not those of its recipe": "UPDATE stage_runs SET kind = 'prune' WHERE position = 0",
    "an ended job without exactly one final event of its status": "UPDATE jobs SET status = 'cancelled' \
        WHERE status = 'succeeded'",
    "a living job with a final event or an end": "UPDATE jobs SET finished_at = now() WHERE status = 'queued'",
    "an ended job with a stage that has not ended": "UPDATE stage_runs SET status = 'pending' WHERE position = 1",
    "a failed job that does not say why": "UPDATE jobs SET state_reason = NULL WHERE status = 'failed'",
    "a stage finished twice, or by another attempt than it says": "UPDATE stage_runs SET attempt = 7 \
        WHERE status = 'succeeded'",
    "a running stage of a job that does not run": "UPDATE stage_runs SET status = 'running' WHERE position = 1",
    "a gap in a job's events": "DELETE FROM job_events WHERE sequence = 2",
    "an event that may not follow the one before it": "UPDATE job_events SET kind = 'submitted' WHERE kind = 'claimed'",
    "a worker's event outside of a claim": "UPDATE job_events SET kind = 'log' WHERE kind = 'claimed'",
    "an attempt that its claims do not account for": "UPDATE jobs SET attempt = attempt + 1",
    "an artifact of another attempt than its stage's": "UPDATE artifacts SET attempt = 7",
    "an artifact of another account than its job's": "UPDATE jobs SET account_id = (SELECT id FROM accounts \
        WHERE name = 'another') WHERE status = 'succeeded'",
    "a lease on a job that does not run, or a running job without one": "UPDATE jobs SET worker_id = 'w' \
        WHERE status = 'queued'",
    "a count of an account's jobs or bytes that a recount does not give": "UPDATE account_usage SET active_jobs = 7",
}


@pytest.fixture
def history(sessions: Sessions) -> Sessions:
    """A job that succeeded, one that failed and one that waits, and nothing wrong with any."""
    owner, _another = account(sessions), account(sessions, "another")
    lifecycle.submit(sessions, order(owner), "key")
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    lifecycle.finish_stage(sessions, lease, 0, "succeeded", {}, [stored()])
    lifecycle.settle(sessions, lease, "succeeded", None, {"verdict": "met"})
    submit(sessions, owner)
    lifecycle.settle(sessions, claim(sessions).lease, "failed", REASON)
    waiting = submit(sessions, owner)
    lifecycle.explain_waiting(sessions, waiting, REASON)
    return sessions


def _behind_the_ledgers_back(sessions: Sessions, statement: str) -> None:
    """Without its triggers."""
    with transaction(sessions) as session:
        session.execute(text("SET LOCAL session_replication_role = replica"))
        session.execute(text(statement))


def test_an_honest_history_breaks_no_law(history: Sessions) -> None:
    assert audit(history, quiet=True) == []


@pytest.mark.parametrize("law", BREAKS)
def test_a_broken_law_is_named(history: Sessions, law: str) -> None:
    _behind_the_ledgers_back(history, BREAKS[law])
    assert law in {finding.rpartition(": ")[0] for finding in audit(history)}


def test_every_law_is_broken_by_some_test() -> None:
    assert set(LAWS) - set(BREAKS) == {"a connection idle in a transaction"}


def test_a_job_that_runs_or_waits_for_no_reason_is_not_quiet(history: Sessions) -> None:
    submit(history)
    [law] = QUIET
    assert [finding.rpartition(": ")[0] for finding in audit(history, quiet=True)] == [law]
    assert audit(history) == []


def test_files_are_looked_up_in_storage(sessions: Sessions, storage: Storage) -> None:
    data = b"engine"
    good = Stored("engine", "engine.zip", "engine", "a/good", hashlib.sha256(data).hexdigest(), len(data))
    storage.put_bytes(data, "a/good")
    storage.put_bytes(data, "a/orphan")
    submit(sessions)
    lease = claim(sessions).lease
    lifecycle.settle(sessions, lease, "succeeded", None, {"verdict": "met"}, [good, stored("lost.onnx", "a/lost")])
    [finding] = audit(sessions, storage)
    assert finding.startswith("an artifact without its object: a/lost")
    assert orphans(sessions, storage) == {"a/orphan"}
    storage.put_bytes(b"forged", "a/good")
    assert "an artifact whose object is another: a/good" in "".join(audit(sessions, storage))
    for key in list(storage.list_keys()):
        storage.remove(key)
