"""Submits a second over 8 connections, beside a bare FastAPI route that inserts one row.

Both applications run in a uvicorn process of their own on one PostgreSQL that waits for its disk; rounds alternate,
and the table tells their medians. What is asked of us: at least half of the bare route.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import httpx
import psutil
from fastapi import FastAPI
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert
from uuid6 import uuid7

from burnish.local.apps import environment_of, migrate_command
from burnish.local.servers import running_servers
from shared import accounts
from shared.db import make_sessions, transaction
from shared.models import Account
from shared.settings import get_settings
from tests.api.desk import data, recipe, weights

CONNECTIONS = 8
OURS, BARE = "api.main:create_app", "benchmarks.service_submit:bare_app"


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="Length of a round of one application.")
def main(rounds: int, seconds: float) -> None:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="burnish-bench-")))
        settings = stack.enter_context(running_servers(directory))
        environment = {**os.environ, **environment_of(settings)}
        subprocess.run(migrate_command(), env=environment, check=True)
        sessions = make_sessions(settings)
        key = accounts.create_key(sessions, accounts.ensure_account(sessions, "bench"), "bench")
        ours, ours_pid = stack.enter_context(_uvicorn(OURS, environment))
        bare, bare_pid = stack.enter_context(_uvicorn(BARE, environment))
        requests = {
            "bare": (bare, _request(bare, "/rows", {"name": "row"})),
            "burnish": (ours, _request(ours, "/v1/jobs", _order(ours, key), key)),
        }
        rates: dict[str, list[float]] = {name: [] for name in requests}
        for url, request in requests.values():  # warm-up
            asyncio.run(_load(url, request, 1.0))
        for _ in range(rounds):
            for name, (url, request) in requests.items():
                rates[name].append(asyncio.run(_load(url, request, seconds)))
        _print(rates, {"bare": bare_pid, "burnish": ours_pid})


class Row(BaseModel):
    name: str


def bare_app() -> FastAPI:
    """The least that FastAPI, SQLAlchemy and one INSERT can do."""
    sessions = make_sessions(get_settings())
    app = FastAPI()

    @app.post("/rows", status_code=201)
    def add(row: Row) -> dict[str, UUID]:
        row_id = uuid7()
        with transaction(sessions) as session:
            session.execute(insert(Account).values(id=row_id, name=f"{row.name}-{row_id}"))
        return {"id": row_id}

    return app


def _print(rates: dict[str, list[float]], pids: dict[str, int]) -> None:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    table = Table(title=f"submits over {CONNECTIONS} connections, {os.cpu_count()} cores")
    for column in ("route", "median /s", "lowest", "highest", "of bare", "memory MB"):
        table.add_column(column, justify="right" if column != "route" else "left")
    for name, found in rates.items():
        memory = psutil.Process(pids[name]).memory_info().rss / 1e6
        share = medians[name] / medians["bare"]
        figures = (f"{medians[name]:.0f}", f"{min(found):.0f}", f"{max(found):.0f}", f"{share:.2f}", f"{memory:.0f}")
        table.add_row(name, *figures)
    Console().print(table)


def _order(url: str, key: str) -> dict[str, Any]:
    """A job whose files lie in storage, so that all of its checks are made."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False) as client:
        ids = [_upload(client, content) for content in (weights(), data())]
    return {"name": "bench", "recipe": recipe(*ids)}


def _upload(client: httpx.Client, content: bytes) -> str:
    facts = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    begun = client.post("/v1/uploads", json={"name": "file", "format": "safetensors", **facts}).json()
    httpx.put(begun["parts"][0]["url"], content=content, trust_env=False).raise_for_status()
    client.post(f"/v1/uploads/{begun['id']}/complete").raise_for_status()
    return str(begun["id"])


@contextmanager
def _uvicorn(factory: str, environment: dict[str, str]) -> Iterator[tuple[str, int]]:
    """One process that serves the application; yields its URL and pid."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", "--no-access-log"]
    process = subprocess.Popen([sys.executable, "-m", "uvicorn", "--factory", factory, *options], env=environment)
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


# ---------------------------------------------------------------- the load: as little Python a request as can be


def _request(url: str, path: str, body: dict[str, Any], key: str = "") -> bytes:
    content = json.dumps(body).encode()
    host = url.removeprefix("http://")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def _load(url: str, request: bytes, seconds: float) -> float:
    """Requests a second that were answered 2xx, over CONNECTIONS connections that each have one on its way."""
    host, port = url.removeprefix("http://").split(":")
    until = time.monotonic() + seconds
    counts = await asyncio.gather(*(_one_connection(host, int(port), request, until) for _ in range(CONNECTIONS)))
    return sum(counts) / seconds


async def _one_connection(host: str, port: int, request: bytes, until: float) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    answered = 0
    while time.monotonic() < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 20"):
            raise RuntimeError(head.decode())
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))
        answered += 1
    writer.close()
    await writer.wait_closed()
    return answered


if __name__ == "__main__":
    main()
