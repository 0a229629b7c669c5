"""The broker lies, forgets, dies or refuses: rings are lost, jobs are not."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis

from shared import lifecycle
from shared.doorbell import RING_TASK, Doorbell, make_celery
from shared.settings import Settings
from tests.api.desk import open_desk
from tests.faults.ground import Ground, children, reached, wait_until
from tests.faults.proxy import Proxy, port_of, through
from worker.hearing import MAX_RING_BYTES, ring_of

ONLY_RUNG = {"BURNISH_POLL_SECONDS": "300"}  # who looks for itself so rarely works for rings alone


@pytest.fixture
def broker(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.broker_url) as client:
        yield client


@contextmanager
def doorbell(settings: Settings) -> Iterator[Doorbell]:
    made = Doorbell(settings)
    yield made
    made.close()


def quick(ground: Ground) -> UUID:
    """A job that ends as soon as it is claimed: its data are gone."""
    told = ground.recipe().model_dump(mode="json")
    told["data"]["artifact"] = str(uuid4())
    return ground.submit(recipe=type(ground.recipe()).model_validate(told))


# ---------------------------------------------------------------- messages that are no rings


def message(task: str = RING_TASK, arguments: Any = (["default"], {}, {}), **headers: Any) -> bytes:
    """A Celery message as anybody could write it who reaches the broker."""
    told = {
        "body": base64.b64encode(json.dumps(arguments).encode()).decode(),
        "headers": {"task": task, "id": str(uuid4()), "lang": "py", **headers},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "default"},
            "delivery_tag": str(uuid4()),
        },
    }
    return json.dumps(told).encode()


FORGED = {
    "nothing": b"",
    "garbage": b"\x80\x04garbage\xff",
    "a number": b"7",
    "null": b"null",
    "no message": b'{"body": 1, "headers": [], "properties": null}',
    "deep JSON": b"[" * 100_000,
    "oversize garbage": b"x" * 2**22,
    "an oversize ring": message(shadow="x" * MAX_RING_BYTES),
    "another task": message("burnish.unheard_of"),
    "a task of Celery's": message("celery.backend_cleanup"),
    "two queues": message(arguments=(["default", "other"], {}, {})),
    "keywords": message(arguments=(["default"], {"queue": "other"}, {})),
    "no list": message(arguments={"a": 1}),
    "a body that is no base64": message().replace(b'"body": "', b'"body": "!'),
}


@pytest.mark.fault(10, "forged, garbage or oversize Celery message")
def test_forged_messages_are_dropped_and_counted_and_change_nothing(ground: Ground, broker: redis.Redis) -> None:
    gone_before = quick(ground)
    ground.start_worker(**ONLY_RUNG)
    ground.sweep()
    ground.wait_for(gone_before)
    before = ground.events(gone_before)
    for forged in FORGED.values():
        broker.lpush("default", forged)
    wait_until(lambda: broker.llen("default") == 0, "the worker to take them")
    wait_until(lambda: ground.log().count('"message_dropped"') == len(FORGED), "all of them to be counted")
    assert f'"so_far": {len(FORGED)}' in ground.log()
    job_id = quick(ground)
    with doorbell(ground.settings) as bell:
        bell.ring("default")
        ground.wait_for(job_id)
    assert len(ground.events(gone_before)) == len(before)


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_what_is_no_ring_is_not_heard(forged: bytes) -> None:
    assert ring_of(forged) is None


def test_of_a_ring_nothing_is_believed_but_that_it_is_one() -> None:
    """Celery would be told by these headers to wait, to expire, to run another task afterwards."""
    sly = message(arguments=(["default"], {}, {"chain": [{"task": "x"}]}), eta="2999-01-01", expires=1)
    heard = ring_of(sly)
    assert heard is not None
    assert set(json.loads(heard)["headers"]) == {"task", "id", "lang"}
    assert json.loads(base64.b64decode(json.loads(heard)["body"])) == [["default"], {}, {}]


def test_celerys_own_ring_is_one(settings: Settings, broker: redis.Redis) -> None:
    with doorbell(settings) as bell:
        assert bell.ring_now("default")
    [found] = broker.lrange("default", 0, -1)
    assert len(found) < MAX_RING_BYTES // 3
    assert ring_of(found) is not None


# ---------------------------------------------------------------- rings that are lost, doubled or idle


@pytest.mark.fault(17, "FLUSHALL with 50 queued, 5 running")
def test_a_broker_that_forgets_everything_loses_no_job(ground: Ground, broker: redis.Redis) -> None:
    gates = [ground.directory / f"gate-{number}" for number in range(5)]
    running = [ground.submit(f"wait 0 {gate}", priority=1) for gate in gates]
    threads = [ground.start_work() for _ in range(4)]
    ground.start_worker(**ONLY_RUNG)
    ground.sweep()
    for gate in gates:
        reached(gate)
    queued = [quick(ground) for _ in range(50)]
    with doorbell(ground.settings) as bell:
        bell.ring("default")
        wait_until(lambda: broker.llen("default") == 1, "a ring that nobody hears")
    broker.flushall()
    assert {ground.job(job_id).status for job_id in running} == {"running"}
    for gate in gates:
        gate.unlink()
    for thread in threads:
        thread.join()
    ground.sweep()
    for job_id in running:
        assert ground.wait_for(job_id).status == "succeeded"
    assert {ground.wait_for(job_id).attempt for job_id in queued} == {1}


@pytest.mark.fault(21, "the same ring 5 times to 2 workers")
def test_five_rings_for_one_job_are_one_claim(ground: Ground, broker: redis.Redis) -> None:
    for _ in range(2):
        ground.start_worker(**ONLY_RUNG)
    job_id = ground.submit()
    app = make_celery(ground.settings)
    for _ in range(5):
        app.send_task(RING_TASK, args=["default"], queue="default")
    app.close()
    assert ground.wait_for(job_id).status == "succeeded"
    wait_until(lambda: broker.llen("default") == 0, "every ring to be heard")
    assert len(ground.events(job_id, "claimed")) == 1


@pytest.mark.fault(22, "a ring is lost")
@pytest.mark.fault(23, "a ring with nothing to do")
def test_a_lost_ring_is_rung_again_and_an_idle_one_does_nothing(ground: Ground, broker: redis.Redis) -> None:
    worker = ground.start_worker(**ONLY_RUNG)
    with doorbell(ground.settings) as bell:
        assert bell.ring_now("default")
        wait_until(lambda: broker.llen("default") == 0, "the idle ring to be heard")
    job_id = quick(ground)  # and nobody rings
    assert ground.sweep() == 0
    assert [event.kind for event in ground.events(ground.wait_for(job_id).id)][:2] == ["submitted", "claimed"]
    assert worker.poll() is None
    assert "Traceback" not in ground.log()


# ---------------------------------------------------------------- a broker that is away


AWAY_SECONDS = 120.0


@contextmanager
def cut_off(ground: Ground, url: str) -> Iterator[tuple[Proxy, Settings]]:
    """A proxy before the server that is named by `url`, and settings by which it is reached through the proxy only."""
    server = getattr(ground.settings, url)
    with Proxy(port_of(server)) as proxy:
        yield proxy, ground.settings.model_copy(update={url: through(proxy, server)})


@pytest.mark.fault(19, "Valkey down for 2 minutes of submits")
def test_submits_do_not_wait_for_a_broker_that_is_down_or_silent(ground: Ground) -> None:
    with (
        cut_off(ground, "broker_url") as (proxy, settings),
        open_desk(settings, ground.sessions, ground.storage) as desk,
    ):
        ground.start_worker(settings=settings, BURNISH_POLL_SECONDS="0.3")
        body = desk.order()
        for is_silent in (False, True):
            proxy.refuse()
            if is_silent:
                proxy.blackhole()
                proxy.accept()
            until = time.monotonic() + AWAY_SECONDS / 2
            while time.monotonic() < until:
                begun = time.monotonic()
                jobs = [UUID(desk.submit(body)["id"]) for _ in range(3)]
                assert time.monotonic() - begun < 3 * 2.0
                for job_id in jobs:  # found by looking
                    assert ground.wait_for(job_id).status == "succeeded", ground.reason(job_id)
            ready = desk.client.get("/readyz")
            assert (ready.status_code, ready.json()["checks"]["broker"][:4]) == (200, "away")
        proxy.heal()


@pytest.mark.fault(46, "cancel while Valkey is down, or the worker is cut off")
def test_a_cancel_needs_no_broker(ground: Ground) -> None:
    gate = ground.directory / "gate"
    with cut_off(ground, "broker_url") as (proxy, settings):
        job_id = ground.submit(f"wait 0 {gate}")
        ground.start_worker(settings=settings)
        reached(gate)
        proxy.refuse()
        begun = time.monotonic()
        assert lifecycle.cancel(ground.sessions, ground.account_id, job_id) == "running"
        ground.wait_for(job_id, "cancelled")
        # One heartbeat, and the time to end the child and to write so on a busy machine.
        assert time.monotonic() - begun < ground.settings.heartbeat_seconds + 2.0
        gate.unlink()


@pytest.mark.fault(46, "cancel while Valkey is down, or the worker is cut off")
def test_a_cancel_of_a_job_whose_worker_is_cut_off_holds_at_the_leases_end(ground: Ground) -> None:
    gate = ground.directory / "gate"
    with cut_off(ground, "database_url") as (proxy, settings):
        job_id = ground.submit(f"wait 0 {gate}")
        ground.start_worker(settings=settings)
        reached(gate)
        proxy.blackhole()
        assert lifecycle.cancel(ground.sessions, ground.account_id, job_id) == "running"
        assert ground.sweep() == 0
        ground.execute("UPDATE jobs SET lease_expires_at = now()")  # as it would be some seconds later
        wait_until(lambda: ground.sweep() == 1, "the lease's end")
        assert ground.job(job_id).status == "cancelled"
        proxy.heal()
        wait_until(lambda: not children(job_id), "the worker to hear of it")
        gate.unlink()
