"""The doorbell: tells workers that a queue has work. A lost ring costs time, never a job."""

from __future__ import annotations

import threading

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.log import get_logger
from shared.settings import Settings

RING_TASK = "burnish.drain"
REST_SECONDS = 0.02


class Doorbell:
    """Rings queues from a thread of its own, so that nobody who rings ever waits for the broker.

    Rings for a queue that is still to be rung are one ring: whoever answers it rings again for the next worker. So
    that a burst of submits is a few rings, the thread rests for REST_SECONDS after each round.
    A ring that the broker does not take is dropped; the sweeper rings for what waits.
    """

    def __init__(self, settings: Settings) -> None:
        self._app = make_celery(settings)
        self._app.conf.broker_transport_options["max_retries"] = 0  # it would try to connect for six seconds
        self._broker = redis.Redis.from_url(
            settings.broker_url, socket_connect_timeout=2, socket_timeout=2, retry=Retry(NoBackoff(), 1)
        )
        self._due: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def ring(self, queue: str) -> None:
        """Have `queue` rung soon; returns at once and never fails."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)
                self._thread.start()
            self._due.add(queue)
            self._changed.notify()

    def ring_now(self, queue: str) -> bool:
        """Ring `queue`, unless a ring lies there that nobody has heard yet; False if the broker did not answer."""
        try:
            if not self._broker.llen(queue):  # Kombu keeps a queue as a list of its name
                self._app.send_task(RING_TASK, args=[queue], queue=queue, retry=False, ignore_result=True)
        except (OperationalError, redis.RedisError, OSError) as error:
            get_logger().warning("ring_lost", queue=queue, error=str(error))
            return False
        return True

    def ping(self) -> bool:
        """Whether the broker takes a ring now: one that is away, read-only, full or locked does not."""
        try:
            self._broker.set("burnish.ping", 1, px=1)
        except (redis.RedisError, OSError) as error:
            get_logger().warning("broker_away", error=str(error))
            return False
        return True

    def close(self) -> None:
        """Ring what is due, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self._broker.close()
        self._app.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closed)
                due, self._due = self._due, set()
                if not due:
                    return
            for queue in sorted(due):
                self.ring_now(queue)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=REST_SECONDS)


def make_celery(settings: Settings) -> Celery:
    """A Celery app that only carries rings: early ack, no results, no prefetch, JSON, no waiting on a dead broker."""
    app = Celery("burnish", broker=settings.broker_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=False,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,  # or a message could stop workers
        accept_content=["json"],
        task_serializer="json",
        task_default_queue=settings.worker_queues[0],
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_timeout": 5,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            # A ring that is taken is done with. Were it to be acknowledged at the broker, one that died before that
            # would leave it counted as held for ever, and its worker asking for no other.
            "ack_emulation": False,
        },
    )
    return app
