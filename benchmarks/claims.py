"""From the 202 of a submit to a claimed job, on a worker that has nothing else to do."""

from __future__ import annotations

import random
import threading
import time
from uuid import UUID, uuid4

import httpx

from benchmarks.figures import Figure, Part, percentile
from benchmarks.stand import Stand
from shared.db import make_sessions, transaction
from shared.models import Artifact, Job
from shared.recipe import Recipe
from shared.schemas import JobRequest
from shared.storage import Storage

SAMPLES = 60
LONGEST_MS = 250
REST_SECONDS = (0.1, 0.5)  # drawn anew before each sample, so that no clock of the worker's keeps step with it


def measure(stand: Stand, recipe: Recipe) -> Part:
    """`recipe` is a job's that the service has already taken; its stages are never run here."""
    order = JobRequest(name="claim", recipe=_without_data(stand, recipe), max_attempts=1).model_dump(mode="json")
    headers = {"Authorization": f"Bearer {stand.key}"}
    seen_ms, stamped_ms = [], []
    with httpx.Client(base_url=stand.url, headers=headers, timeout=60, trust_env=False) as client:
        for _ in range(SAMPLES):
            threading.Event().wait(random.uniform(*REST_SECONDS))
            job_id, seen = _one(client, order)
            seen_ms.append(1000 * seen)
            stamped_ms.append(_stamped_ms(client, job_id))
    return _part(seen_ms, stamped_ms)


def _one(client: httpx.Client, order: dict[str, object]) -> tuple[UUID, float]:
    """Submit a job; seconds from the 202's arrival until an answer says that it was claimed, then wait for its end."""
    answer = client.post("/v1/jobs", json=order, headers={"Idempotency-Key": uuid4().hex})
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
    events = client.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "application/json"}).raise_for_status().json()
    at = {event["kind"]: event["at"] for event in events["items"]}
    return 1000 * (_seconds(at["claimed"]) - _seconds(at["submitted"]))


def _without_data(stand: Stand, recipe: Recipe) -> Recipe:
    """The recipe on a data set that is known but gone from storage: its jobs are claimed, and end before a child."""
    sessions = make_sessions(stand.settings, pool_size=1)
    with transaction(sessions) as session:
        known = session.get_one(Artifact, recipe.data.artifact)
        facts = {column.key: getattr(known, column.key) for column in Artifact.__table__.columns}
        gone = Artifact(**{**facts, "id": uuid4(), "key": f"{known.key}.gone"})
        session.add(gone)
        session.flush()
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"artifact": gone.id})})
