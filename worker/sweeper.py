"""The sweeper: requeues what lost its worker, rings for what waits, and says why something has to wait.

Any number may run side by side. Run as `python -m worker.sweeper`.
"""

from __future__ import annotations

import signal
import threading

from shared import lifecycle, workers
from shared.db import Sessions, make_sessions
from shared.doorbell import Doorbell
from shared.errors import DatabaseUnavailable
from shared.log import configure, get_logger
from shared.settings import get_settings


def main() -> None:
    """Sweep every few seconds until told to stop."""
    settings = get_settings()
    configure(settings.log_level)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    sessions, doorbell = make_sessions(settings, pool_size=1), Doorbell(settings)
    while not stopping.wait(settings.sweep_seconds):
        try:
            sweep(sessions, doorbell)
        except DatabaseUnavailable as error:
            get_logger().warning("sweep_failed", error=error.detail)
    doorbell.close()


def sweep(sessions: Sessions, doorbell: Doorbell) -> int:
    """One round; returns how many lapsed jobs were requeued."""
    lapsed = lifecycle.sweep_leases(sessions)
    if lapsed:
        get_logger().info("leases_lapsed", jobs=lapsed)
    workers.explain_waiting(sessions)
    workers.forget_dead(sessions)
    for queue in workers.queues_with_work(sessions):
        doorbell.ring(queue)
    return lapsed


if __name__ == "__main__":
    main()
