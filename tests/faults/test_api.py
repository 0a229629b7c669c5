"""The front desk is killed, cut off and hurried: a submit is one job, an upload is whole, a stream is gapless."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from httpx_sse import connect_sse

from shared import lifecycle, quotas, uploads
from shared.ledger import Progress, Reason
from shared.settings import Settings
from tests.api.desk import Desk, announce, open_desk, safetensors, send
from tests.faults.front import Front, allowed_files
from tests.faults.ground import Ground, wait_until
from tests.faults.proxy import Proxy, port_of, through

KEY = {"Idempotency-Key": "one"}


def jobs(desk: Desk) -> list[dict[str, Any]]:
    return list(desk.client.get("/v1/jobs", params={"limit": 100}).json()["items"])


# ---------------------------------------------------------------- submits


@pytest.mark.fault(42, "api kill -9 around COMMIT")
@pytest.mark.parametrize(("point", "num_before"), [("submit.begun", 0), ("submit.committed", 1)])
def test_a_submit_whose_desk_is_killed_is_one_job_that_runs(
    ground: Ground, desk: Desk, front: Front, point: str, num_before: int
) -> None:
    body = desk.order()
    front.start(f"{point}=kill")
    with front.client() as client, pytest.raises(httpx.TransportError):
        client.post("/v1/jobs", json=body, headers=KEY)
    assert front.was_killed()
    before = [job["id"] for job in jobs(desk)]
    assert len(before) == num_before
    answer = desk.client.post("/v1/jobs", json=body, headers=KEY)
    assert answer.status_code == 202
    assert [job["id"] for job in jobs(desk)] == (before or [answer.json()["id"]]) == [answer.json()["id"]]
    assert ground.work() == "succeeded"


@pytest.mark.fault(42, "api kill -9 around COMMIT")
def test_a_desk_that_is_killed_while_the_database_writes_has_submitted_once(
    ground: Ground, desk: Desk, front: Front
) -> None:
    body = desk.order()
    front.start()
    url = ground.settings.database_url.replace("+psycopg", "")
    with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as looker, front.client() as client:
        holder.execute("LOCK TABLE jobs IN SHARE MODE")
        sending = threading.Thread(target=post_in_vain, args=(client, body))
        sending.start()
        wait_until(lambda: looker.execute(WAITING).fetchone() == (1,), "the submit to wait for the table")
        front.kill()
        sending.join()
        holder.rollback()
        answers = [post(desk.client, body) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {202}
    assert {answer.json()["id"] for answer in answers} == {job["id"] for job in jobs(desk)}
    assert len(jobs(desk)) == 1
    assert ground.work() == "succeeded"


WAITING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%INSERT INTO jobs%'
"""


def post_in_vain(client: httpx.Client, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.TransportError):
        post(client, body)


def post(client: httpx.Client, body: dict[str, Any], key: str = "one") -> httpx.Response:
    return client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})


@pytest.mark.fault(43, "1,000 concurrent POSTs, 100 keys x 10, with cuts", quiet=False)
@allowed_files(6_000)  # for each post the client's, the proxy's two and the desk's, which are all of this process
def test_a_thousand_posts_of_a_hundred_keys_are_a_hundred_jobs(desk: Desk) -> None:
    num_keys, each = 100, 10
    body, told = desk.order(), dict[str, set[str]]()
    keys = [f"key-{number}" for number in range(num_keys)] * each
    random.Random(43).shuffle(keys)

    async def crowd(url: str) -> list[int]:
        limits, headers = httpx.Limits(max_connections=None), {"Authorization": f"Bearer {desk.key}"}
        async with httpx.AsyncClient(
            base_url=url, headers=headers, limits=limits, timeout=100, trust_env=False
        ) as client:
            return await asyncio.gather(*[submit(client, key) for key in keys])

    async def submit(client: httpx.AsyncClient, key: str) -> int:
        try:
            answer = await client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
        except httpx.TransportError:
            return 0  # nobody knows
        if answer.status_code == 202:
            told.setdefault(key, set()).add(answer.json()["id"])
        return answer.status_code

    with Proxy(port_of(desk.url)) as proxy:
        proxy.lose_answer(b"POST /v1/jobs", times=None, every=9)
        outcomes = asyncio.run(crowd(through(proxy, desk.url)))
        assert set(outcomes) == {0, 202}
        assert proxy.num_answers_lost > 50
    for key in set(keys):
        told.setdefault(key, set()).add(post(desk.client, body, key).json()["id"])
    assert {len(ids) for ids in told.values()} == {1}
    ids = {job_id for found in told.values() for job_id in found}
    assert len(ids) == num_keys
    assert {job["id"] for job in jobs(desk)} == ids
    assert desk.client.get("/v1/jobs", params={"limit": 100}).json()["next_cursor"] is None


# ---------------------------------------------------------------- uploads


@pytest.mark.fault(44, "upload cut, wrong length, completed twice")
def test_a_job_never_has_half_a_file_and_what_failed_is_given_back(ground: Ground) -> None:
    content = safetensors({"conv.weight": ("F32", [2**18])})
    with Proxy(port_of(ground.settings.s3_endpoint_url)) as proxy:
        public = through(proxy, ground.settings.s3_endpoint_url)
        settings = ground.settings.model_copy(update={"s3_public_endpoint_url": public, "presign_seconds": 60})
        with open_desk(settings, ground.sessions, ground.storage) as desk:
            upload = desk.client.post("/v1/uploads", json=announce(content, "safetensors")).json()
            body = desk.order()
            body["recipe"]["source"]["weights"] = upload["id"]
            known = quotas.usage(ground.sessions, "ours").stored_bytes

            proxy.cut_after(len(content) // 2)
            with pytest.raises(httpx.TransportError):
                send(upload, content)
            assert refusal(desk, upload) == "upload_incomplete"
            assert desk.post("/v1/jobs", body).json()["code"] == "artifact_not_ready"
            for wrong in (content[:-1], content + b"x"):
                assert put(upload, wrong).status_code == 403
            assert refusal(desk, upload) == "upload_incomplete"
            assert desk.post("/v1/jobs", body).json()["code"] == "artifact_not_ready"
            assert jobs(desk) == []

            send(upload, content)
            with ThreadPoolExecutor(4) as pool:
                complete = f"/v1/uploads/{upload['id']}/complete"
                answers = list(pool.map(lambda _: desk.client.post(complete), range(4)))
            assert {(answer.status_code, answer.json()["status"]) for answer in answers} == {(200, "ready")}
            assert quotas.usage(ground.sessions, "ours").stored_bytes == known  # counted once, when it was announced

            other = content[:-1] + b"x"
            broken = desk.client.post("/v1/uploads", json=announce(content + b"x" * 8, "safetensors")).json()
            forged = desk.client.post("/v1/uploads", json=announce(other, "safetensors")).json()
            send(forged, content)
            assert quotas.usage(ground.sessions, "ours").stored_bytes == known + len(content) * 2 + 8
            assert refusal(desk, forged) == "digest_mismatch"
            ground.execute("UPDATE artifacts SET expires_at = now() WHERE id = :id", id=UUID(broken["id"]))
            assert uploads.forget_expired(ground.sessions, ground.storage) == 1
            assert quotas.usage(ground.sessions, "ours").stored_bytes == known


def put(upload: dict[str, Any], content: bytes) -> httpx.Response:
    return httpx.put(upload["parts"][0]["url"], content=content, trust_env=False)


def refusal(desk: Desk, upload: dict[str, Any]) -> str:
    return str(desk.client.post(f"/v1/uploads/{upload['id']}/complete").json()["code"])


# ---------------------------------------------------------------- streams


class Reader:
    """Reads a job's stream to its end in a thread, each time from where it was cut off; `seen` is all that came."""

    def __init__(self, url: str, key: str, job_id: UUID) -> None:
        self._url, self._headers, self._job_id = url, {"Authorization": f"Bearer {key}"}, job_id
        self.seen: list[int] = []
        self.num_streams = 0
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        pause = threading.Event()
        while not self._read_one():
            pause.wait(0.05)

    def _read_one(self) -> bool:
        """Whether the job's end was told."""
        headers = {**self._headers, **({"Last-Event-ID": str(self.seen[-1])} if self.seen else {})}
        try:
            with (
                httpx.Client(base_url=self._url, headers=headers, trust_env=False, timeout=30) as client,
                connect_sse(client, "GET", f"/v1/jobs/{self._job_id}/events") as source,
            ):
                self.num_streams += 1
                for event in source.iter_sse():
                    if event.data:
                        self.seen.append(int(event.id))
                        if event.event == "failed":
                            return True
        except httpx.TransportError:
            pass
        return False


@contextmanager
def reading(url: str, key: str, job_id: UUID) -> Iterator[Reader]:
    reader = Reader(url, key, job_id)
    yield reader
    reader.thread.join(timeout=60)
    assert not reader.thread.is_alive()


@pytest.mark.fault(47, "SSE dropped, Last-Event-ID, api restarted")
def test_a_stream_loses_and_doubles_nothing_however_often_it_is_cut(ground: Ground, desk: Desk, front: Front) -> None:
    job_id = UUID(desk.submit()["id"])
    lease = ground.claim().lease
    front.start()
    with Proxy(front.port) as proxy, reading(through(proxy, front.url), front.key, job_id) as reader:
        number = 2

        def tell(times: int) -> None:
            nonlocal number
            for _ in range(times):
                number += 1
                lifecycle.heartbeat(ground.sessions, lease, 60, Progress(None, 0.5, f"{number}"))

        def caught_up() -> bool:
            return reader.seen[-1:] == [number]

        tell(20)
        wait_until(caught_up, "the reader to hear of it")
        for num_bytes in (100, 500, 1500):  # in mid-event
            proxy.cut_after(num_bytes)
            tell(15)
            wait_until(caught_up, "the reader to go on")
        tell(5)
        front.kill()
        tell(5)
        front.start()
        wait_until(caught_up, "the reader to find the new desk")
        proxy.refuse()
        tell(5)
        proxy.accept()
        wait_until(caught_up, "the reader to go on")
        lifecycle.settle(ground.sessions, lease, "failed", Reason("bug", "It broke."))
    assert reader.num_streams >= 6
    assert reader.seen == list(range(1, number + 2))
    answer = desk.client.get(
        f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": str(number + 1)}
    )
    assert answer.status_code == 204


# ---------------------------------------------------------------- quotas and fairness

COPIES = """
    WITH made AS (
        INSERT INTO jobs (id, account_id, name, recipe, requires, required_memory_bytes, timeout_seconds, last_sequence)
        SELECT uuidv7(), account_id, name, recipe, requires, required_memory_bytes, timeout_seconds, 1
        FROM jobs CROSS JOIN generate_series(1, :number) WHERE id = :id RETURNING id
    ), staged AS (
        INSERT INTO stage_runs (job_id, position, kind)
        SELECT made.id, position, kind FROM made CROSS JOIN stage_runs WHERE job_id = :id
    )
    INSERT INTO job_events (job_id, sequence, attempt, kind) SELECT id, 1, 0, 'submitted' FROM made
"""


@pytest.mark.fault(49, "account A queues 5,000 jobs, B one", quiet=False)
def test_an_account_that_queues_thousands_holds_up_nobody_and_meets_its_quota(
    ground: Ground, settings: Settings, desk: Desk
) -> None:
    body = desk.order()
    many = desk.submit(body, key="first")
    quota = settings.max_active_jobs_per_account
    assert quota == 5000
    ground.execute(COPIES, id=UUID(many["id"]), number=quota - 2)
    assert desk.post("/v1/jobs", body).status_code == 202
    refused = desk.post("/v1/jobs", body)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_jobs")
    assert "5,000 of at most 5,000 jobs" in refused.json()["detail"]
    assert int(refused.headers["Retry-After"]) > 0
    assert desk.submit(body, key="first")["id"] == many["id"]

    busy = [ground.claim() for _ in range(4)]
    assert {claim.account_id for claim in busy} == {desk.account_id}
    one = ground.submit()  # of the ground's own account
    assert ground.claim().lease.job_id == one
    lifecycle.settle(ground.sessions, busy[0].lease, "cancelled")
    assert desk.post("/v1/jobs", body).status_code == 202
    assert desk.post("/v1/jobs", body).status_code == 429


def test_a_key_that_was_never_used_is_not_remembered_by_a_refusal(ground: Ground, desk: Desk) -> None:
    body = desk.order()
    quotas.allow(ground.sessions, "ours", max_active_jobs=0)
    key = uuid4().hex
    assert post(desk.client, body, key).status_code == 429
    quotas.allow(ground.sessions, "ours", max_active_jobs=None)
    job = post(desk.client, {**body, "name": "another"}, key)
    assert job.status_code == 202
    lifecycle.cancel(ground.sessions, desk.account_id, UUID(job.json()["id"]))
