"""The front desk killed at the worst moments: what it acknowledged is in the ledger and will run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID

import httpx
import psutil
import redis
from sqlalchemy import func, select

from burnish.local.apps import environment_of
from shared import browse, workers
from shared.db import transaction
from shared.models import Job
from shared.settings import Settings
from shared.workers import Registration
from tests.api.desk import CAPABILITIES, Desk, client_of, wait_until


def test_a_job_acknowledged_by_a_desk_that_dies_before_it_rings_is_found_and_rung(desk: Desk) -> None:
    body = desk.order()
    no_broker = desk.settings.model_copy(update={"broker_url": "redis://127.0.0.1:9/0"})
    with _process(no_broker) as (url, process), client_of(url, desk.key) as client:
        job = client.post("/v1/jobs", json=body).json()
        process.kill()
        process.wait(timeout=10)
    assert browse.job(desk.sessions, desk.account_id, UUID(job["id"]))["status"] == "queued"
    with redis.Redis.from_url(desk.settings.broker_url) as broker:
        assert broker.llen("default") == 0
    workers.register(desk.sessions, Registration("w1", "h", ["default"], CAPABILITIES, 2, 2**40, {}))
    assert workers.queues_with_work(desk.sessions) == ["default"]
    assert desk.claim().lease.job_id == UUID(job["id"])


def test_a_desk_killed_around_its_commits_makes_each_job_once(desk: Desk) -> None:
    body = desk.order()
    keys = [f"key-{number}" for number in range(24)]
    acknowledged: dict[str, str] = {}

    def submit(url: str, key: str) -> None:
        with client_of(url, desk.key) as client:
            try:
                answer = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
            except httpx.TransportError:
                return  # cut off: whether the job exists is not known
        assert answer.status_code == 202
        assert acknowledged.setdefault(key, answer.json()["id"]) == answer.json()["id"]

    with _process(desk.settings) as (url, process), ThreadPoolExecutor(8) as pool:
        submits = [pool.submit(submit, url, key) for key in keys]
        wait_until(lambda: _num_jobs(desk) >= 6)
        process.kill()
        for done in submits:
            done.result(timeout=30)
    before = dict(acknowledged)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: submit(desk.url, key), keys * 2))
    assert _num_jobs(desk) == len(keys)
    assert {key: acknowledged[key] for key in before} == before
    assert len(set(acknowledged.values())) == len(keys)


def test_the_desk_stays_small(desk: Desk) -> None:
    body = desk.order()
    with _process(desk.settings) as (url, process), client_of(url, desk.key) as client:
        job = client.post("/v1/jobs", json=body).json()
        for _ in range(50):
            client.post("/v1/jobs", json=body)
            client.get("/v1/jobs", params={"limit": 20})
            client.get(f"/v1/jobs/{job['id']}")
            client.post("/v1/uploads", json={"name": "f", "format": "zip", "size_bytes": 9, "sha256": "0" * 64})
        assert psutil.Process(process.pid).memory_info().rss <= 150e6


def test_a_desk_with_open_streams_stops_when_it_is_asked(desk: Desk) -> None:
    job = desk.submit()
    with _process(desk.settings) as (url, process), client_of(url, desk.key) as client:
        path = f"{url}/v1/jobs/{job['id']}/events"
        with client.stream("GET", path, headers={"Accept": "text/event-stream"}) as answer:
            assert next(answer.iter_lines()) == "id: 1"
            process.terminate()
            process.wait(timeout=10)


@contextmanager
def _process(settings: Settings) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A front desk in a process of its own, that can be killed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, **environment_of(settings)}
    options = ["--host", "127.0.0.1", "--port", str(port), "--no-access-log", "--timeout-graceful-shutdown", "1"]
    command = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app", *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _listens(port), seconds=30)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait(timeout=10)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _num_jobs(desk: Desk) -> int:
    with transaction(desk.sessions) as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


