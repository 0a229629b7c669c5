"""A thousand clients that wait on one api process, half by event streams and half by long polls: `make bench-watchers`.

All of them watch one job, which is the worst that they can do: each of its events wakes everyone. Keeps the page in
benchmarks/results/watchers.md, and ends with exit code 1 if a bar is missed.
"""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import httpx
import psutil
from rich.console import Console
from sqlalchemy import Engine

from benchmarks import submits
from benchmarks.figures import Figure, Part, as_markdown, as_table, percentile
from benchmarks.probe import probing
from burnish.local.apps import environment_of, migrate_command
from burnish.local.servers import running_servers
from shared import accounts, browse, lifecycle
from shared.db import Sessions, make_sessions
from shared.ledger import Capacity, Lease, Progress
from worker.environment import capabilities, environment

RESULTS = Path(__file__).parent / "results" / "watchers.md"
TITLE = "A thousand who wait"
STREAMS, POLLS = 500, 500
WAVES, EVENTS = 2, 5
CALM_SECONDS, QUIET_RATIO, PATIENCE_SECONDS = 3.0, 0.4, 120.0
LONGEST_HEALTH_MS = 100.0
MOST_KIB_EACH, MOST_OF_FIRST = 100.0, 1.1


@click.command()
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="The page to write.")
def main(out: Path) -> None:
    """Measure everything, show it, and write it down."""
    begin, load = time.monotonic(), os.getloadavg()[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the api's process inherits it
    with running_bench() as bench:
        waves = [asyncio.run(bench.wave()) for _ in range(WAVES)]
    parts = [_health(waves), _telling(waves), _memory(waves)]
    here = environment()
    facts = [
        f"{datetime.now(UTC):%d %B %Y}, {here.cpu}, {here.cores} cores, Python {here.python}",
        f"load average at the start: {load:.2f}",
        f"open files allowed: {hard:,} (before: {soft:,})",
        f"took {time.monotonic() - begin:.0f} s",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_markdown(parts, facts, TITLE), encoding="utf-8")
    Console().print(as_table(parts, TITLE))
    sys.exit(0 if all(figure.kept for part in parts for figure in part.figures) else 1)


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Wave:
    """What a wave of watchers did: memory in MiB, and how long /healthz took in milliseconds, phase by phase."""

    memory: dict[str, float]
    health_ms: dict[str, list[float]]
    told_seconds: list[float]  # from an event's commit until the last watcher has it


@dataclass(frozen=True)
class Bench:
    """One api process, and a job that runs."""

    port: int
    key: str
    sessions: Sessions
    account_id: UUID
    lease: Lease
    process: psutil.Process

    async def wave(self) -> Wave:
        """All watchers come, wait, are told of events one by one, and go."""
        memory, told_seconds, phases = {"before": self._mebibytes()}, [], dict[str, tuple[float, float]]()
        with probing(self.port) as answers:
            phases["nobody there"] = await self._calm()
            begin = time.monotonic()
            async with Watchers(self.port, f"/v1/jobs/{self.lease.job_id}", self.key).connected() as watchers:
                await watchers.know(self._newest())
                phases["all coming"] = begin, time.monotonic()
                await self._quiet()
                phases["all waiting"] = await self._calm()
                memory["waiting"] = self._mebibytes()
                begin = time.monotonic()
                for number in range(EVENTS):
                    told_at = await asyncio.to_thread(self._tell, f"event {number}")
                    told_seconds.append(await watchers.know(self._newest()) - told_at)
                    await self._quiet()
                phases["all told"] = begin, time.monotonic()
                memory["told"] = self._mebibytes()
            await self._quiet()
            memory["after"] = self._mebibytes()
        health_ms = {
            phase: [1000 * took for at, took in answers if begin <= at - took <= end]
            for phase, (begin, end) in phases.items()
        }
        return Wave(memory, health_ms, told_seconds)

    def _mebibytes(self) -> float:
        return float(self.process.memory_info().rss) / 2**20

    def _newest(self) -> int:
        return browse.standing(self.sessions, self.account_id, self.lease.job_id).last_sequence

    def _tell(self, message: str) -> float:
        lifecycle.tell(self.sessions, self.lease, Progress(None, 0.5, message), "")
        return time.monotonic()

    async def _calm(self) -> tuple[float, float]:
        begin = time.monotonic()
        await asyncio.sleep(CALM_SECONDS)
        return begin, time.monotonic()

    async def _quiet(self) -> None:
        """Wait until the api has nothing more to do than to answer the probe."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            before = sum(self.process.cpu_times()[:2])
            await asyncio.sleep(0.2)
            if sum(self.process.cpu_times()[:2]) - before <= 0.2 * QUIET_RATIO:
                return
        raise TimeoutError("the api does not come to rest")


@contextmanager
def running_bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="burnish-bench-")))
        settings = stack.enter_context(running_servers(directory / "servers"))
        given = environment_of(settings)
        subprocess.run(migrate_command(), env={**os.environ, **given}, check=True)
        sessions = make_sessions(settings, pool_size=2)
        account_id = accounts.ensure_account(sessions, "bench")
        key = accounts.create_key(sessions, account_id, "bench")
        url = stack.enter_context(submits.serving("api.main:create_app", given))
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        body = submits.order(url, key, directory)
        httpx.post(f"{url}/v1/jobs", content=body, headers=headers, trust_env=False).raise_for_status()
        claim = lifecycle.claim(sessions, Capacity("bench", ["default"], capabilities(), 2**40), 3600)
        assert claim is not None
        (process,) = (child for child in psutil.Process().children() if "api.main:create_app" in child.cmdline())
        yield Bench(int(url.rpartition(":")[2]), key, sessions, account_id, claim.lease, process)
        engine = sessions.kw["bind"]
        assert isinstance(engine, Engine)
        engine.dispose()


# ---------------------------------------------------------------- who watches


class Watchers:
    """Clients of one job, each on a connection of its own, with as little Python as can be."""

    def __init__(self, port: int, path: str, key: str) -> None:
        self._port, self._path, self._key = port, path, key
        self._seen = [0] * (STREAMS + POLLS)  # the newest event that each knows
        self._moved = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Watchers]:
        """All of them, until the end."""
        deeds = [self._stream(number) for number in range(STREAMS)]
        deeds += [self._poll(STREAMS + number) for number in range(POLLS)]
        self._tasks = [asyncio.ensure_future(deed) for deed in deeds]
        try:
            yield self
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def know(self, sequence: int) -> float:
        """Wait until every one knows of this event; the moment at which the last one did, by the monotonic clock."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while min(self._seen) < sequence:
                self._moved.clear()
                await self._moved.wait()
                for task in self._tasks:
                    if task.done():
                        task.result()  # which raises what ended it
        return time.monotonic()

    def _note(self, number: int, sequence: int) -> None:
        self._seen[number] = sequence
        self._moved.set()

    async def _stream(self, number: int) -> None:
        async with self._connection() as (reader, writer):
            writer.write(self._request(f"{self._path}/events", "Accept: text/event-stream"))
            await _head(reader)
            while line := await reader.readline():
                if line.startswith(b"id: "):
                    self._note(number, int(line[4:]))
        self._moved.set()
        raise ConnectionError("a stream ended before its job did")

    async def _poll(self, number: int) -> None:
        """Ask for the job as it is, and then for each change."""
        path, known = self._path, ""
        async with self._connection() as (reader, writer):
            while True:
                writer.write(self._request(path, f"If-None-Match: {known}"))
                headers = await _head(reader)
                await reader.readexactly(int(headers.get("content-length", "0")))
                path, known = f"{self._path}?wait=60", headers["etag"]
                self._note(number, int(known.strip('"')))

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def _request(self, path: str, header: str) -> bytes:
        head = f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {self._key}\r\n{header}\r\n\r\n"
        return head.encode()


async def _head(reader: asyncio.StreamReader) -> dict[str, str]:
    """An answer's headers, by their names in small letters."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    if first.split()[1] not in ("200", "304"):
        raise ConnectionError(f"a watcher was answered {first}")
    headers = (line.partition(":") for line in lines)
    return {name.lower(): value.strip() for name, _, value in headers}


# ---------------------------------------------------------------- what it comes to


def _health(waves: list[Wave]) -> Part:
    phases = {phase: [ms for wave in waves for ms in wave.health_ms[phase]] for phase in waves[0].health_ms}
    figures = []
    for phase in ("all coming", "all waiting", "all told"):
        p99 = percentile(phases[phase], 99)
        told = f"p99 {p99:.0f} ms (p50 {percentile(phases[phase], 50):.1f}, highest {max(phases[phase]):.0f})"
        bar = f"at most {LONGEST_HEALTH_MS:.0f} ms"
        figures.append(Figure(f"/healthz, {phase}", told, bar, p99 <= LONGEST_HEALTH_MS))
    return Part(
        title="/healthz",
        method=(
            f"Asked from a process of its own on one connection, 10 ms after each answer, in {WAVES} waves of "
            f"{STREAMS:,} streams and {POLLS:,} long polls that all watch one job: while all come at one moment, for "
            f"{CALM_SECONDS:g} s while all wait, and while {EVENTS} events are told one after the other, of each of "
            f"which all hear. Clients, api and database share the cores."
        ),
        figures=figures,
        details=[
            f"- {phase}: p50 {percentile(found, 50):.1f}, p99 {percentile(found, 99):.1f}, highest {max(found):.1f} ms "
            f"of {len(found)} answers"
            for phase, found in phases.items()
        ],
    )


def _telling(waves: list[Wave]) -> Part:
    told = [seconds for wave in waves for seconds in wave.told_seconds]
    return Part(
        title="An event, told to all",
        method=(
            f"From the commit of an event until the last of {STREAMS + POLLS:,} watchers has read it, "
            f"{EVENTS} times in each of {WAVES} waves."
        ),
        figures=[],
        details=[f"- until the last has it: median {percentile(told, 50):.2f} s, highest {max(told):.2f} s"],
    )


def _memory(waves: list[Wave]) -> Part:
    first, last = waves[0].memory, waves[-1].memory
    each = 1024 * (max(first.values()) - first["before"]) / (STREAMS + POLLS)
    growth = max(last.values()) / max(first.values())
    header: list[Any] = ["| wave | " + " | ".join(first) + " |", "|---" * (len(first) + 1) + "|"]
    return Part(
        title="Memory of the api",
        method=(
            "VmRSS of its process before the watchers come, while they wait, after they were told, and after they "
            "have gone. What a first wave took is kept for the next."
        ),
        figures=[
            Figure(
                "memory for each watcher, first wave",
                f"{each:.0f} KiB",
                f"at most {MOST_KIB_EACH:.0f} KiB",
                each <= MOST_KIB_EACH,
            ),
            Figure(
                f"highest memory in wave {WAVES}, of the first wave's",
                f"{growth:.2f}",
                f"at most {MOST_OF_FIRST:g}",
                growth <= MOST_OF_FIRST,
            ),
        ],
        details=[
            *header,
            *(
                f"| {number} | " + " | ".join(f"{mebibytes:.0f} MiB" for mebibytes in wave.memory.values()) + " |"
                for number, wave in enumerate(waves, 1)
            ),
        ],
    )


if __name__ == "__main__":
    main()
