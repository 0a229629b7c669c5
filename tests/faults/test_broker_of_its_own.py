"""Valkey killed, read-only, full or locked: consumption resumes by itself, and the service says how it is."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import redis

from shared.settings import Settings
from tests.api.desk import open_desk
from tests.faults.ground import Ground, wait_until
from tests.faults.own import OwnServer, own_server
from tests.faults.test_broker import ONLY_RUNG, doorbell, quick


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    with own_server("valkey", tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def settings(settings: Settings, valkey: OwnServer) -> Settings:
    return settings.model_copy(update={"broker_url": valkey.settings.broker_url})


def rung(ground: Ground) -> None:
    """A job, submitted now, runs because of a ring and nothing else."""
    job_id = quick(ground)
    wait_until(lambda: ground.sweep() or ground.job(job_id).status == "failed", "a ring to be heard")


@pytest.mark.fault(18, "Valkey kill -9 and restart, twice")
def test_workers_hear_again_after_each_restart_of_the_broker(ground: Ground, valkey: OwnServer) -> None:
    worker = ground.start_worker(**ONLY_RUNG)
    rung(ground)
    for _ in range(2):
        valkey.kill()
        rung(ground)
    assert worker.poll() is None


@pytest.mark.fault(18, "Valkey kill -9 and restart, twice")
def test_a_broker_that_dies_as_a_ring_is_taken_leaves_nobody_deaf(ground: Ground, valkey: OwnServer) -> None:
    worker = ground.start_worker(**ONLY_RUNG)
    rung(ground)
    password = valkey.settings.broker_url.split(":")[2].split("@")[0]
    with redis.Redis.from_url(valkey.settings.broker_url) as client, doorbell(ground.settings) as bell:
        wait_until(lambda: any("b" in each["flags"] for each in client.client_list()), "the worker to listen")
        process = psutil.Process(worker.pid)
        process.suspend()
        job_id = quick(ground)
        assert bell.ring_now("default")
        wait_until(lambda: client.llen("default") == 0, "the ring to be on its way")
        valkey.kill()
        client.execute_command("CONFIG", "SET", "requirepass", "another")
        process.resume()
        assert ground.wait_for(job_id).status == "failed"
        client.execute_command("CONFIG", "SET", "requirepass", password)
    rung(ground)


@pytest.mark.fault(20, "Valkey READONLY, OOM, NOAUTH")
@pytest.mark.parametrize(
    ("refusal", "harm", "heal"),
    [
        ("READONLY", ["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"]),
        ("OOM", ["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]),
        ("NOAUTH", ["CONFIG", "SET", "requirepass", "another"], None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broker_that_refuses_is_told_of_and_costs_time_alone(
    ground: Ground, valkey: OwnServer, refusal: str, harm: list[str], heal: list[str] | None
) -> None:
    password = valkey.settings.broker_url.split(":")[2].split("@")[0]
    with redis.Redis.from_url(valkey.settings.broker_url) as client:
        worker = ground.start_worker(**ONLY_RUNG)
        rung(ground)
        looking = ground.start_worker(BURNISH_POLL_SECONDS="0.2")
        client.execute_command(*harm)
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        try:
            with open_desk(ground.settings, ground.sessions, ground.storage) as desk, doorbell(ground.settings) as bell:
                told = desk.client.get("/readyz")
                assert told.status_code == 200
                assert told.json()["status"] == "degraded"
                assert not bell.ring_now("default")
                assert ground.wait_for(quick(ground)).status == "failed"  # found by looking
                assert (worker.poll(), looking.poll()) == (None, None)
        finally:
            client.execute_command(*(heal or ["CONFIG", "SET", "requirepass", password]))
    looking.terminate()
    looking.wait(timeout=60)
    rung(ground)
    assert worker.poll() is None
