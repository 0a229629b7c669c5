"""One worker: `python -m worker`.

Celery's own command would do the same, but loads all of its other commands first.
"""

import ctypes
import os
import platform
import sys

from worker.app import app

# Options of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE_BYTES = 64 * 2**10


def main() -> int:
    """Run until told to stop; returns the exit code."""
    _give_memory_back()
    worker = app.Worker(
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


def _give_memory_back() -> None:
    """Have malloc share one arena among all threads and return large blocks: else every job leaves some behind."""
    libc = ctypes.CDLL(None)
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LARGE_BYTES), (M_TRIM_THRESHOLD, LARGE_BYTES)):
        libc.mallopt(option, value)


if __name__ == "__main__":
    sys.exit(main())
