"""The worker as it runs in production: Celery carries the ring, the ledger has the work."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import UUID

import psutil
import pytest
import redis
from sqlalchemy import select

from burnish.local.apps import SWEEPER, WORKER, environment_of
from shared import lifecycle
from shared.db import transaction
from shared.doorbell import Doorbell
from shared.models import Worker
from tests.worker.workshop import Workshop, children, wait_until

EXPORT = [{"kind": "export_onnx"}]
StartWorker = Callable[..., subprocess.Popen[bytes]]


@contextmanager
def process(command: list[str], workshop: Workshop, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **environment_of(workshop.settings), **variables}
    environment |= {"BURNISH_WORK_DIRECTORY": str(workshop.directory / "work"), "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(command, env=environment, cwd=workshop.directory) as started:
        yield started
        if started.poll() is None:
            started.kill()


@pytest.fixture
def start_worker(workshop: Workshop) -> Iterator[StartWorker]:
    """Starts workers that look for themselves only every five minutes, and waits until they have registered."""
    with ExitStack() as stack:

        def start(poll_seconds: float = 300, **variables: str) -> subprocess.Popen[bytes]:
            before = {worker.id for worker in registered(workshop)}
            worker = process([*WORKER], workshop, BURNISH_POLL_SECONDS=str(poll_seconds), **variables)
            started = stack.enter_context(worker)
            wait_until(lambda: {worker.id for worker in registered(workshop)} - before, "the worker to register")
            return started

        yield start


def registered(workshop: Workshop) -> list[Worker]:
    with transaction(workshop.sessions) as session:
        return list(session.scalars(select(Worker)))


def ended(workshop: Workshop, job_id: UUID) -> str | None:
    status = workshop.job(job_id).status
    return status if status in ("succeeded", "failed", "cancelled") else None


def test_a_rung_worker_claims_runs_and_stays_light(workshop: Workshop, start_worker: StartWorker) -> None:
    worker = start_worker()
    job_id = workshop.submit(**workshop.brief())
    doorbell = Doorbell(workshop.settings)
    doorbell.ring("default")
    workshop.wait_for_event(job_id, "stage_started", stage=0)

    running = psutil.Process(worker.pid)
    assert running.memory_info().rss <= 120 * 2**20
    assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text(encoding="utf-8")
    [row] = registered(workshop)
    assert {"engine:onnxruntime", "engine:openvino", "library:monai", "stage:quantize"} <= set(row.capabilities)
    assert row.memory_bytes > 0
    assert row.details["packages"]["onnxruntime"]

    assert wait_until(lambda: ended(workshop, job_id), "the job's end") == "succeeded"
    doorbell.close()


def test_a_worker_hears_the_next_ring_as_soon_as_it_is_free(workshop: Workshop, start_worker: StartWorker) -> None:
    """Left alone, Celery's loop would sleep for up to a second first."""
    for key in list(workshop.storage.list_keys("uploads/data")):
        workshop.storage.remove(key)  # so that every job ends right after its claim
    start_worker()
    doorbell, waits = Doorbell(workshop.settings), []
    for _ in range(5):
        job_id = workshop.submit(stages=EXPORT)
        doorbell.ring("default")
        claimed = workshop.wait_for_event(job_id, "claimed")
        waits.append((claimed.at - workshop.wait_for_event(job_id, "submitted").at).total_seconds())
        assert wait_until(lambda: ended(workshop, job_id), "the job's end") == "failed"  # noqa: B023
    doorbell.close()
    assert sorted(waits)[2] < 0.3, waits


def test_a_worker_that_nobody_rings_looks_for_itself(workshop: Workshop, start_worker: StartWorker) -> None:
    start_worker(poll_seconds=0.5)
    job_id = workshop.submit(stages=EXPORT)
    workshop.wait_for_event(job_id, "claimed")


def test_a_worker_works_without_a_broker(workshop: Workshop, start_worker: StartWorker) -> None:
    start_worker(poll_seconds=0.5, BURNISH_BROKER_URL="redis://127.0.0.1:1/0")
    job_id = workshop.submit(stages=EXPORT)
    workshop.wait_for_event(job_id, "claimed")


def test_the_sweeper_rings_again_for_a_lost_ring(workshop: Workshop, start_worker: StartWorker) -> None:
    start_worker()
    job_id = workshop.submit(stages=EXPORT)  # and nobody rings
    with process([*SWEEPER], workshop, BURNISH_SWEEP_SECONDS="0.2") as sweeper:
        workshop.wait_for_event(job_id, "claimed")
        sweeper.send_signal(signal.SIGTERM)
        assert sweeper.wait(timeout=10) == 0


def test_the_sweeper_collects_what_nothing_points_to_once_it_is_old_enough(workshop: Workshop) -> None:
    orphan = f"accounts/{workshop.account_id}/jobs/{UUID(int=1)}/1/0/orphan"
    workshop.storage.put_bytes(b"of a job of long ago", orphan)
    kept = {key for key in workshop.storage.list_keys() if key != orphan}
    soon = {"HEARTBEAT": "0.1", "LEASE": "0.5", "PRESIGN": "1", "ORPHAN_GRACE": "1", "GC": "0.2"}
    variables = {f"BURNISH_{name}_SECONDS": value for name, value in soon.items()}
    with process([*SWEEPER], workshop, **variables) as sweeper:
        wait_until(lambda: set(workshop.storage.list_keys()) == kept, "the orphan's end")
        sweeper.send_signal(signal.SIGTERM)
        assert sweeper.wait(timeout=10) == 0


def forged(task: str) -> str:
    """A Celery message with a body that no ring has."""
    message = {
        "body": base64.b64encode(json.dumps([[{"a": 1}, 2, 3], {"b": 4}, {}]).encode()).decode(),
        "headers": {"task": task, "id": task, "lang": "py"},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "default"},
            "delivery_tag": task,
        },
    }
    return json.dumps(message)


def test_a_forged_message_is_dropped_and_the_next_ring_is_heard(
    workshop: Workshop, start_worker: StartWorker
) -> None:
    start_worker()
    with redis.Redis.from_url(workshop.settings.broker_url) as broker:
        for task in ("burnish.unheard_of", "burnish.drain"):
            broker.lpush("default", forged(task))
        # A queue with a message that nobody has heard is not rung: the forged ones must be gone first.
        wait_until(lambda: broker.llen("default") == 0, "the worker to take them")
    job_id = workshop.submit(stages=EXPORT)
    doorbell = Doorbell(workshop.settings)
    doorbell.ring("default")
    workshop.wait_for_event(job_id, "claimed")
    doorbell.close()


def test_a_terminated_worker_gives_its_job_back_and_leaves(workshop: Workshop, start_worker: StartWorker) -> None:
    worker = start_worker(poll_seconds=0.5, BURNISH_DRAIN_SECONDS="0.2")
    job_id = workshop.submit(**workshop.brief())
    workshop.wait_for_event(job_id, "stage_started", stage=0)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=30) == 0
    job = workshop.job(job_id)
    assert (job.status, job.attempt, job.max_attempts) == ("queued", 1, 4)
    assert registered(workshop) == []
    assert children(job_id) == []


def test_a_killed_workers_job_is_requeued_when_its_lease_has_lapsed(
    workshop: Workshop, start_worker: StartWorker
) -> None:
    worker = start_worker(poll_seconds=0.5, BURNISH_LEASE_SECONDS="3")
    job_id = workshop.submit(**workshop.brief())
    workshop.wait_for_event(job_id, "stage_started", stage=0)
    worker.kill()
    worker.wait()
    wait_until(lambda: not children(job_id), "the child's end", timeout_seconds=2.0)
    assert wait_until(lambda: lifecycle.sweep_leases(workshop.sessions), "the lease to lapse", timeout_seconds=6.0) == 1
    job = workshop.job(job_id)
    assert job.state_reason is not None
    assert (job.status, job.state_reason["code"]) == ("queued", "worker_lost")
