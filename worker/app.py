"""The Celery app of a worker. Celery carries rings and nothing else: a ring says 'look', the ledger says at what."""

from __future__ import annotations

from typing import Any

from celery.signals import worker_init, worker_shutdown, worker_shutting_down

from shared.doorbell import RING_TASK, make_celery
from shared.log import configure
from shared.settings import get_settings
from worker.foreman import Foreman

settings = get_settings()
configure(settings.log_level)
app = make_celery(settings)
foreman = Foreman(settings)


@app.task(name=RING_TASK, ignore_result=True)
def drain(queue: str) -> int:
    """Somebody rang: run what there is to run. Which queue was rung does not matter, the ledger decides."""
    return foreman.drain()


@worker_init.connect
def _open(**_: Any) -> None:
    foreman.open()  # before the broker is reached: a worker that is never rung looks for itself


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    foreman.stop()


@worker_shutdown.connect
def _close(**_: Any) -> None:
    foreman.close()
