"""The sweeper: requeues what lost its worker, rings for what waits, says why, and forgets what nobody keeps.

Any number may run side by side. Run as `python -m worker.sweeper`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import asdict

from shared import checkpoints, lifecycle, retention, timings, uploads, workers
from shared.db import Sessions, make_sessions
from shared.doorbell import Doorbell
from shared.errors import DatabaseUnavailable, NotFound, StorageUnavailable
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
    sessions, doorbell, storage = make_sessions(settings, pool_size=3), Doorbell(settings), Storage(settings)
    # What asks storage has threads of its own: leases lapse also while storage is away, or is looked all through.
    for seconds, work in (
        (settings.sweep_seconds, lambda: forget(sessions, storage)),
        (settings.gc_seconds, lambda: _collect(sessions, storage, settings)),
    ):
        threading.Thread(target=_repeat, args=(seconds, work, stopping), daemon=True).start()
    _repeat(settings.sweep_seconds, lambda: sweep(sessions, doorbell, settings.retry_delay_seconds), stopping)
    doorbell.close()


def _repeat(seconds: float, work: Callable[[], object], stopping: threading.Event) -> None:
    """Do it every so often; what is away now may be there the next time. Any other error ends the sweeper."""
    try:
        while not stopping.wait(seconds):
            try:
                work()
            except (DatabaseUnavailable, StorageUnavailable, NotFound) as error:
                get_logger().warning("sweep_failed", error=error.detail)
    finally:
        stopping.set()


def sweep(sessions: Sessions, doorbell: Doorbell, retry_delay_seconds: float) -> int:
    """One round; returns how many lapsed jobs were requeued."""
    lapsed = lifecycle.sweep_leases(sessions, delay_seconds=retry_delay_seconds)
    if lapsed:
        get_logger().info("leases_lapsed", jobs=lapsed)
    workers.explain_waiting(sessions)
    workers.forget_dead(sessions)
    for queue in workers.queues_with_work(sessions):
        doorbell.ring(queue)
    return lapsed


def forget(sessions: Sessions, storage: Storage) -> None:
    """Remove the files of which the ledger knows that nobody will ask for them any more."""
    uploads.forget_expired(sessions, storage)
    checkpoints.forget_stale(sessions, storage)
    timings.forget_lapsed(sessions, storage)


def _collect(sessions: Sessions, storage: Storage, settings: Settings) -> None:
    collected = retention.collect(sessions, storage, settings)
    get_logger().info("collected", **asdict(collected))


if __name__ == "__main__":
    main()
