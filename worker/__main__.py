"""One worker: `python -m worker`.

Celery's own command would do the same, but loads all of its other commands first.
"""

import ctypes
import os
import platform
import resource
import signal
import sys
import threading
from typing import Any

from celery.worker import state

from shared.log import get_logger
from worker.app import app, foreman

# Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE_BYTES = 64 * 2**10
MIN_OPEN_FILES, OPEN_FILES = 256, 4096  # for connections, files, and what a job's process inherits
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class Worker(app.Worker):  # type: ignore[misc,name-defined]
    def install_platform_tweaks(self, worker: Any) -> None:
        """None of Celery's: its SIGQUIT waits for a job's end, and its SIGHUP starts a second worker in this one."""


def main() -> int:
    """Run until told to stop; returns the exit code."""
    allowed = _open_files()
    if allowed < MIN_OPEN_FILES:
        told = f"A worker needs {MIN_OPEN_FILES} open files, and this one may have {allowed}: raise 'ulimit -n'."
        get_logger().error("too_few_open_files", message=told)
        return os.EX_CONFIG
    _give_memory_back()
    _obey_signals()
    worker = Worker(
        app=app,
        hostname=f"{platform.node()}-{os.getpid()}",
        pool="threads",
        concurrency=1,
        without_mingle=True,
        without_gossip=True,
        without_heartbeat=True,
        loglevel="WARNING",
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _open_files() -> int:
    """Take as many open files as the system allows, within reason; returns how many that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def _obey_signals() -> None:
    """Have SIGTERM and SIGINT stop this worker after the running stage; SIGQUIT, or another one, at once.

    They are obeyed in a thread: a handler would interrupt whoever holds the lock that it needs.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

    def obey() -> None:
        times = 0
        while numbers := os.read(told, 1):
            times += 1
            get_logger().info("told_to_stop", signal=signal.Signals(numbers[0]).name, times=times)
            state.should_stop = os.EX_OK  # type: ignore[assignment]
            foreman.stop(at_once=times > 1 or signal.SIGQUIT in numbers)

    threading.Thread(target=obey, name="signals", daemon=True).start()


def _give_memory_back() -> None:
    """Have malloc share one arena among all threads and return large blocks: else every job leaves some behind."""
    libc = ctypes.CDLL(None)
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LARGE_BYTES), (M_TRIM_THRESHOLD, LARGE_BYTES)):
        libc.mallopt(option, value)


if __name__ == "__main__":
    sys.exit(main())
