"""The foreman: says what this worker can do, and claims one job after the other while there are any."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from contextlib import suppress
from uuid import UUID

from shared import lifecycle, workers
from shared.db import make_sessions, ping
from shared.doorbell import Doorbell
from shared.errors import DatabaseUnavailable, NotFound, StorageUnavailable
from shared.faultpoints import reach
from shared.ledger import Capacity, Claim
from shared.log import get_logger
from shared.settings import Settings
from shared.storage import PATIENT, Storage
from worker import environment, premises
from worker.supervisor import Tools, supervise

PRESENCE_SECONDS = 5.0
SPARE_MEMORY_BYTES = 2**30  # left to the worker itself and the system


class Foreman:
    """One worker. It runs one job at a time, whoever told it to look: a ring, or its own clock."""

    def __init__(self, settings: Settings) -> None:
        memory_bytes = (settings.worker_memory_bytes or environment.memory_bytes()) - SPARE_MEMORY_BYTES
        sessions, pulse = make_sessions(settings, pool_size=4), make_sessions(settings, pool_size=1)
        threads = settings.worker_threads or environment.cores()
        storage = Storage(settings, tries=PATIENT)  # or a restart of it would cost every attempt that it meets
        self._tools = Tools(settings, sessions, pulse, storage, threads, memory_bytes)
        self._doorbell = Doorbell(settings)
        self._registration = workers.Registration(
            id=f"{platform.node()}:{os.getpid()}",
            hostname=platform.node(),
            queues=settings.worker_queues,
            capabilities=environment.capabilities(),
            cores=threads,
            memory_bytes=memory_bytes,
            details=environment.environment().model_dump(mode="json"),
        )
        self._capacity = Capacity(
            self._registration.id, settings.worker_queues, self._registration.capabilities, memory_bytes
        )
        self._busy, self._presence = threading.Lock(), threading.Lock()
        self._draining = threading.Event()
        self._job_id: UUID | None = None

    def open(self) -> None:
        """Register, clear what a dead worker left here, and begin to look for work without being rung."""
        premises.clear(self._tools.settings.work_directory)
        for run in (self._be_present, self._look):
            threading.Thread(target=run, name=run.__name__, daemon=True).start()

    def stop(self, *, at_once: bool = False) -> None:
        """Claim nothing more, and have the running attempt end at its next checkpoint, or `at_once`."""
        if at_once:
            self._tools.hurried.set()
        self._draining.set()

    def close(self) -> None:
        """Strike this worker off, once it runs nothing."""
        self._draining.set()
        with self._busy:
            self._doorbell.close()
            with self._presence:
                try:
                    workers.retire(self._tools.sessions, self._registration.id)
                except DatabaseUnavailable:
                    get_logger().warning("retire_failed", worker=self._registration.id)

    def drain(self) -> int:
        """Claim and run jobs until there is none for this worker; returns how many it ran."""
        with self._busy:
            done = 0
            while not self._draining.is_set():
                with suppress(OSError):  # then later; an attempt that may open no files leaves its directory
                    premises.clear(self._tools.settings.work_directory)
                try:
                    self._tools.storage.ping()  # without it, or without heartbeats, an attempt would only be spent
                    ping(self._tools.pulse)
                    claim = lifecycle.claim(self._tools.sessions, self._capacity, self._tools.settings.lease_seconds)
                    if claim is None:
                        break
                    reach("claim.committed")
                    self._run(claim)
                except (DatabaseUnavailable, StorageUnavailable, NotFound) as error:
                    get_logger().warning("claim_failed", error=error.detail)
                    break
                done += 1
            return done

    def _run(self, claim: Claim) -> None:
        get_logger().info("claimed", job_id=str(claim.lease.job_id), attempt=claim.attempt)
        self._doorbell.ring(claim.queue)  # there may be more: wake the next worker
        self._job_id = claim.lease.job_id
        try:
            supervise(claim, self._tools, self._draining)
        finally:
            self._job_id = None
            ctypes.CDLL(None).malloc_trim(0)  # transfers leave the heap in pieces that glibc would keep

    def _look(self) -> None:
        while not self._draining.wait(self._tools.settings.poll_seconds):
            self.drain()

    def _be_present(self) -> None:
        registered, pause_seconds = False, 0.0
        while not self._draining.wait(pause_seconds):
            try:
                registered = self._say_present(registered)
            except DatabaseUnavailable as error:
                get_logger().warning("presence_failed", error=error.detail)
            pause_seconds = PRESENCE_SECONDS if registered else 1.0

    def _say_present(self, registered: bool) -> bool:
        """Register, once, and again where the row is gone: the tables were restored, or it was silent for a day."""
        with self._presence:
            if self._draining.is_set():  # it may have been struck off
                return registered
            if not (registered and workers.beat(self._tools.sessions, self._registration.id, self._job_id)):
                workers.register(self._tools.sessions, self._registration)
            return True
