"""The database is slow, silent, cut off, locked, read-only, full or has another idea of the time."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import psycopg
import pytest
from psycopg import errors, sql
from sqlalchemy.exc import OperationalError

from shared import lifecycle
from shared.db import Sessions, make_sessions, ping
from shared.errors import DatabaseUnavailable
from shared.models import JOB_TERMINAL
from shared.settings import Settings
from tests.api.desk import Desk, open_desk
from tests.faults.ground import Ground, children, reached, suspended, wait_until
from tests.faults.proxy import Proxy, port_of, through


@pytest.fixture
def proxy(settings: Settings) -> Iterator[Proxy]:
    """Between the service and its database."""
    with Proxy(port_of(settings.database_url)) as proxy:
        yield proxy


def by_way_of(proxy: Proxy, settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update={"database_url": through(proxy, settings.database_url), **changes})


@contextmanager
def opened(settings: Settings) -> Iterator[Sessions]:
    sessions = make_sessions(settings)
    ping(sessions)  # as a worker's are used by its claim, before threads that begin at once open more connections
    try:
        yield sessions
    finally:
        sessions.kw["bind"].dispose()


def administration(settings: Settings) -> psycopg.Connection:
    """A connection of our own, to another database of the same server."""
    url = settings.database_url.replace("+psycopg", "").rpartition("/")[0] + "/postgres"
    return psycopg.connect(url, autocommit=True)


def name_of(settings: Settings) -> str:
    return settings.database_url.rpartition("/")[2]


def terminate_all(connection: psycopg.Connection, database: str) -> None:
    connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database])


def is_refusal(answer: httpx.Response) -> bool:
    """Whether it says: try again, and when."""
    return answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0


# ---------------------------------------------------------------- time


@contextmanager
def jumping_clock(ground: Ground) -> Iterator[psycopg.Connection]:
    """Every new connection's now() is that of a clock which `UPDATE clock.shift SET by = ...` sets wrong."""
    with administration(ground.settings) as server:
        database = sql.Identifier(name_of(ground.settings))
        with psycopg.connect(ground.settings.database_url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute("CREATE SCHEMA clock")
            connection.execute("CREATE TABLE clock.shift AS SELECT interval '0' AS by")
            connection.execute(
                "CREATE FUNCTION clock.now() RETURNS timestamptz STABLE LANGUAGE sql "
                "AS 'SELECT pg_catalog.now() + by FROM clock.shift'"
            )
            server.execute(sql.SQL("ALTER DATABASE {} SET search_path = clock, pg_catalog, public").format(database))
            ground.sessions.kw["bind"].dispose()  # so that the next connections have the new path
            yield connection


def stands_still(connection: psycopg.Connection) -> bool:
    """Whether nobody else is at anything in this database."""
    asked = """
        SELECT FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle' LIMIT 1
    """
    return connection.execute(asked).fetchone() is None


@pytest.mark.fault(15, "database clock jumps")
@pytest.mark.parametrize(("jump", "num_lapsed"), [("1 hour", 1), ("-1 hour", 0)])
def test_a_jump_of_the_databases_clock_costs_an_attempt_at_most(ground: Ground, jump: str, num_lapsed: int) -> None:
    """Between jump and sweep the worker stands still, or a heartbeat would renew its lease by the new clock.

    The tables' defaults do not jump: they call the now() that was meant as the tables were made.
    """
    expected = ground.faultless_result()
    gate = ground.directory / "gate"
    with jumping_clock(ground) as clock:
        job_id = ground.submit(f"wait 1 {gate}", timeout_seconds=86400.0)
        worker = ground.start_worker()
        reached(gate)
        with suspended(psutil.Process(worker.pid)):
            wait_until(lambda: stands_still(clock), "the worker's last statement to end")
            clock.execute(f"UPDATE clock.shift SET by = interval '{jump}'")
            assert ground.sweep() == num_lapsed
            assert ground.job(job_id).status == ("queued" if num_lapsed else "running")

        def ended() -> bool:
            gate.unlink(missing_ok=True)  # of either attempt
            return ground.job(job_id).status in JOB_TERMINAL

        wait_until(ended, "the job's end")
        job = ground.job(job_id)
        assert job.status == "succeeded", ground.reason(job_id)
        assert (job.attempt, job.crashes) == (1 + num_lapsed, 0)
        assert [event.data["cause"] for event in ground.events(job_id, "requeued")] == ["lost"] * num_lapsed
        finished = [(event.data["stage"], event.attempt) for event in ground.events(job_id, "stage_finished")]
        assert finished == [(0, 1), (1, 1 + num_lapsed)]
        assert ground.result(job_id) == expected
        clock.execute("UPDATE clock.shift SET by = interval '0'")


# ---------------------------------------------------------------- the network


@pytest.mark.fault(16, "the heartbeat's connection is a blackhole")
def test_a_worker_that_nobody_hears_ends_its_child_before_the_job_is_given_away(ground: Ground, proxy: Proxy) -> None:
    gate = ground.directory / "gate"
    job_id = ground.submit(f"wait 1 {gate}")
    worker = ground.start_worker(settings=by_way_of(proxy, ground.settings, lease_seconds=10.0))
    reached(gate)
    proxy.blackhole()
    wait_until(lambda: not children(job_id), "the worker to fence itself", timeout_seconds=30.0)
    assert ground.sweep() == 0  # its lease holds still
    assert ground.job(job_id).status == "running"
    gate.unlink()
    wait_until(lambda: ground.sweep() == 1, "the lease to lapse", timeout_seconds=30.0)
    again = ground.start_work()
    reached(gate)
    taken = ground.job(job_id).lease_token
    proxy.heal()  # and what the first one had to say arrives after all
    wait_until(lambda: '"attempt_ended"' in ground.log(), "the first worker to give up")
    assert ground.job(job_id).lease_token == taken
    gate.unlink()
    again.join()
    assert ground.job(job_id).status == "succeeded"
    assert worker.poll() is None
    assert [event.attempt for event in ground.events(job_id, "stage_finished")] == [1, 2]


SUBMIT = b"INSERT INTO idempotency_keys"


@pytest.mark.fault(27, "TCP cut after COMMIT was sent")
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_submit_whose_answer_is_lost_is_the_same_job(ground: Ground, proxy: Proxy, times: int) -> None:
    with open_desk(by_way_of(proxy, ground.settings), ground.sessions, ground.storage) as desk:
        body = desk.order()
        proxy.lose_answer(SUBMIT, times)
        answers = []
        while not answers or answers[-1].status_code != 202:
            answers.append(desk.post("/v1/jobs", body, **{"Idempotency-Key": "one"}))
        assert proxy.num_answers_lost == times
        assert all(is_refusal(answer) for answer in answers[:-1])
        assert len(answers) <= (times + 1) // 2 + 1  # the desk itself looks once what became of a write
        jobs = desk.client.get("/v1/jobs").json()["items"]
        assert [job["id"] for job in jobs] == [answers[-1].json()["id"]]
        end(ground, desk)


@pytest.mark.fault(27, "TCP cut after COMMIT was sent")
@pytest.mark.parametrize(("write", "every"), [(b"COMMIT", 3), (b"WITH seen", 2)], ids=["commits", "statements"])
def test_a_worker_whose_writes_are_cut_off_writes_each_of_them_once(
    ground: Ground, proxy: Proxy, write: bytes, every: int
) -> None:
    """Also what is a transaction by itself, in one statement that nobody has to commit."""
    expected = ground.faultless_result()
    with opened(by_way_of(proxy, ground.settings)) as sessions:
        job_id = ground.submit()
        proxy.lose_answer(write, times=3, every=every)
        assert ground.work(ground.tools(sessions, lease_seconds=60.0)) == "succeeded", ground.reason(job_id)
        assert proxy.num_answers_lost == 3
    assert ground.result(job_id) == expected
    kinds = [event.kind for event in ground.events(job_id) if event.kind not in ("progress", "log")]
    assert kinds == [
        *("submitted", "claimed", "baseline_measured"),
        *("stage_started", "stage_finished", "stage_started", "stage_finished", "succeeded"),
    ]


FAR = "Postgres +2 s latency, or a row lock held"


def lease_of(ground: Ground, job_id: UUID) -> datetime:
    expires_at = ground.job(job_id).lease_expires_at
    assert expires_at is not None
    return expires_at


def beats(ground: Ground, job_id: UUID, times: int = 1) -> None:
    """Its lease is renewed so often, and does not lapse meanwhile."""
    for _ in range(times):
        lease = lease_of(ground, job_id)
        wait_until(lambda: lease_of(ground, job_id) > lease, "a heartbeat")  # noqa: B023
        assert ground.sweep() == 0


@pytest.mark.fault(28, FAR)
def test_a_far_database_is_heard_in_time(ground: Ground, proxy: Proxy) -> None:
    """2 s there and back, with production's lease, from a worker's start to its job's end."""
    gate = ground.directory / "gate"
    proxy.delay(1.0)
    job_id = ground.submit(f"epochs 0 1; wait 0 {gate}", recipe=ground.recipe(["build_engine"]))
    changes = {"lease_seconds": 15.0, "heartbeat_seconds": 1.0}
    ground.start_worker(settings=by_way_of(proxy, ground.settings, **changes))
    reached(gate)
    beats(ground, job_id, times=2)
    gate.unlink()
    assert (ground.wait_for(job_id).status, ground.job(job_id).attempt) == ("succeeded", 1), ground.log()
    proxy.heal()


@pytest.mark.fault(28, FAR)
def test_a_running_jobs_row_that_somebody_holds_costs_no_attempt(ground: Ground) -> None:
    gate = ground.directory / "gate"
    job_id = ground.submit(f"wait 0 {gate}; wait 1 {gate}")
    ground.start_worker(settings=ground.settings.model_copy(update={"lease_seconds": 15.0, "lock_seconds": 1.5}))
    reached(gate)
    with psycopg.connect(ground.settings.database_url.replace("+psycopg", "")) as holder:
        holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", [job_id])
        lease = lease_of(ground, job_id)
        gate.unlink()  # so that the stage ends meanwhile
        wait_until(lambda: ground.log().count("heartbeat_failed") >= 3, "three heartbeats to give up")
        assert ground.log().count("LockNotAvailable") >= 3
        assert ground.sweep() == 0
        assert (lease_of(ground, job_id), ground.stages(job_id)[0].status) == (lease, "running")
    reached(gate)  # the stage has ended after all
    beats(ground, job_id, times=2)
    gate.unlink()
    assert (ground.wait_for(job_id).status, ground.job(job_id).attempt) == ("succeeded", 1)


@pytest.mark.fault(28, FAR)
@pytest.mark.parametrize(
    ("limits", "cause"),
    [
        ({"lock_seconds": 0.3}, errors.LockNotAvailable),
        ({"lock_seconds": 60.0, "statement_seconds": 0.3}, errors.QueryCanceled),
    ],
)
def test_a_row_that_somebody_holds_is_given_up_in_time(
    ground: Ground, limits: dict[str, float], cause: type[psycopg.Error]
) -> None:
    job_id, other = ground.submit(), ground.submit()
    url = ground.settings.database_url.replace("+psycopg", "")
    with opened(ground.settings.model_copy(update=limits)) as sessions, psycopg.connect(url) as holder:
        holder.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", [job_id])
        with pytest.raises(DatabaseUnavailable) as given_up:
            lifecycle.cancel(sessions, ground.account_id, job_id)
        assert isinstance(given_up.value.__cause__, OperationalError)
        assert isinstance(given_up.value.__cause__.orig, cause)
        claimed = ground.claim()  # the next one: nobody waits for a row that is held
        assert claimed.lease.job_id == other
        holder.rollback()
        assert lifecycle.cancel(sessions, ground.account_id, job_id) == "cancelled"
        lifecycle.settle(sessions, claimed.lease, "cancelled")


# ---------------------------------------------------------------- a server that refuses


def end(ground: Ground, desk: Desk) -> None:
    """Cancel what the desk was given: these rows are about its answers."""
    for job in desk.client.get("/v1/jobs", params={"status": "queued", "limit": 100}).json()["items"]:
        lifecycle.cancel(ground.sessions, desk.account_id, UUID(job["id"]))


CUT_SECONDS, CUT_EVERY_SECONDS = 60.0, 0.2
NUM_KEYS = 50


@pytest.mark.fault(26, "connections terminated every 200 ms for 60 s")
def test_connections_that_are_cut_again_and_again_are_told_as_503(ground: Ground) -> None:
    with (
        open_desk(ground.settings, ground.sessions, ground.storage) as desk,
        administration(ground.settings) as server,
    ):
        body, stopped, answers = desk.order(), threading.Event(), []

        def terminate() -> None:
            for _ in range(int(CUT_SECONDS / CUT_EVERY_SECONDS)):
                terminate_all(server, name_of(ground.settings))
                stopped.wait(CUT_EVERY_SECONDS)
            stopped.set()

        terminating = threading.Thread(target=terminate)
        terminating.start()
        while not stopped.is_set():
            key = f"key-{len(answers) // 2 % NUM_KEYS}"  # again and again: each is one job, whatever was cut
            answers.append((key, desk.post("/v1/jobs", body, **{"Idempotency-Key": key})))
            answers.append(("", desk.client.get("/v1/jobs")))
        terminating.join()
        refused = [answer for _, answer in answers if answer.status_code not in (200, 202)]
        assert refused
        assert all(is_refusal(answer) for answer in refused), {answer.status_code for answer in refused}

        wait_until(lambda: desk.client.get("/readyz").status_code == 200, "the pool to recover", timeout_seconds=5.0)
        assert {desk.client.get("/v1/jobs").status_code for _ in range(20)} == {200}
        told = {(key, answer.json()["id"]) for key, answer in answers if key and answer.status_code != 503}
        assert told == {(key, desk.submit(body, key=key)["id"]) for key, _ in told}
        assert len(told) == NUM_KEYS
        assert {job["id"] for job in desk.client.get("/v1/jobs?limit=100").json()["items"]} == {one for _, one in told}
        end_all(ground, desk)


def end_all(ground: Ground, desk: Desk) -> None:
    ground.sessions.kw["bind"].dispose()  # our own connections were cut as well
    while desk.client.get("/v1/jobs", params={"status": "queued"}).json()["items"]:
        end(ground, desk)


@pytest.mark.fault(29, "Postgres read-only or disk full")
def test_a_read_only_database_is_told_as_503_and_takes_nothing_half(ground: Ground) -> None:
    with (
        open_desk(ground.settings, ground.sessions, ground.storage) as desk,
        administration(ground.settings) as server,
    ):
        body, name = desk.order(), sql.Identifier(name_of(ground.settings))
        queued = desk.submit(body)
        server.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
        terminate_all(server, name_of(ground.settings))
        wait_until(lambda: desk.client.get("/v1/jobs").status_code == 200, "reads to work")
        for answer in (desk.post("/v1/jobs", body), desk.client.post(f"/v1/jobs/{queued['id']}/cancel")):
            assert is_refusal(answer), answer.text
        assert desk.client.get(f"/v1/jobs/{queued['id']}").json()["status"] == "queued"
        ground.sessions.kw["bind"].dispose()
        with pytest.raises(DatabaseUnavailable):
            ground.claim()
        server.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))
        terminate_all(server, name_of(ground.settings))
        wait_until(lambda: desk.post("/v1/jobs", body).status_code == 202, "writes to work")
        end_all(ground, desk)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, in memory."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0777", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system of a known size can be made here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.fault(29, "Postgres read-only or disk full")
def test_a_full_disk_is_told_as_503_and_takes_nothing_half(ground: Ground, small_disk: Path) -> None:
    name = sql.Identifier("space_" + name_of(ground.settings))
    with (
        open_desk(ground.settings, ground.sessions, ground.storage) as desk,
        administration(ground.settings) as server,
    ):
        body = desk.order()
        server.execute(sql.SQL("CREATE TABLESPACE {} LOCATION {}").format(name, str(small_disk)))
        try:
            for table in ("jobs", "job_events", "stage_runs"):
                ground.execute(f"ALTER TABLE {table} SET TABLESPACE {name.as_string(server)}")
            filler = small_disk / "filler"
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
            refused = wait_until(lambda: submit_until_refused(desk, body), "the disk to be full")
            assert is_refusal(refused), refused.text
            assert desk.client.get("/v1/jobs").status_code == 200
            filler.unlink()
            assert desk.post("/v1/jobs", body).status_code == 202
            end_all(ground, desk)
        finally:
            for table in ("jobs", "job_events", "stage_runs"):
                ground.execute(f"ALTER TABLE {table} SET TABLESPACE pg_default")
            server.execute(sql.SQL("DROP TABLESPACE {}").format(name))


def submit_until_refused(desk: Desk, body: dict[str, object]) -> httpx.Response | None:
    answer = desk.post("/v1/jobs", body)
    return None if answer.status_code == 202 else answer
