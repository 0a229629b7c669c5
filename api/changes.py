"""Who waits for a job to change: one thread listens to Postgres and wakes the coroutines that watch that job.

A wait costs neither a thread nor a connection. While the listener has no connection it wakes everyone every few
seconds, so that a lost notification costs time and never an event: whoever wakes reads the ledger again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import psycopg
from sqlalchemy import make_url

from shared.log import get_logger
from shared.settings import Settings

CHANNEL = "burnish_job"
BLIND_SECONDS = 2.0  # between looks while the listener has no connection
CLOSING_SECONDS = 0.2


class Changes:
    """Wakes those who watch a job. Made, watched and closed on one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._conninfo = make_url(settings.database_url).set(drivername="postgresql").render_as_string(False)
        self._loop = asyncio.get_running_loop()
        self._watchers: dict[UUID, set[asyncio.Event]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="changes", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, job_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job may have changed since the watch began, or since it was cleared."""
        woken = asyncio.Event()
        watchers = self._watchers.setdefault(job_id, set())
        watchers.add(woken)
        try:
            yield woken
        finally:
            watchers.discard(woken)
            if not watchers and self._watchers.get(job_id) is watchers:
                del self._watchers[job_id]

    @property
    def num_watched(self) -> int:
        """Jobs that somebody waits for."""
        return len(self._watchers)

    async def close(self) -> None:
        """Stop listening."""
        self._closing.set()
        await asyncio.to_thread(self._thread.join, 25 * CLOSING_SECONDS)

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                self._hear()
            except psycopg.Error as error:
                get_logger().warning("listener_lost", error=str(error))
                self._tell(None)
                self._closing.wait(BLIND_SECONDS)

    def _hear(self) -> None:
        with psycopg.connect(
            self._conninfo,
            autocommit=True,
            connect_timeout=5,
            keepalives_idle=10,
            keepalives_interval=3,
            keepalives_count=3,
        ) as link:
            link.execute(f"LISTEN {CHANNEL}")
            self._tell(None)  # what happened while nobody listened
            while not self._closing.is_set():
                for notice in link.notifies(timeout=CLOSING_SECONDS):
                    self._tell(UUID(notice.payload))

    def _tell(self, job_id: UUID | None) -> None:
        if not self._closing.is_set():
            self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: UUID | None) -> None:
        """Wake those who watch one job, or everyone."""
        for watched in list(self._watchers) if job_id is None else [job_id]:
            for woken in self._watchers.get(watched, ()):
                woken.set()
