"""33: Postgres is set back to an older state, and storage is not: what both hold is brought into line."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text

from shared import backup, lifecycle, retention
from shared.db import Sessions, transaction
from shared.errors import DatabaseUnavailable, LeaseLost
from shared.settings import Settings
from shared.storage import Storage
from tests.audit import orphans
from tests.faults.ground import Ground, children, reached, wait_until

AT_ONCE = {"orphan_grace_seconds": 0.0, "presign_seconds": 0}


class Snapshot:
    """The test's database as it was once, and the way back to it, as an operator goes it."""

    def __init__(self, settings: Settings) -> None:
        url, _, self._name = settings.database_url.replace("+psycopg", "").rpartition("/")
        self._administration = psycopg.connect(f"{url}/postgres", autocommit=True)
        self._kept = f"{self._name}_kept"

    def take(self) -> None:
        self._end_connections()
        self._execute("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", self._kept, self._name)
        self._execute("ALTER DATABASE {} ALLOW_CONNECTIONS true", self._name)

    def set_back(self) -> None:
        self._end_connections()
        self._execute("DROP DATABASE {} WITH (FORCE)", self._name)
        self._execute("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy", self._name, self._kept)

    def close(self) -> None:
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", self._kept)
        self._administration.close()

    def _end_connections(self) -> None:
        """The service's: it meets a server that does not take any, as in a restore."""
        self._execute("ALTER DATABASE {} ALLOW_CONNECTIONS false", self._name)
        end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s"
        ended = lambda: self._administration.execute(end, (self._name,)).fetchone() == (0,)  # noqa: E731
        wait_until(ended, "every connection's end")

    def _execute(self, statement: str, *names: str) -> None:
        self._administration.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))  # type: ignore[arg-type]


@pytest.fixture
def snapshot(settings: Settings) -> Iterator[Snapshot]:
    made = Snapshot(settings)
    yield made
    made.close()


def back(ground: Ground) -> None:
    """Wait until the database answers again: connections of before are found to be dead one by one."""

    def answers() -> bool:
        try:
            ground.workers()
        except DatabaseUnavailable:
            return False
        return True

    wait_until(answers, "the database to answer")


@pytest.mark.fault(33, "Postgres restored to an older state than S3")
def test_a_database_that_was_set_back_is_brought_into_line_with_storage(
    ground: Ground, snapshot: Snapshot, sessions: Sessions, storage: Storage
) -> None:
    expected = ground.faultless_result()
    old = ground.submit(idempotency_key="old")
    assert ground.work() == "succeeded"
    gates = [ground.directory / f"gate-{stage}" for stage in (0, 1)]
    running = ground.submit("; ".join(f"wait {stage} {gate}" for stage, gate in enumerate(gates)))
    ground.start_worker(BURNISH_LEASE_SECONDS="5")
    reached(gates[0])
    waiting = ground.submit(idempotency_key="waiting")
    snapshot.take()
    back(ground)

    # What happens now is forgotten: a stage ends, a job is submitted, another one is removed as too old.
    gates[0].unlink()
    reached(gates[1])
    lost = ground.submit("lost", idempotency_key="lost")
    held = ground.claim()
    assert held.lease.job_id == waiting
    key = f"accounts/{ground.account_id}/jobs/{waiting}/{held.attempt}/0/unknown"
    storage.put_bytes(b"of an attempt that the ledger will not know", key)
    ground.execute("DELETE FROM jobs WHERE id = :id", id=old)
    gone = {name for name in storage.list_keys() if str(old) in name}
    for name in gone:
        storage.remove(name)

    snapshot.set_back()
    back(ground)
    assert backup.revoke_leases(sessions) == 1
    assert set(retention.missing_files(sessions, storage)) == gone
    with pytest.raises(LeaseLost):
        lifecycle.start_stage(sessions, held.lease, 0)
    # Whoever was told that his job is there sends it again by its key; those that are there are not doubled.
    assert ground.submit(idempotency_key="waiting") == waiting
    again = ground.submit("lost", idempotency_key="lost")
    assert again != lost

    wait_until(lambda: not children(running), "the old attempt's end")
    gates[1].unlink()
    wait_until(ground.sweep, "the job to be requeued")
    for gate in gates:
        reached(gate).unlink()
    for job_id in (running, waiting, again):
        assert ground.wait_for(job_id).status == "succeeded", ground.reason(job_id)
        assert ground.result(job_id) == expected
    [lapsed] = ground.events(running, "requeued")
    assert lapsed.data["cause"] == "lost"
    assert (ground.job(running).attempt, ground.job(running).max_attempts) == (2, 4)

    # What no row knows goes by its age. The job whose files are gone goes by its retention, as it had gone before.
    unknown = orphans(sessions, storage)
    assert key in unknown
    assert any(f"{running}/1/0/" in name for name in unknown)
    at_once = ground.settings.model_copy(update=AT_ONCE)
    assert retention.collect(sessions, storage, at_once).files == len(unknown)
    assert orphans(sessions, storage) == set()
    with transaction(sessions) as session:
        session.execute(text("SET LOCAL session_replication_role = replica"))  # which may change an ended job
        session.execute(text("UPDATE jobs SET finished_at = now() - interval '2 days' WHERE id = :id"), {"id": old})
    assert retention.forget_jobs(sessions, storage, days=1) == 1
    assert retention.missing_files(sessions, storage) == []
    assert [ground.job(job_id).status for job_id in (running, waiting, again)] == ["succeeded"] * 3  # for the audit


@pytest.mark.fault(33, "Postgres restored to an older state than S3")
def test_a_worker_notices_by_itself_that_the_ledger_was_set_back(ground: Ground, snapshot: Snapshot) -> None:
    gates = [ground.directory / f"gate-{stage}" for stage in (0, 1)]
    job_id = ground.submit("; ".join(f"wait {stage} {gate}" for stage, gate in enumerate(gates)))
    thread = ground.start_work()
    reached(gates[0])
    snapshot.take()
    back(ground)
    gates[0].unlink()
    reached(gates[1])
    assert ground.events(job_id, "stage_finished")
    until = ground.job(job_id).lease_expires_at
    wait_until(lambda: ground.job(job_id).lease_expires_at != until, "a heartbeat")

    snapshot.set_back()
    back(ground)
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert children(job_id) == []
    assert ground.events(job_id, "stage_finished") == []
    gates[1].unlink()
    ground.execute("UPDATE jobs SET lease_expires_at = now() WHERE status = 'running'")
    assert ground.sweep() == 1
    again = ground.start_work()
    for gate in gates:
        reached(gate).unlink()
    again.join()
    assert ground.job(job_id).status == "succeeded"
