"""From the 202 of a submit to a claimed job, on a worker that has nothing else to do."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from pathlib import Path
from uuid import UUID, uuid4

import httpx
from safetensors.numpy import load_file, save_file

from benchmarks.figures import Figure, Part, percentile
from benchmarks.stand import Stand
from shared.schemas import EventList, JobRequest
from shared.storage import Storage

SAMPLES = 60
LONGEST_MS = 250
REST_SECONDS = (0.1, 0.5)  # drawn anew before each sample, so that no clock of the worker's keeps step with it


def measure(stand: Stand, order: JobRequest, data: Path) -> Part:
    """`order` is one that the service has already taken, and `data` its data set."""
    body = _without_data(stand, order, data).model_dump(mode="json")
    headers = {"Authorization": f"Bearer {stand.key}"}
    seen_ms, stamped_ms = [], []
    with httpx.Client(base_url=stand.url, headers=headers, timeout=60, trust_env=False) as client:
        for _ in range(SAMPLES):
            threading.Event().wait(random.uniform(*REST_SECONDS))
            job_id, seen = _one(client, body)
            seen_ms.append(1000 * seen)
            stamped_ms.append(_stamped_ms(client, job_id))
    return _part(seen_ms, stamped_ms)


def _one(client: httpx.Client, body: dict[str, object]) -> tuple[UUID, float]:
    """Submit a job; seconds from the 202's arrival until an answer says that it was claimed, then wait for its end."""
    answer = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": uuid4().hex})
    begin = time.perf_counter()
    answer.raise_for_status()
    assert answer.status_code == 202
    job, tag, seen = answer.json(), answer.headers["ETag"], 0.0
    while job["status"] in ("queued", "running"):
        answer = client.get(f"/v1/jobs/{job['id']}", params={"wait": 30}, headers={"If-None-Match": tag})
        if answer.status_code == 304:
            continue
        job, tag = answer.raise_for_status().json(), answer.headers["ETag"]
        if job["attempt"] and not seen:
            seen = time.perf_counter() - begin
    assert job["state_reason"]["code"] == "input_missing", job["state_reason"]
    return UUID(job["id"]), seen


def _stamped_ms(client: httpx.Client, job_id: UUID) -> float:
    """Milliseconds from the event `submitted` to the event `claimed`, by the database's clock."""
    answer = client.get(f"/v1/jobs/{job_id}/events").raise_for_status()
    at = {event.kind: event.at for event in EventList.model_validate_json(answer.content).items}
    return (at["claimed"] - at["submitted"]).total_seconds() * 1000


def _without_data(stand: Stand, order: JobRequest, data: Path) -> JobRequest:
    """The order on a data set whose object is gone: its jobs are claimed, and end before a child is spawned."""
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as directory:
        other = Path(directory) / "other.safetensors"
        save_file(load_file(data), other, metadata={"for": "claims"})
        artifact_id = stand.client.upload(other)
    storage = Storage(stand.settings)
    (key,) = (key for key in storage.list_keys("uploads/") if str(artifact_id) in key)
    storage.remove(key)
    gone = order.recipe.data.model_copy(update={"artifact": artifact_id})
    return order.model_copy(update={"recipe": order.recipe.model_copy(update={"data": gone})})


def _part(seen_ms: list[float], stamped_ms: list[float]) -> Part:
    p95 = percentile(seen_ms, 95)
    return Part(
        title="From 202 to a claimed job",
        method=(
            f"{SAMPLES} jobs, one after the other's end, each after a random pause of {REST_SECONDS[0]:g} to "
            f"{REST_SECONDS[1]:g} s, on an idle worker. By the client's clock: from the 202's arrival until a "
            f"`GET /v1/jobs/{{id}}?wait=30` answers that the job has an attempt, so the notification and the answer's "
            f"way back are in it. The jobs name a data set that is gone from storage, so they end right after the "
            f"claim."
        ),
        figures=[
            Figure(
                "from 202 to a claimed job, p95 on an idle worker",
                f"{p95:.0f} ms (p50 {percentile(seen_ms, 50):.0f}, highest {max(seen_ms):.0f})",
                f"at most {LONGEST_MS} ms",
                p95 <= LONGEST_MS,
            )
        ],
        details=[
            f"- by the database's clock, from the event `submitted` to the event `claimed`: "
            f"p50 {percentile(stamped_ms, 50):.0f}, p95 {percentile(stamped_ms, 95):.0f} ms"
        ],
    )
