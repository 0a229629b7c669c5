"""One lock for a whole machine: whoever times a model holds it, so that two workers never time at once.

It is a file lock (flock): the kernel frees it when its holder ends, however it ends. Every worker has its own work
directory and every job its own TMPDIR, so the file has a fixed path, which BURNISH_TIMING_LOCK changes: containers need
a volume that they share. A lock that cannot be had does not stop a job: it is timed all the same, and the log says so.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "BURNISH_TIMING_LOCK"
DEFAULT_PATH = "/tmp/burnish-timing.lock"  # that of shared.settings, for measurements outside a worker
MAX_WAIT_SECONDS = 600.0
POLL_SECONDS = 0.05
MESSAGE_SECONDS = 1.0

OnWait = Callable[[str], None]


@contextmanager
def held(on_wait: OnWait | None = None, *, max_wait_seconds: float = MAX_WAIT_SECONDS) -> Iterator[bool]:
    """Hold the machine's lock; yields whether it is held, and after `max_wait_seconds` goes on without it.

    `on_wait` is called about once a second while another process holds it, so that a job that waits shows progress.
    It may raise to stop waiting.
    """
    path = Path(os.environ.get(VARIABLE, DEFAULT_PATH))
    try:
        file_descriptor = _open(path)
    except OSError as error:
        logging.warning("timing without the machine's lock: %s", error)
        yield False
        return
    try:
        is_held = _acquire(file_descriptor, on_wait, max_wait_seconds)
        if not is_held:
            logging.warning("timing without the machine's lock: %s was held for %g s", path, max_wait_seconds)
        yield is_held
    finally:
        os.close(file_descriptor)


def _open(path: Path) -> int:
    """Open the file to read, which is enough to lock it; make it where there is none.

    It is made only if it is missing: Linux refuses O_CREAT on another user's file in a folder like /tmp.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        file_descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        os.fchmod(file_descriptor, 0o644)  # whatever the umask: workers may run as different users
        return file_descriptor


def _acquire(file_descriptor: int, on_wait: OnWait | None, max_wait_seconds: float) -> bool:
    give_up_at = time.monotonic() + max_wait_seconds
    next_message_at = 0.0
    while True:
        try:
            fcntl.flock(file_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            now = time.monotonic()
        if now >= give_up_at:
            return False
        if on_wait is not None and now >= next_message_at:
            on_wait("waiting for another measurement on this machine")
            next_message_at = now + MESSAGE_SECONDS
        time.sleep(POLL_SECONDS)
