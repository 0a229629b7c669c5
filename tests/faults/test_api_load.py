"""More clients than the front desk can serve, and such as never finish a request: its caps hold, and it stays well."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Callable, Iterator
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
from tests.api.desk import Desk
from tests.faults.front import Front, allowed_files
from tests.faults.ground import Ground, wait_until

HEALTHY_SECONDS = 0.1
SLOW, FILES = 1_000, 400  # connections that never end, and files that the desk may have open
POLLS = 10_000  # that come at once, to the desk as it is


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


@contextmanager
def well(front: Front) -> Iterator[None]:
    """/healthz answers in time meanwhile, whenever it is asked; one in ten may wait longer, for a busy machine."""
    with probing(front.port) as answers:
        yield
    seconds = sorted(took for _, took in answers)
    assert seconds[int(0.9 * len(seconds))] < HEALTHY_SECONDS, seconds


# ---------------------------------------------------------------- requests that never end


@pytest.mark.fault(48, "slow-loris, 10,000 long polls, deep JSON")
@allowed_files(2 * SLOW)
def test_requests_that_never_end_take_no_place_from_others(ground: Ground, desk: Desk, front: Front) -> None:
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
@allowed_files(2 * SLOW)
def test_a_burst_of_connections_takes_no_more_files_than_there_are(ground: Ground, front: Front) -> None:
    front.start(max_files=FILES)
    assert front.process is not None
    front.process.send_signal(signal.SIGSTOP)  # so that it finds all of them at once
    with ExitStack() as stack:
        for _ in range(SLOW):
            stack.enter_context(connect(front.port))
        front.process.send_signal(signal.SIGCONT)
        with front.client() as client:
            assert client.get("/healthz").status_code == 200
        assert psutil.Process(front.process.pid).num_fds() < FILES
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


class Crowd:
    """Long polls for one job, each on a connection of its own, with as little Python as can be."""

    def __init__(self, front: Front, path: str, known: str) -> None:
        asked = [f"GET {path}?wait=60 HTTP/1.1", "Host: a", f"Authorization: Bearer {front.key}"]
        self._request = "\r\n".join([*asked, f"If-None-Match: {known}", "", ""]).encode()
        self._port = front.port
        self.answers: list[httpx.Response] = []

    async def poll_until(self, turned_away: int, tell: Callable[[], None]) -> None:
        """All come at once; when so many were turned away something is told, and all the others hear it."""
        polls = [asyncio.ensure_future(self._poll()) for _ in range(POLLS)]
        heard = asyncio.as_completed(polls)
        for _, answered in zip(range(turned_away), heard, strict=False):
            await answered
        await asyncio.to_thread(tell)
        await asyncio.gather(*polls)

    async def _poll(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(self._request)
            status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines if line)
            content = await reader.readexactly(int(headers["content-length"]))
            self.answers.append(httpx.Response(int(status.split()[1]), headers=headers, content=content))
        finally:
            writer.transport.abort()


@pytest.mark.fault(48, "slow-loris, 10,000 long polls, deep JSON")
@allowed_files(int(1.1 * POLLS / doorway.CONNECTIONS_RATIO))
def test_only_so_many_wait_and_all_of_them_hear(ground: Ground, desk: Desk, front: Front) -> None:
    job = desk.submit()
    lease = ground.claim().lease
    front.start()
    assert front.process is not None
    places = ground.settings.max_waiting
    crowd = Crowd(front, f"/v1/jobs/{job['id']}", known='"2"')

    def tell() -> None:
        lifecycle.heartbeat(ground.sessions, lease, 60, Progress(None, 0.5, "on it"))

    with well(front):
        asyncio.run(crowd.poll_until(POLLS - places, tell))
    lifecycle.settle(ground.sessions, lease, "cancelled")
    heard = [answer for answer in crowd.answers if answer.status_code == 200]
    refused = [answer for answer in crowd.answers if answer.status_code == 503]
    assert (len(heard), len(refused)) == (places, POLLS - places)
    assert {answer.json()["last_sequence"] for answer in heard} == {3}
    assert {answer.json()["code"] for answer in refused} == {"too_many_waiting"}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert psutil.Process(front.process.pid).memory_info().rss < 200e6 + 100e3 * places
    url = f"{front.url}/v1/jobs/{job['id']}"
    with front.client() as client:  # whoever does not wait is served
        assert client.get(url).status_code == 200
        assert client.get(url, params={"wait": 0.05}).status_code == 200  # and the places are free again


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
