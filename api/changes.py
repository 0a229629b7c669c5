"""Who waits for a job to change: one thread listens to Postgres and wakes the coroutines that watch that job.

A wait costs neither a thread nor a connection. Those who wake take turns and read the ledger few at a time, or one of
them for all, so that a thousand of them do not hold up who does not wait. While the listener has no
connection it wakes everyone every few seconds, so that a lost notification costs time and never an event: whoever wakes
reads the ledger again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

import psycopg
from anyio import CapacityLimiter, to_thread
from sqlalchemy import make_url

from api.turns import Turns
from shared.errors import TooManyWaiting
from shared.log import get_logger
from shared.settings import Settings
from shared.watchers import CHANNEL

BLIND_SECONDS = 2.0  # between looks while the listener has no connection
CLOSING_SECONDS = 0.2
READERS = 3

P = ParamSpec("P")
T = TypeVar("T")


class Changes:
    """Wakes those who watch a job. Made, watched and closed on one event loop."""

    def __init__(self, settings: Settings, turns: Turns) -> None:
        self._conninfo = make_url(settings.database_url).set(drivername="postgresql").render_as_string(False)
        self._loop = asyncio.get_running_loop()
        self._turns = turns
        self._readers = CapacityLimiter(READERS)
        self._max_watchers = settings.max_waiting
        self._num_watchers = 0
        self._watchers: dict[UUID, set[asyncio.Event]] = {}
        self._num_tidings = 0
        self._asked: dict[Hashable, asyncio.Task[Any]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="changes", daemon=True)
        self._thread.start()

    def demand_room(self) -> None:
        """See that one more may watch; raises TooManyWaiting."""
        if self._num_watchers >= self._max_watchers:
            raise TooManyWaiting

    @contextmanager
    def watch(self, job_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job may have changed since the watch began, or since it was cleared."""
        woken = asyncio.Event()
        self._num_watchers += 1
        watchers = self._watchers.setdefault(job_id, set())
        watchers.add(woken)
        try:
            yield woken
        finally:
            self._num_watchers -= 1
            watchers.discard(woken)
            if not watchers and self._watchers.get(job_id) is watchers:
                del self._watchers[job_id]

    async def ask(self, look: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `look` tells a watcher, asked in a thread; the watchers take turns.

        Who asks the same while nothing new is known to have happened shares one answer. The arguments are hashable.
        """
        question = (look, args, tuple(kwargs.items()), self._num_tidings)
        answer: asyncio.Task[T] | None = self._asked.get(question)
        if answer is None:
            answer = self._loop.create_task(to_thread.run_sync(partial(look, *args, **kwargs), limiter=self._readers))
            self._asked[question] = answer
            answer.add_done_callback(lambda done: self._forget(question, done))
        found = await asyncio.shield(answer)  # who leaves takes nothing from the others
        await self._turns.take()  # all who share it are told at one time
        return found

    def _forget(self, question: Hashable, answer: asyncio.Task[Any]) -> None:
        del self._asked[question]
        if not answer.cancelled():
            answer.exception()  # told to whoever is still there

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
        self._num_tidings += 1
        watched = list(self._watchers) if job_id is None else [job_id]
        for found in watched:
            for woken in self._watchers.get(found, ()):
                self._turns.call(woken.set)
