"""Submits a second over 8 connections, beside a bare FastAPI route that inserts one row.

Both applications run in a uvicorn process of their own on one PostgreSQL that waits for its disk; rounds of one and
of the other take turns. No worker runs: a job that is being worked at would take a core from both.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import save_file

from benchmarks.bare import PATH
from benchmarks.figures import Figure, Part, percentile, spread
from burnish import Client
from burnish.local.apps import API, API_OPTIONS, environment_of, migrate_command
from burnish.local.place import free_ports
from burnish.local.servers import running_servers
from burnish.local.waiting import wait_until
from shared import accounts
from shared.db import make_sessions

CONNECTIONS = 8
LEAST_RATIO = 0.5
ROUNDS, ROUND_SECONDS, WARM_UP_SECONDS = 7, 3.0, 2.0

Request = Callable[[], bytes]  # each call is another request, with another Idempotency-Key


def measure() -> Part:
    """The medians of both rates, and their ratio round by round."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="burnish-bench-")))
        settings = stack.enter_context(running_servers(directory / "servers"))
        environment = environment_of(settings.model_copy(update={"max_active_jobs_per_account": 10**6}))
        subprocess.run(migrate_command(), env={**os.environ, **environment}, check=True)
        sessions = make_sessions(settings, pool_size=1)
        key = accounts.create_key(sessions, accounts.ensure_account(sessions, "bench"), "bench")
        ours = stack.enter_context(serving("api.main:create_app", environment))
        bare = stack.enter_context(serving("benchmarks.bare:create_app", environment))
        submit, insert = _request(ours, "/v1/jobs", order(ours, key, directory), key), _request(bare, PATH, b"{}")
        requests = {"burnish": (ours, submit), "bare": (bare, insert)}
        rates: dict[str, list[float]] = {name: [] for name in requests}
        for url, request in requests.values():
            asyncio.run(_load(url, request, WARM_UP_SECONDS))
        for number in range(ROUNDS):
            for name in sorted(requests, reverse=number % 2 == 1):
                rates[name].append(asyncio.run(_load(*requests[name], ROUND_SECONDS)))
    return _part(rates["burnish"], rates["bare"])


def _part(ours: list[float], bare: list[float]) -> Part:
    ratios = [mine / other for mine, other in zip(ours, bare, strict=True)]
    ratio = percentile(ratios, 50)
    return Part(
        title="Submits a second",
        method=(
            f"`POST /v1/jobs` with an API key, a new Idempotency-Key each time and a recipe of three stages whose "
            f"files lie in storage, beside a bare FastAPI route (benchmarks/bare.py) that inserts one row. One uvicorn "
            f"process each with the same options, one PostgreSQL with fsync on; {CONNECTIONS} connections with one "
            f"request each on its way; {ROUNDS} rounds of {ROUND_SECONDS:g} s of each in turns; median (lowest to "
            f"highest)."
        ),
        figures=[
            Figure(
                f"submits of the bare route's inserts, {CONNECTIONS} connections",
                spread(ratios, ".2f"),
                f"at least {LEAST_RATIO:g}",
                ratio >= LEAST_RATIO,
            )
        ],
        details=[f"- submits: {spread(ours, '.0f')} /s", f"- bare inserts: {spread(bare, '.0f')} /s"],
    )


def order(url: str, key: str, directory: Path) -> bytes:
    """A job whose files lie in storage, so that all of its checks are made."""
    images, masks = np.zeros((4, 1, 8, 8), np.float32), np.zeros((4, 8, 8), np.uint8)
    network = {"conv.weight": np.zeros((8, 1, 3, 3), np.float32), "conv.bias": np.zeros(8, np.float32)}
    save_file(network, directory / "network.safetensors")
    save_file(
        {"calibration.images": images, "evaluation.images": images, "evaluation.masks": masks},
        directory / "data.safetensors",
    )
    with Client(url, key) as client:
        weights, data = (client.upload(directory / f"{name}.safetensors") for name in ("network", "data"))
    recipe = {
        "source": {"architecture": {"library": "monai", "name": "BasicUNet"}, "weights": str(weights)},
        "task": {"kind": "segmentation", "classes": ["background", "brain"], "background": 0},
        "data": {"artifact": str(data)},
        "stages": [{"kind": "export_onnx"}, {"kind": "quantize"}, {"kind": "build_engine"}],
    }
    return json.dumps({"name": "bench", "recipe": recipe}).encode()


@contextmanager
def serving(factory: str, environment: dict[str, str]) -> Iterator[str]:
    """One uvicorn process with local mode's options; yields its URL."""
    port = free_ports(1)[0]
    command = [*API, "--port", str(port), *API_OPTIONS]
    command[command.index("api.main:create_app")] = factory
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(command, env={**os.environ, **environment, "PYTHONPATH": root})
    try:
        url = f"http://127.0.0.1:{port}"
        if not wait_until(lambda: _answers(url), timeout_seconds=30):
            raise TimeoutError(f"{factory} does not answer")
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/openapi.json", trust_env=False).is_success
    except httpx.TransportError:
        return False


# ---------------------------------------------------------------- the load: as little Python a request as can be


def _request(url: str, path: str, body: bytes, key: str = "") -> Request:
    host = url.removeprefix("http://")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nIdempotency-Key: "
    before, after, numbers = head.encode(), b"\r\n\r\n" + body, count()
    return lambda: b"%b%032x%b" % (before, next(numbers), after)


async def _load(url: str, request: Request, seconds: float) -> float:
    """Requests a second that were answered 2xx, over CONNECTIONS connections that each have one on its way."""
    host, port = url.removeprefix("http://").split(":")
    begin = time.monotonic()
    connections = [_one_connection(host, int(port), request, begin + seconds) for _ in range(CONNECTIONS)]
    answered = sum(await asyncio.gather(*connections))
    return answered / (time.monotonic() - begin)


async def _one_connection(host: str, port: int, request: Request, until: float) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    answered = 0
    while time.monotonic() < until:
        writer.write(request())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 2"):
            raise RuntimeError((head + body).decode())
        answered += 1
    writer.close()
    await writer.wait_closed()
    return answered
