"""The tables change under a living service of two versions: nobody meets an error that a second try does not heal."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
import pytest

from burnish.local.apps import environment_of
from shared import lifecycle
from shared.db import Sessions, statements
from shared.errors import DatabaseUnavailable, OtherTables
from shared.ledger import Capacity, Order, Reason
from tests.audit import audit
from tests.faults import old_ledger
from tests.faults.ground import HERE, Ground, wait_until
from worker import environment

T = TypeVar("T")
PACE_SECONDS = 0.1  # between one submit and the next, of each version: 20 jobs a second
# The lock was not to be had in time, one half of a deadlock, too slow.
RETRIABLE = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.QueryCanceled)


class Load:
    """Two versions of the service that submit and run jobs; all that they meet is tried again, if it may be."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._enough, self._all_submitted = threading.Event(), threading.Event()
        self._url = ground.settings.database_url.replace("+psycopg", "")
        self._order = Order(ground.account_id, "nothing", ground.recipe(), timeout_seconds=600.0)
        self.acknowledged: dict[str, list[UUID]] = {"old": [], "new": []}
        self.refusals: list[DatabaseUnavailable] = []

    def start(self, pool: ThreadPoolExecutor) -> None:
        self._submitting = [pool.submit(self._new_submits), pool.submit(self._old_submits)]
        self._working = [pool.submit(self._new_work), pool.submit(self._old_work)]

    def end(self) -> None:
        """No job more; those that there are are run. Whatever else was raised is raised here."""
        self._enough.set()
        wait(self._submitting, timeout=60)
        self._all_submitted.set()  # before it, a worker that finds no job may be too early
        for future in self._submitting + self._working:
            future.result(timeout=60)

    def goes_on(self, *versions: str) -> None:
        """Wait until these versions have acknowledged some more jobs."""
        known = {version: len(self.acknowledged[version]) for version in versions}
        wait_until(
            lambda: all(len(self.acknowledged[name]) >= before + 5 for name, before in known.items()),
            f"submits to {versions}",
            timeout_seconds=30.0,
        )

    def _until(self, deed: Callable[[], T]) -> T:
        while True:
            try:
                return deed()
            except DatabaseUnavailable as error:
                self.refusals.append(error)
            except RETRIABLE:
                pass
            threading.Event().wait(0.02)

    def _new_submits(self) -> None:
        while not self._enough.wait(PACE_SECONDS):
            key = uuid4().hex
            submit = lambda: lifecycle.submit(self._ground.sessions, self._order, key, 5000)[0]  # noqa: B023, E731
            self.acknowledged["new"].append(self._until(submit))

    def _new_work(self) -> None:
        able = Capacity("new", ["default"], environment.capabilities(), 2**40)
        sessions, reason = self._ground.sessions, Reason("bug", "It broke.")
        while True:
            last = self._all_submitted.is_set()
            claimed = self._until(lambda: lifecycle.claim(sessions, able, 60.0))
            if claimed is None:
                if last:
                    return
                self._all_submitted.wait(0.02)
                continue
            lease = claimed.lease
            self._until(lambda: lifecycle.heartbeat(sessions, lease, 60.0))  # noqa: B023
            self._until(lambda: lifecycle.settle(sessions, lease, "failed", reason))  # noqa: B023

    def _old_submits(self) -> None:
        with psycopg.connect(self._url, autocommit=True, options="-c lock_timeout=10s") as link:
            while not self._enough.wait(PACE_SECONDS):
                key = uuid4().hex
                submit = lambda: old_ledger.submit(link, self._order, key)  # noqa: B023, E731
                self.acknowledged["old"].append(self._until(submit))

    def _old_work(self) -> None:
        with psycopg.connect(self._url, autocommit=True, options="-c lock_timeout=10s") as link:
            while True:
                last = self._all_submitted.is_set()
                claimed = self._until(lambda: old_ledger.claim(link))
                if claimed is None:
                    if last:
                        return
                    self._all_submitted.wait(0.02)
                    continue
                self._until(lambda: old_ledger.fail(link, *claimed))  # noqa: B023


WAITING = """
    SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
    WHERE datname = current_database() AND NOT granted AND mode = 'AccessExclusiveLock'
"""


def migrate(ground: Ground, *command: str) -> None:
    given = {**os.environ, **environment_of(ground.settings)}
    program = [sys.executable, "-m", "alembic", "-c", "migrations/alembic.ini", *command]
    done = subprocess.run(program, cwd=HERE.parents[1], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def num_ended(sessions: Sessions, ids: list[UUID]) -> int:
    with statements(sessions) as connection:
        counted = "SELECT count(*) FROM jobs WHERE id = ANY(%(ids)s) AND status = 'failed'"
        found: Any = connection.exec_driver_sql(counted, {"ids": ids}).scalar_one()
    return int(found)


@pytest.mark.fault(32, "a migration under 20 jobs/s, old and new code")
def test_the_tables_change_under_two_versions_that_submit_and_run_jobs(ground: Ground) -> None:
    load = Load(ground)
    with ThreadPoolExecutor(4) as pool:
        load.start(pool)
        try:
            load.goes_on("old", "new")
            assert load.refusals == []
            migrate(ground, "downgrade", "0002")
            load.goes_on("old")
            migrate(ground, "upgrade", "head")
            load.goes_on("old", "new")
        finally:
            load.end()
    assert any(isinstance(error, OtherTables) for error in load.refusals)  # of the new version on the old tables
    ids = load.acknowledged["old"] + load.acknowledged["new"]
    assert len(set(ids)) == len(ids)
    assert num_ended(ground.sessions, ids) == len(ids)


@pytest.mark.fault(32, "a migration under 20 jobs/s, old and new code")
def test_a_migration_that_cannot_have_its_lock_holds_up_nobody_for_long(ground: Ground) -> None:
    """A transaction that is open for long is all that it takes: everyone would wait behind who waits for that one."""
    url = ground.settings.database_url.replace("+psycopg", "")
    migrate(ground, "downgrade", "0003")  # whose indexes come and go beside everyone
    with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as looker, ThreadPoolExecutor() as pool:
        holder.execute("SELECT count(*) FROM jobs")
        migrating = pool.submit(migrate, ground, "downgrade", "0002")
        wait_until(lambda: looker.execute(WAITING).fetchone() == (1,), "the migration to wait")
        for _ in range(3):  # they wait for less than a second each, and get through
            ground.submit(idempotency_key=uuid4().hex)
        assert not migrating.done()
        holder.rollback()
        migrating.result(timeout=30)
    migrate(ground, "upgrade", "head")
    ground.sessions.kw["bind"].dispose()
    ground.execute("UPDATE jobs SET state_reason = '{\"message\": \"The test is over.\"}'")
    assert audit(ground.sessions, quiet=True) == []
