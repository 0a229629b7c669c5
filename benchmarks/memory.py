"""Memory of the processes that stay: the api after 500 requests, Celery's process after jobs; neither holds torch."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import httpx

from benchmarks.figures import Figure, Part
from benchmarks.stand import Stand
from shared.schemas import JobRequest

API_MIB, WORKER_MIB = 150, 120
MIB = 2**20
REQUESTS = 500
NOBODYS_QUEUE = "nobody"  # no worker takes from it, so the jobs wait until they are cancelled


def measure(stand: Stand, order: JobRequest) -> Part:
    """To be called once the worker has run jobs."""
    _ask(stand, order)
    found = {"the api": (stand.pid("api"), API_MIB), "the Celery worker's process": (stand.pid("worker-1"), WORKER_MIB)}
    figures = []
    for name, (pid, most) in found.items():
        resident = resident_bytes(pid)
        measured = f"{resident / MIB:.1f} MiB ({resident / 1e6:.1f} MB)"
        figures.append(Figure(f"memory of {name}", measured, f"at most {most} MiB", resident <= most * MIB))
    heavy = [name for name, (pid, _) in found.items() if has_torch(pid)]
    words = "in neither" if not heavy else f"in {' and '.join(heavy)}"
    figures.append(Figure("libtorch mapped", words, "in neither", not heavy))
    return Part(
        title="Memory of what stays",
        method=(
            f"VmRSS and /proc/pid/maps of the two processes of the service that ran all jobs "
            f"above: the api after {REQUESTS} more requests (submits with Idempotency-Keys, views, lists, events, "
            f"cancels), the process of `python -m worker` after its jobs."
        ),
        figures=figures,
    )


def _ask(stand: Stand, order: JobRequest) -> None:
    """REQUESTS requests of five kinds."""
    body = order.model_copy(update={"queue": NOBODYS_QUEUE}).model_dump(mode="json")
    headers = {"Authorization": f"Bearer {stand.key}"}
    with httpx.Client(base_url=stand.url, headers=headers, timeout=60, trust_env=False) as client:
        for _ in range(REQUESTS // 5):
            answer = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": uuid4().hex})
            job = f"/v1/jobs/{answer.raise_for_status().json()['id']}"
            for path in (job, "/v1/jobs", f"{job}/events"):
                client.get(path).raise_for_status()
            client.post(f"{job}/cancel").raise_for_status()


def resident_bytes(pid: int) -> int:
    """VmRSS as the kernel tells it."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def has_torch(pid: int) -> bool:
    """Whether any of torch's libraries is mapped into a process."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
