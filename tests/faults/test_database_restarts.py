"""Postgres dies and comes back in the middle of a claim, a heartbeat, a settle and a submit."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterator
from uuid import UUID

import psycopg
import pytest

from shared.db import make_sessions
from shared.errors import DatabaseUnavailable
from shared.settings import Settings
from tests.faults.ground import Ground, reached, wait_until
from tests.faults.own import OwnServer, own_server
from tests.faults.proxy import Proxy, port_of, through


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    with own_server("postgres", tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture
def settings(settings: Settings, postgres: OwnServer) -> Iterator[Settings]:
    own = postgres.settings.database_url
    yield settings.model_copy(update={"database_url": own})
    with psycopg.connect(own.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("TRUNCATE accounts, workers CASCADE")


def succeeds_after(ground: Ground, job_id: UUID) -> None:
    def ended() -> bool:
        try:
            ground.sweep()
            return ground.job(job_id).status in ("succeeded", "failed")
        except DatabaseUnavailable:
            return False

    wait_until(ended, "the job's end")
    assert ground.job(job_id).status == "succeeded", ground.reason(job_id)


# In `event.written` the change is made and not committed; the third is the end of a stage, the sixth the job's.
@pytest.mark.fault(25, "Postgres immediate restart in claim, heartbeat, settle, submit")
@pytest.mark.parametrize("point", ["claim.committed", "event.written@3", "event.written@6", "ending.stored"])
def test_a_restart_of_the_database_is_waited_out(ground: Ground, postgres: OwnServer, point: str) -> None:
    gate = ground.directory / "gate"
    name, _, nth = point.partition("@")
    job_id = ground.submit()
    ground.start_worker(f"{name}=wait:{gate}@{nth or 1}", BURNISH_LEASE_SECONDS="30")
    reached(gate)
    postgres.kill(signal.SIGQUIT)  # an immediate shutdown: no farewell, and a recovery
    gate.unlink()
    succeeds_after(ground, job_id)
    job = ground.job(job_id)
    assert (job.attempt, job.crashes) == (1, 0)


@pytest.mark.fault(25, "Postgres immediate restart in claim, heartbeat, settle, submit")
def test_a_submit_in_mid_restart_is_one_job(ground: Ground, postgres: OwnServer) -> None:
    far = copy.copy(ground)
    with Proxy(port_of(ground.settings.database_url)) as proxy:
        far.sessions = make_sessions(
            ground.settings.model_copy(update={"database_url": through(proxy, ground.settings.database_url)})
        )
        proxy.lose_answer(b"INSERT INTO idempotency_keys")
        restarting = threading.Thread(target=postgres.kill, args=(signal.SIGQUIT,))
        restarting.start()
        ids = {wait_until(lambda: submitted(far), "a submit to get through") for _ in range(3)}
        restarting.join()
        [job_id] = ids | {wait_until(lambda: submitted(far), "a submit to get through")}
        far.sessions.kw["bind"].dispose()
    ground.sessions.kw["bind"].dispose()  # our own connections died with the server
    ground.start_worker()
    succeeds_after(ground, job_id)


def submitted(ground: Ground) -> UUID | None:
    try:
        return ground.submit(idempotency_key="one")
    except DatabaseUnavailable:
        return None
