"""A lease's heartbeat: renews it, carries progress, hears the reasons to stop, and stops the child in time.

It beats in a thread of its own and by connections that the worker keeps for it, so that a slow upload never costs the
lease and a beat is one round trip to a database however far it is; progress is told in another thread. If no beat
succeeds for most of the lease's length by this machine's monotonic clock, it stops the child before another worker can
be given the job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from sqlalchemy.exc import DataError, IntegrityError

from shared import lifecycle, watchers
from shared.db import Sessions
from shared.errors import DatabaseUnavailable, LeaseLost
from shared.ledger import Claim, Progress
from shared.log import get_logger
from shared.settings import Settings

StopCause = Literal["cancelled", "overdue", "lease_lost", "stalled", "drained"]
FENCE_RATIO = 0.7
LOG_BYTES = 16 * 2**10


class Heart:
    """Beats from `start` to `stop`; `cause` says why the child was stopped first, if it was.

    `is_lost`: the lease is another's by now, or may be.
    """

    def __init__(
        self,
        sessions: Sessions,
        pulse: Sessions,
        claim: Claim,
        settings: Settings,
        log: Path,
        stop_child: Callable[[], None],
    ) -> None:
        self._sessions, self._pulse = sessions, pulse
        self._lease, self._settings, self._log = claim.lease, settings, log
        self._stop_child = stop_child
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=run.__name__, daemon=True) for run in (self._run, self._tell, self._guard)
        ]
        self._progress: Progress | None = None
        self._log_offset = 0
        self._heard_at = time.monotonic()
        self._beaten_at = claim.held_since
        self._last_sequence = 0
        self._resting = False
        self.cause: StopCause | None = None
        self.is_lost = False

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join()

    def carry(self, progress: Progress) -> None:
        """Have this told soon; the child has shown that it is alive."""
        self._progress = progress
        self.heard()

    def forget(self) -> None:
        """Have no progress told: the stage that it was of has ended."""
        self._progress = None

    def rest(self) -> None:
        """The job's end is about to be written: a beat that finds the lease gone is no news."""
        self._resting = True

    def heard(self) -> None:
        """The child said something."""
        self._heard_at = time.monotonic()

    def end_child(self, cause: StopCause) -> None:
        """Stop the child; the first cause stands."""
        self.is_lost |= cause == "lease_lost"
        if self.cause is None:
            self.cause = cause
            get_logger().info("child_stopped", job_id=str(self._lease.job_id), cause=cause)
        self._stop_child()

    def unsent_log(self) -> str:
        """The part of the child's log that was not told yet, the newest LOG_BYTES of it."""
        try:
            with self._log.open("rb") as file:
                size_bytes = file.seek(0, 2)
                file.seek(max(self._log_offset, size_bytes - LOG_BYTES))
                text = file.read()
        except OSError:  # there is none yet, or no more file may be opened now
            return ""
        self._log_offset = size_bytes
        return text.decode(errors="replace").replace("\x00", "")

    def _run(self) -> None:
        pause_seconds = 0.0  # the first at once: if it must open a connection, there is time
        while not self._ended.wait(pause_seconds):
            started_at, pause_seconds = time.monotonic(), self._settings.heartbeat_seconds
            try:
                self._beat()
                self._beaten_at = started_at
            except LeaseLost:
                if not self._resting:
                    self.end_child("lease_lost")
                return
            except DatabaseUnavailable as error:
                told = {"job_id": str(self._lease.job_id), "cause": repr(error.__cause__)}
                get_logger().warning("heartbeat_failed", **told)

    def _guard(self) -> None:
        # A thread of its own: a beat can hang in the database for longer than the lease lasts.
        while not self._ended.wait(self._settings.heartbeat_seconds / 2):
            now = time.monotonic()
            if now - self._beaten_at > FENCE_RATIO * self._settings.lease_seconds:
                self.end_child("lease_lost")
                return
            if now - self._heard_at > self._settings.stall_seconds:
                self.end_child("stalled")

    def _beat(self) -> None:
        heard = lifecycle.heartbeat(self._pulse, self._lease, self._settings.lease_seconds)
        if heard.last_sequence < self._last_sequence:
            # The ledger was set back to an older state: it lacks what this attempt builds on.
            raise LeaseLost
        self._last_sequence = heard.last_sequence
        if heard.cancel_requested:
            self.end_child("cancelled")
        elif heard.overdue:
            self.end_child("overdue")

    def _tell(self) -> None:
        with suppress(DatabaseUnavailable):
            watchers.tell(self._sessions, self._lease.job_id)
        while not self._ended.wait(self._settings.heartbeat_seconds):
            progress, self._progress = self._progress, None
            # Whether the lease is lost, or the database away, the next beat finds out.
            try:
                lifecycle.tell(self._sessions, self._lease, progress, self.unsent_log())
            except (LeaseLost, DatabaseUnavailable):
                continue
            except (DataError, IntegrityError) as error:
                get_logger().error("progress_refused", job_id=str(self._lease.job_id), exc_info=error)
