"""More clients than the front desk can serve, and such as never finish a request: its caps hold, and it stays well."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest

from api import doorway
from benchmarks.probe import probing
from shared import lifecycle
from shared.ledger import Progress
from tests.api.desk import Desk, open_desk
from tests.faults.front import Front
from tests.faults.ground import Ground, wait_until

HEALTHY_SECONDS = 0.1
FILES = 400  # that the desk may have open
PLACES = 100  # for those who wait
# 10,000 of each would be 20,000 sockets of this process: the caps are made small instead of the crowds large.
SLOW, POLLS = 1_000, 400


@pytest.fixture
def desk(ground: Ground) -> Iterator[Desk]:
    with open_desk(ground.settings, ground.sessions, ground.storage) as opened:
        yield opened


@pytest.fixture
def front(ground: Ground, desk: Desk) -> Front:
    """A desk with few places, in a process of its own."""
    ground.account_id = desk.account_id
    return Front(ground, ground.settings.model_copy(update={"max_waiting": PLACES}))


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


@contextmanager
def well(front: Front) -> Iterator[None]:
    """Nine in ten answers of /healthz meanwhile come in time, beside what a busy machine takes when nobody is there."""
    pause = threading.Event()
    with probing(front.port) as alone:
        pause.wait(0.7)
    with probing(front.port) as answers:
        yield
        pause.wait(0.3)
    assert nine_in_ten(answers) < HEALTHY_SECONDS + nine_in_ten(alone), (answers, alone)


def nine_in_ten(answers: list[tuple[float, float]]) -> float:
    seconds = sorted(took for _, took in answers)
    return seconds[int(0.9 * len(seconds))]


# ---------------------------------------------------------------- requests that never end


@pytest.mark.fault(48, "slow-loris, 10,000 long polls, deep JSON")
def test_requests_that_never_end_take_no_place_from_others(ground: Ground, desk: Desk, front: Front) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > SLOW
    front.start(max_files=FILES)
    assert front.process is not None
    process = psutil.Process(front.process.pid)
    with ExitStack() as stack, well(front):
        for number in range(SLOW):
            slow = stack.enter_context(connect(front.port))
            slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-%d: " % number)
            assert process.num_fds() < FILES
        with front.client() as client:
            assert client.post("/v1/jobs", json={}).status_code == 422
    assert process.memory_info().rss < 200e6
    assert "Too many open files" not in ground.log()


@pytest.mark.fault(48, "slow-loris, 10,000 long polls, deep JSON")
@pytest.mark.parametrize(
    "begin",
    [b"", b"\r\n", b"POST /v1/jobs HTTP/1.1\r\nHo", b"POST /v1/jobs HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"],
    ids=["nothing", "empty lines", "half a head", "half a body"],
)
def test_a_request_arrives_soon_or_never(desk: Desk, monkeypatch: pytest.MonkeyPatch, begin: bytes) -> None:
    monkeypatch.setattr(doorway, "ARRIVAL_SECONDS", 0.3)
    with connect(int(desk.url.rpartition(":")[2])) as connection:
        connection.settimeout(0.05)
        connection.sendall(begin)

        def is_cut() -> bool:
            try:
                if begin:
                    connection.sendall(b"\r\n" if begin == b"\r\n" else b" ")
                return connection.recv(100) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        wait_until(is_cut, "the desk to lose patience", timeout_seconds=5)


@pytest.mark.fault(48, "slow-loris, 10,000 long polls, deep JSON")
def test_a_request_that_arrived_may_wait_and_another_follow_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorway, "ARRIVAL_SECONDS", 0.3)
    job = desk.submit()
    for _ in range(2):  # on one connection
        answer = desk.client.get(job["url"], params={"wait": 0.6}, headers={"If-None-Match": '"1"'})
        assert answer.status_code == 304
    lifecycle.cancel(desk.sessions, desk.account_id, UUID(job["id"]))


@pytest.mark.fault(48, "slow-loris, 10,000 long polls, deep JSON")
def test_a_head_without_end_is_cut_off(desk: Desk) -> None:
    with connect(int(desk.url.rpartition(":")[2])) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        heads = (b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(10_000))
        with pytest.raises(ConnectionError):
            connection.sendall(b"".join(heads))


# ---------------------------------------------------------------- waiting


@pytest.mark.fault(48, "slow-loris, 10,000 long polls, deep JSON")
def test_only_so_many_wait_and_all_of_them_hear(ground: Ground, desk: Desk, front: Front) -> None:
    job = desk.submit()
    lease = ground.claim().lease
    front.start()
    path = f"{front.url}/v1/jobs/{job['id']}"
    turned_away = threading.Event()

    async def poll(client: httpx.AsyncClient, answers: list[httpx.Response]) -> None:
        answer = await client.get(path, params={"wait": 60}, headers={"If-None-Match": '"2"'})
        answers.append(answer)
        if len(answers) >= POLLS - PLACES:
            turned_away.set()

    async def crowd() -> list[httpx.Response]:
        answers = list[httpx.Response]()
        limits = httpx.Limits(max_connections=POLLS)
        headers = {"Authorization": f"Bearer {front.key}"}
        async with httpx.AsyncClient(limits=limits, timeout=60, trust_env=False, headers=headers) as client:
            polls = [asyncio.ensure_future(poll(client, answers)) for _ in range(POLLS)]
            await asyncio.to_thread(turned_away.wait, 60)
            await asyncio.to_thread(tell)
            await asyncio.gather(*polls)
        return answers

    def tell() -> None:
        lifecycle.heartbeat(ground.sessions, lease, 60, Progress(None, 0.5, "on it"))

    with well(front):
        answers = asyncio.run(crowd())
    lifecycle.settle(ground.sessions, lease, "cancelled")
    heard = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert (len(heard), len(refused)) == (PLACES, POLLS - PLACES)
    assert {answer.json()["last_sequence"] for answer in heard} == {3}
    assert {answer.json()["code"] for answer in refused} == {"too_many_waiting"}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    with front.client() as client:  # whoever does not wait is served
        assert client.get(path).status_code == 200
        assert client.get(path, params={"wait": 0.05}).status_code == 200  # and the places are free again


# ---------------------------------------------------------------- bodies


DEEP: dict[str, bytes] = {
    "lists": b"[" * 500_000,
    "closed lists": b"[" * 100_000 + b"]" * 100_000,
    "objects": b'{"a":' * 150_000,
    "a deep recipe": b'{"name": "n", "recipe": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "just not too deep": b'{"name": "n", "recipe": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a long number": b"1" * 1_000_000,
    "a wide list": json.dumps({"name": "n", "tags": ["a"] * 100_000}).encode(),
}


@pytest.mark.fault(48, "slow-loris, 10,000 long polls, deep JSON")
def test_a_body_however_deep_is_refused_with_a_sentence(desk: Desk, subtests: pytest.Subtests) -> None:
    for what, body in DEEP.items():
        with subtests.test(what):
            answer = desk.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
            told: dict[str, Any] = answer.json()
            assert answer.status_code in (400, 413, 422), told
            assert told["fault"] == "user"
            assert told["detail"]
            assert len(answer.content) < 100_000
    assert desk.client.get("/healthz").elapsed.total_seconds() < HEALTHY_SECONDS
