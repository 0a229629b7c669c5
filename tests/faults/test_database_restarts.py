"""Postgres dies and comes back in the middle of a claim, a heartbeat, a stage's end, a settle and a submit."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import select, text

from burnish.local import crew
from shared import lifecycle
from shared.db import transaction
from shared.errors import DatabaseUnavailable
from shared.models import Job
from shared.settings import Settings
from tests.faults.ground import Ground, reached, wait_until
from tests.faults.own import OwnServer, own_server
from tests.faults.proxy import Proxy, port_of
from tests.faults.test_database import beats, by_way_of, lease_of, opened

WORK = ("baseline_measured", "stage_started", "stage_finished", "stage_started", "stage_finished")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    with pytest.MonkeyPatch.context() as patch, own_server("postgres", tmp_path_factory.mktemp("postgres")) as server:
        patch.setattr(crew, "MAX_DOUBLINGS", 0)  # however often it is killed, it comes back as soon
        yield server


@pytest.fixture
def settings(settings: Settings, postgres: OwnServer) -> Iterator[Settings]:
    own = postgres.settings.database_url
    yield settings.model_copy(update={"database_url": own})
    with psycopg.connect(own.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("TRUNCATE accounts, workers CASCADE")


@pytest.fixture
def proxy(settings: Settings) -> Iterator[Proxy]:
    """Between who is struck and the database."""
    with Proxy(port_of(settings.database_url)) as proxy:
        yield proxy


def told(ground: Ground, job_id: UUID) -> list[str]:
    """The kinds of the job's committed events."""
    return [event.kind for event in ground.events(job_id) if event.kind not in ("progress", "log")]


def succeeds_undisturbed(ground: Ground, job_id: UUID) -> None:
    """The job succeeds in its first attempt, and everything in it was written once."""

    def ended() -> bool:
        try:
            ground.sweep()
            return ground.job(job_id).status in ("succeeded", "failed")
        except DatabaseUnavailable:
            return False

    wait_until(ended, "the job's end")
    job = ground.job(job_id)
    assert (job.status, job.attempt, job.crashes) == ("succeeded", 1, 0), ground.reason(job_id)
    assert told(ground, job_id) == ["submitted", "claimed", *WORK, "succeeded"]


# ---------------------------------------------------------------- between two statements

IN = "Postgres immediate restart in claim, heartbeat, settle, submit"


# How much of the work is committed as it strikes: at `event.written` the job's end is written, and not committed.
@pytest.mark.fault(25, IN)
@pytest.mark.parametrize(
    ("point", "num_committed"),
    [
        ("claim.committed", 0),
        ("stage.stored", 2),
        ("stage.committed", 3),
        ("event.written", 5),
        ("ending.stored", 5),
    ],
)
def test_a_restart_of_the_database_is_waited_out(
    ground: Ground, postgres: OwnServer, point: str, num_committed: int
) -> None:
    gate = ground.directory / "gate"
    job_id = ground.submit()
    ground.start_worker(f"{point}=wait:{gate}")
    reached(gate)
    assert told(ground, job_id) == ["submitted", "claimed", *WORK[:num_committed]]
    postgres.kill(signal.SIGQUIT)  # an immediate shutdown: no farewell, and a recovery
    gate.unlink()
    succeeds_undisturbed(ground, job_id)


# ---------------------------------------------------------------- within a statement


@contextmanager
def locked(ground: Ground, statement: str) -> Iterator[psycopg.Connection]:
    """Have whoever needs what the statement locks wait for it, within the database."""
    holder = psycopg.connect(ground.settings.database_url.replace("+psycopg", ""))
    try:
        holder.execute(statement)
        yield holder
    finally:
        holder.close()


def is_within(ground: Ground, statement: str, *, waiting: bool = False) -> bool:
    """Whether the database is at work on a statement in which this stands, or waits for a lock in it."""
    asked = """
        SELECT count(*) FROM pg_stat_activity
        WHERE state = 'active' AND pid <> pg_backend_pid() AND position(:statement IN query) > 0
          AND (wait_event_type = 'Lock' OR NOT :waiting)
    """
    with transaction(ground.sessions) as session:
        return bool(session.scalar(text(asked), {"statement": statement, "waiting": waiting}))


def stand_in(ground: Ground, proxy: Proxy, holder: psycopg.Connection, statement: str, *, committed: bool) -> None:
    """Wait until the database stands within the statement; or have it carried out, and its answer never arrive."""
    wait_until(lambda: is_within(ground, statement, waiting=True), f"the lock to stop {statement}")
    if committed:
        proxy.blackhole()
        holder.rollback()
        wait_until(lambda: not is_within(ground, statement), f"{statement} to be carried out")


def restart(ground: Ground, postgres: OwnServer, proxy: Proxy) -> None:
    postgres.kill(signal.SIGQUIT)
    ground.sessions.kw["bind"].dispose()  # our own connections died with the server
    proxy.cut()  # and whoever still waits for an answer learns that there will be none
    proxy.heal()


@pytest.mark.fault(25, IN)
@pytest.mark.parametrize("committed", [False, True])
def test_a_restart_within_a_claim_is_waited_out(
    ground: Ground, postgres: OwnServer, proxy: Proxy, committed: bool
) -> None:
    job_id = ground.submit()
    with locked(ground, "LOCK TABLE job_events IN SHARE MODE") as holder:
        ground.start_worker(settings=by_way_of(proxy, ground.settings))
        stand_in(ground, proxy, holder, "need AS", committed=committed)
        assert told(ground, job_id) == (["submitted", "claimed"] if committed else ["submitted"])
        restart(ground, postgres, proxy)
    succeeds_undisturbed(ground, job_id)


@pytest.mark.fault(25, IN)
@pytest.mark.parametrize("committed", [False, True])
def test_a_restart_within_a_heartbeat_is_waited_out(
    ground: Ground, postgres: OwnServer, proxy: Proxy, committed: bool
) -> None:
    gate = ground.directory / "gate"
    job_id = ground.submit(f"wait 0 {gate}")
    ground.start_worker(settings=by_way_of(proxy, ground.settings))
    reached(gate)
    with locked(ground, "SELECT FROM jobs FOR UPDATE") as holder:
        before = lease_of(ground, job_id)
        stand_in(ground, proxy, holder, "UPDATE jobs SET lease_expires_at", committed=committed)
        struck = lease_of(ground, job_id)
        assert (struck > before) == committed
        assert told(ground, job_id) == ["submitted", "claimed", "baseline_measured", "stage_started"]
        assert "heartbeat_failed" not in ground.log()
        restart(ground, postgres, proxy)
    wait_until(lambda: "heartbeat_failed" in ground.log(), "the worker to learn of it")
    beats(ground, job_id, times=2)
    gate.unlink()
    succeeds_undisturbed(ground, job_id)


@pytest.mark.fault(25, IN)
@pytest.mark.parametrize("committed", [False, True])
def test_a_restart_within_a_stages_end_is_waited_out(
    ground: Ground, postgres: OwnServer, proxy: Proxy, committed: bool
) -> None:
    gate = ground.directory / "gate"
    job_id = ground.submit(f"wait 0 {gate}")
    ground.start_worker(settings=by_way_of(proxy, ground.settings))
    reached(gate)
    with locked(ground, "LOCK TABLE artifacts IN SHARE MODE") as holder:
        gate.unlink()
        stand_in(ground, proxy, holder, "WITH seen AS", committed=committed)
        assert told(ground, job_id) == ["submitted", "claimed", *WORK[: 2 + committed]]
        assert ground.stages(job_id)[0].status == ("succeeded" if committed else "running")
        restart(ground, postgres, proxy)
    succeeds_undisturbed(ground, job_id)


def submitted(ground: Ground, key: str) -> UUID | None:
    try:
        return ground.submit(idempotency_key=key)
    except DatabaseUnavailable:
        return None


def jobs(ground: Ground) -> list[UUID]:
    with transaction(ground.sessions) as session:
        return list(session.scalars(select(Job.id).order_by(Job.id)))


@pytest.mark.fault(25, IN)
@pytest.mark.parametrize("committed", [False, True])
def test_a_restart_within_a_submit_leaves_one_job(
    ground: Ground, postgres: OwnServer, proxy: Proxy, committed: bool
) -> None:
    far = copy.copy(ground)

    def submit() -> UUID:
        if committed:
            return far.submit(idempotency_key="one")  # finds out by itself what it did
        return wait_until(lambda: submitted(far, "one"), "the submit to get through")

    with opened(by_way_of(proxy, ground.settings)) as far.sessions, ThreadPoolExecutor(1) as pool:
        with locked(ground, "LOCK TABLE idempotency_keys IN SHARE MODE") as holder:
            submitting = pool.submit(submit)
            stand_in(ground, proxy, holder, "INSERT INTO idempotency_keys", committed=committed)
            written = jobs(ground)
            assert len(written) == committed
            assert not submitting.done()
            restart(ground, postgres, proxy)
        job_id = submitting.result()
    assert written in ([], [job_id])
    assert jobs(ground) == [job_id] == [ground.submit(idempotency_key="one")]
    ground.start_worker()
    succeeds_undisturbed(ground, job_id)


@pytest.mark.fault(25, IN)
def test_submits_throughout_a_restart_are_each_one_job(ground: Ground, postgres: OwnServer) -> None:
    restarting = threading.Thread(target=postgres.kill, args=(signal.SIGQUIT,))
    made, refused = [ground.submit(idempotency_key="0")], 0
    restarting.start()
    while restarting.is_alive():
        job_id = submitted(ground, str(len(made)))  # the same again until it gets through
        if job_id is None:
            refused += 1
        else:
            made.append(job_id)
    assert refused
    made.append(wait_until(lambda: submitted(ground, str(len(made))), "a submit to get through"))
    assert [ground.submit(idempotency_key=str(number)) for number in range(len(made))] == made
    assert jobs(ground) == sorted(made)
    for job_id in made:
        assert lifecycle.cancel(ground.sessions, ground.account_id, job_id) == "cancelled"
