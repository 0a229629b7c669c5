"""The Celery app of a worker. Celery carries rings and nothing else: a ring says 'look', the ledger says at what."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from celery.signals import task_postrun, worker_init, worker_shutdown
from celery.worker import state
from kombu.asynchronous import Hub, get_event_loop

from shared.doorbell import RING_TASK, make_celery
from shared.log import configure, get_logger
from shared.settings import get_settings
from worker.foreman import Foreman

LOOK_SECONDS = 0.01

settings = get_settings()
configure(settings.log_level)
app = make_celery(settings)
app.conf.broker_transport = "worker.hearing:Transport"
foreman = Foreman(settings)


@app.task(name=RING_TASK, ignore_result=True)
def drain(queue: str) -> int:
    """Somebody rang: run what there is to run. Which queue was rung does not matter, the ledger decides."""
    return foreman.drain()


@task_postrun.connect
def _listen_again(task_id: str, **_: Any) -> None:
    # Celery's loop sleeps for up to a second before it looks whether it may take the next ring. Wake it.
    loop = get_event_loop()
    if loop is not None:
        loop.call_soon(_wake_until_done, loop, task_id)


def _wake_until_done(loop: Hub, task_id: str) -> None:
    """Runs in Celery's loop, and has it look again once the task is off its books."""
    if task_id in state.requests:
        loop.call_later(LOOK_SECONDS, _wake_until_done, loop, task_id)


def _end_worker(failure: threading.ExceptHookArgs) -> None:
    """A thread of this worker died of a fault of ours: end the whole worker, so that it is started anew."""
    get_logger().error("thread_died", exc_info=failure.exc_value, thread=str(failure.thread))
    os.kill(os.getpid(), signal.SIGTERM)


threading.excepthook = _end_worker


@worker_init.connect
def _open(**_: Any) -> None:
    foreman.open()  # before the broker is reached: a worker that is never rung looks for itself


@worker_shutdown.connect
def _close(**_: Any) -> None:
    foreman.close()
