"""The audit finds what it is there to find: each law, broken behind the ledger's back, is named."""

from __future__ import annotations

import hashlib
import subprocess
import threading
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import text

from shared import lifecycle
from shared.db import Sessions, transaction
from shared.ledger import Reason, Stored
from shared.settings import Settings
from shared.storage import Storage
from tests.audit import IDLE, LAWS, QUIET, audit, half_uploads, leftovers, orphans
from tests.faults.ground import changed_results, tiny_jobs
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
    assert set(LAWS) == set(BREAKS)


def test_a_connection_that_is_left_in_a_transaction_is_told_however_new_it_is(history: Sessions) -> None:
    with history() as session:
        session.execute(text("SELECT 1"))
        for quiet in (False, True):
            [finding] = audit(history, quiet=quiet)
            assert finding.startswith(f"{IDLE}: ")
        session.rollback()
        assert audit(history) == []


def test_a_connection_between_two_statements_is_waited_for(history: Sessions) -> None:
    over = threading.Event()

    def work() -> None:
        with history() as session:
            while not over.wait(0.01):
                session.execute(text("SELECT 1"))
                session.commit()

    working = threading.Thread(target=work)
    working.start()
    assert audit(history) == []
    over.set()
    working.join()


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
    empty(storage)


def empty(storage: Storage) -> None:
    for key in list(storage.list_keys()):
        storage.remove(key)


@pytest.mark.parametrize(
    ("place", "finding"),
    [
        ("{lost}/1/0/{sha256}/model.onnx", None),
        ("{done}/1/log/{sha256}/attempt-1.log", None),
        ("{done}/2/0/{sha256}/model.onnx", "an orphan of an attempt that succeeded"),
        ("{done}/3/0/{sha256}/model.onnx", "an object that no attempt can have left"),
        ("{done}/1/model.onnx", "an object that no attempt can have left"),
        ("{gone}/1/0/{sha256}/model.onnx", "an object that no attempt can have left"),
        ("elsewhere/model.onnx", "an object that no attempt can have left"),
        ("uploads/{sha256}", "an upload of no row"),
        ("incoming/{sha256}", "an upload of no row"),
    ],
)
def test_an_object_of_no_row_is_told_unless_a_lost_attempt_left_it(
    sessions: Sessions, storage: Storage, place: str, finding: str | None
) -> None:
    owner = account(sessions)
    done, lost = submit(sessions, owner), submit(sessions, owner)
    lifecycle.requeue(sessions, claim(sessions).lease, REASON, cause="given_back")
    lifecycle.settle(sessions, claim(sessions).lease, "succeeded", None, {"verdict": "met"})
    lifecycle.settle(sessions, claim(sessions).lease, "failed", REASON)
    folders = {"done": done, "lost": lost, "gone": uuid4()}
    told = {name: f"accounts/{owner}/jobs/{job_id}" for name, job_id in folders.items()}
    storage.put_bytes(b"", key := place.format(sha256="ab" * 32, **told))
    found = audit(sessions, storage, quiet=True) + half_uploads(sessions, storage)
    assert found == ([f"{finding}: {key}"] if finding else [])
    empty(storage)


# ---------------------------------------------------------------- what is left on the machine, and other bytes


def test_a_directory_that_an_attempt_left_is_told(tmp_path: Path) -> None:
    left = tmp_path / "work" / f"{uuid4()}-1"
    left.mkdir(parents=True)
    assert leftovers(tmp_path) == [f"a directory left over: {left}"]
    left.rmdir()
    assert leftovers(tmp_path) == []


def test_a_process_that_was_left_is_told_once_it_had_time_to_end(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"], cwd=tmp_path) as process:
        assert leftovers(tmp_path) == [f"a process left over: {process.pid} sleep in {tmp_path}"]
        process.kill()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("was_killed", [False, True])
def test_a_ground_clears_up_after_killed_workers_alone(
    settings: Settings, sessions: Sessions, storage: Storage, tmp_path: Path, was_killed: bool
) -> None:
    left = tmp_path / "work" / f"{uuid4()}-1"
    left.mkdir(parents=True)
    with tiny_jobs(settings, sessions, storage, tmp_path) as ground:
        process = ground.start(["sleep", "600"])
        if was_killed:
            process.kill()
            process.wait()
    assert left.exists() != was_killed
    empty(storage)


def test_a_result_of_other_bytes_is_told(
    settings: Settings, sessions: Sessions, storage: Storage, tmp_path: Path
) -> None:
    with tiny_jobs(settings, sessions, storage, tmp_path) as ground:
        job_id = ground.submit("epochs 0 2; large 1 50000")
        assert ground.work() == "succeeded", ground.reason(job_id)
        assert changed_results(sessions, storage) == []
        for change in (f"sha256 = '{'ab' * 32}'", "stage_position = NULL"):
            ground.execute(f"UPDATE artifacts SET {change} WHERE name = '0-quantize.onnx'")
            [finding] = changed_results(sessions, storage)
            assert finding.startswith(f"job {job_id} made other bytes than it would have undisturbed")
    empty(storage)
