"""The sweeper: requeues what lost its worker, rings for what waits, says why, and forgets what nobody keeps.

Any number may run side by side. Run as `python -m worker.sweeper`.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import asdict

from shared import checkpoints, lifecycle, retention, timings, uploads, workers
from shared.db import Sessions, make_sessions
from shared.doorbell import Doorbell
from shared.errors import DatabaseUnavailable, StorageUnavailable
from shared.log import configure, get_logger
from shared.settings import Settings, get_settings
from shared.storage import Storage


def main() -> None:
    """Sweep every few seconds until told to stop."""
    settings = get_settings()
    configure(settings.log_level)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    sessions, doorbell, storage = make_sessions(settings, pool_size=1), Doorbell(settings), Storage(settings)
    threading.Thread(target=_collect, args=(sessions, storage, settings, stopping), name="gc", daemon=True).start()
    while not stopping.wait(settings.sweep_seconds):
        try:
            sweep(sessions, doorbell, storage)
        except (DatabaseUnavailable, StorageUnavailable) as error:
            get_logger().warning("sweep_failed", error=error.detail)
    doorbell.close()


def sweep(sessions: Sessions, doorbell: Doorbell, storage: Storage) -> int:
    """One round; returns how many lapsed jobs were requeued."""
    lapsed = lifecycle.sweep_leases(sessions)
    if lapsed:
        get_logger().info("leases_lapsed", jobs=lapsed)
    workers.explain_waiting(sessions)
    workers.forget_dead(sessions)
    for queue in workers.queues_with_work(sessions):
        doorbell.ring(queue)
    uploads.forget_expired(sessions, storage)
    checkpoints.forget_stale(sessions, storage)
    timings.forget_lapsed(sessions, storage)
    return lapsed


def _collect(sessions: Sessions, storage: Storage, settings: Settings, stopping: threading.Event) -> None:
    """Beside the rounds: to look through all of storage takes longer than a lease lasts."""
    try:
        while not stopping.wait(settings.gc_seconds):
            try:
                collected = retention.collect(sessions, storage, settings)
                get_logger().info("collected", **asdict(collected))
            except (DatabaseUnavailable, StorageUnavailable) as error:
                get_logger().warning("gc_failed", error=error.detail)
    finally:
        stopping.set()


if __name__ == "__main__":
    main()
