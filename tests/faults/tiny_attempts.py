"""One attempt a line: reads fault points to arm, forks, claims the next job, carries it out, tells how it ended.

Forked from a process that has loaded everything, an attempt costs a tenth of a worker's start. Each is a process of
its own all the same, which can be killed at any line, with its connections and its child.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

os.environ.setdefault("BURNISH_FAULTS", "nothing=exit")
sys.path.insert(0, str(Path(__file__).parents[2]))

from shared import faultpoints, lifecycle
from shared.db import make_sessions
from shared.ledger import Capacity
from shared.settings import get_settings
from shared.storage import Storage
from worker import environment, premises, process
from worker.supervisor import Tools, supervise

process.PROGRAM = ("-P", str(Path(__file__).with_name("tiny_child.py")))


def main() -> None:
    for line in sys.stdin:
        number = os.fork()
        if number == 0:
            attempt(line.strip())
            os._exit(0)
        _, status = os.waitpid(number, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def attempt(faults: str) -> None:
    """What a worker does from its claim on."""
    armed: faultpoints.Armed = faultpoints.reach.__self__  # type: ignore[attr-defined]
    armed.__init__(faults or "nothing=exit")  # type: ignore[misc]
    settings = get_settings()
    sessions = make_sessions(settings, pool_size=2)
    premises.clear(settings.work_directory)
    capacity = Capacity(f"worker-{os.getpid()}", ["default"], environment.capabilities(), 2**40)
    claim = lifecycle.claim(sessions, capacity, settings.lease_seconds)
    if claim is not None:
        faultpoints.reach("claim.committed")
        supervise(claim, Tools(settings, sessions, sessions, Storage(settings), 1, 2**30), threading.Event())


if __name__ == "__main__":
    main()
