"""The doorbell on a real Valkey: rings arrive, and one that cannot arrive costs nobody anything."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from shared import workers
from shared.db import Sessions
from shared.doorbell import RING_TASK, Doorbell, make_celery
from shared.ledger import Capacity
from shared.settings import Settings
from shared.workers import Registration
from tests.shared.ledger_desk import RECIPE, claim, submit

PATIENCE_SECONDS = 10.0


@pytest.fixture
def broker(settings: Settings) -> Iterator[Any]:
    with redis.Redis.from_url(settings.broker_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def doorbell(settings: Settings) -> Iterator[Doorbell]:
    made = Doorbell(settings)
    yield made
    made.close()


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.01)


def _rings(broker: Any, queue: str) -> list[Any]:
    """The arguments of the rings that wait in a queue."""
    messages = [json.loads(entry) for entry in broker.lrange(queue, 0, -1)]
    return [json.loads(base64.b64decode(message["body"]))[0] for message in messages]


def _elsewhere(settings: Settings, port: int) -> Settings:
    return settings.model_copy(update={"broker_url": f"redis://:secret@127.0.0.1:{port}/0"})


def test_a_ring_lands_in_the_queue_it_names(doorbell: Doorbell, broker: Any) -> None:
    doorbell.ring("gpu")
    _wait_until(lambda: broker.llen("gpu") == 1)
    assert _rings(broker, "gpu") == [["gpu"]]


def test_a_ring_is_json_that_names_the_queue_and_nothing_else(doorbell: Doorbell, broker: Any) -> None:
    assert doorbell.ring_now("default")
    [message] = [json.loads(entry) for entry in broker.lrange("default", 0, -1)]
    arguments, named, canvas = json.loads(base64.b64decode(message["body"]))
    assert (arguments, named) == (["default"], {})
    assert not any(canvas.values())
    headers = message["headers"]
    assert message["content-type"] == "application/json"
    assert headers["task"] == RING_TASK
    assert {name: headers[name] for name in ("eta", "expires", "group", "retries")} == {
        "eta": None,
        "expires": None,
        "group": None,
        "retries": 0,
    }


def test_a_queue_with_a_ring_that_nobody_has_heard_is_not_rung_again(doorbell: Doorbell, broker: Any) -> None:
    for _ in range(3):
        assert doorbell.ring_now("default")
    assert broker.llen("default") == 1
    broker.rpop("default")
    assert doorbell.ring_now("default")
    assert broker.llen("default") == 1


def test_rings_for_one_queue_that_are_still_due_are_one_ring(settings: Settings) -> None:
    doorbell = Doorbell(settings)
    entered, go_on = threading.Event(), threading.Event()
    ring_now, rung = doorbell.ring_now, []

    def slowly(queue: str) -> bool:
        rung.append(queue)
        entered.set()
        assert go_on.wait(PATIENCE_SECONDS)
        return ring_now(queue)

    doorbell.ring_now = slowly  # type: ignore[method-assign]
    doorbell.ring("default")
    assert entered.wait(PATIENCE_SECONDS)
    for _ in range(100):
        doorbell.ring("default")
        doorbell.ring("gpu")
    go_on.set()
    doorbell.close()
    assert rung == ["default", "default", "gpu"]


def test_closing_rings_what_is_due_first(settings: Settings, broker: Any) -> None:
    doorbell = Doorbell(settings)
    queues = [f"queue-{number}" for number in range(10)]
    for queue in queues:
        doorbell.ring(queue)
    doorbell.close()
    assert [broker.llen(queue) for queue in queues] == [1] * 10


def test_closing_a_doorbell_that_was_never_rung_is_nothing(settings: Settings) -> None:
    doorbell = Doorbell(settings)
    doorbell.close()
    doorbell.close()


def test_with_the_broker_down_a_ring_costs_nothing_and_closing_is_quick(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        doorbell = Doorbell(_elsewhere(settings, taken.getsockname()[1]))
        started_at = time.monotonic()
        for number in range(1000):
            doorbell.ring(f"queue-{number % 3}")
        assert time.monotonic() - started_at < 0.5
        assert doorbell.ring_now("default") is False
        doorbell.close()
        assert time.monotonic() - started_at < 5


def test_with_a_broker_that_never_answers_a_ring_costs_nothing_and_closing_is_bounded(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        doorbell = Doorbell(_elsewhere(settings, silent.getsockname()[1]))
        started_at = time.monotonic()
        doorbell.ring("default")
        assert time.monotonic() - started_at < 0.5
        doorbell.close()
        assert time.monotonic() - started_at < 8


@pytest.fixture(params=["out of memory", "read-only"])
def unwilling(request: pytest.FixtureRequest, broker: Any) -> Iterator[Callable[[], None]]:
    """A broker that refuses to write, until it is told to be willing again."""
    refuse, relent = {
        "out of memory": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        "read-only": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    }[request.param]
    broker.execute_command(*refuse)
    yield lambda: broker.execute_command(*relent)
    broker.execute_command(*relent)


def test_a_broker_that_refuses_loses_the_ring_and_takes_the_next(
    settings: Settings, broker: Any, unwilling: Callable[[], None]
) -> None:
    doorbell = Doorbell(settings)
    assert doorbell.ring_now("default") is False
    doorbell.ring("default")
    doorbell.ring("gpu")
    unwilling()
    doorbell.ring("late")
    _wait_until(lambda: broker.llen("late") == 1)
    assert doorbell.ring_now("default") is True
    doorbell.close()


def test_a_wrong_password_loses_the_ring(settings: Settings) -> None:
    host = settings.broker_url.rpartition("@")[2]
    doorbell = Doorbell(settings.model_copy(update={"broker_url": f"redis://:wrong@{host}"}))
    assert doorbell.ring_now("default") is False
    doorbell.ring("default")
    doorbell.close()


def test_a_doorbell_outlives_its_brokers_connections(doorbell: Doorbell, broker: Any) -> None:
    assert doorbell.ring_now("default")
    broker.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    doorbell.ring_now("gpu")
    assert doorbell.ring_now("gpu")
    assert _rings(broker, "gpu") == [["gpu"]]


def test_a_lost_ring_is_rung_again_for_what_waits(sessions: Sessions, doorbell: Doorbell, broker: Any) -> None:
    workers.register(sessions, Registration("w", "host", ["default"], RECIPE.requirements(), 2, 2**33, {}))
    job_id = submit(sessions)
    assert doorbell.ring_now("default")
    broker.flushdb()
    assert broker.llen("default") == 0
    for queue in workers.queues_with_work(sessions):
        assert doorbell.ring_now(queue)
    assert _rings(broker, "default") == [["default"]]
    taken = claim(sessions, Capacity("w", ["default"], RECIPE.requirements(), 2**33))
    assert taken.lease.job_id == job_id
    assert workers.queues_with_work(sessions) == []


def test_celery_carries_rings_and_nothing_that_could_lose_or_repeat_work(settings: Settings) -> None:
    app = make_celery(settings)
    assert app.conf.task_acks_late is False
    assert app.conf.worker_disable_prefetch is True
    assert app.conf.worker_concurrency == 1
    assert app.conf.accept_content == ["json"]
    assert app.conf.task_serializer == "json"
    assert app.conf.task_ignore_result is True
    assert app.conf.result_backend is None
