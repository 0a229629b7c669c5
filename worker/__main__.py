"""One worker: `python -m worker`.

Celery's own command would do the same, but loads all of its other commands first.
"""

import os
import platform
import sys

from worker.app import app


def main() -> int:
    """Run until told to stop; returns the exit code."""
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


if __name__ == "__main__":
    sys.exit(main())
