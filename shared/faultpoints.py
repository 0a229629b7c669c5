"""Named lines at which a test has a process fail: `reach` does nothing unless BURNISH_FAULTS arms its name.

BURNISH_FAULTS says what happens where, `name=deed` or `name=deed@n`, separated by commas: the first, or the n-th, time
that this process reaches the line.

    settle.committed=kill       SIGKILL to this process
    settle.committed=exit       its end without any clean-up
    settle.committed=raise      an error of the kind that nobody expects
    settle.committed=wait:FILE  makes the file and goes on once somebody has removed it
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

VARIABLE = "BURNISH_FAULTS"
LOOK_SECONDS = 0.01
EXIT_CODE = 70


class Injected(RuntimeError):
    """The test that armed this line wanted an error here."""


class Armed:
    """The lines of one process that fail, and how often each was reached."""

    def __init__(self, told: str) -> None:
        self._deeds: dict[str, tuple[str, int]] = {}
        for entry in told.split(","):
            name, _, deed = entry.partition("=")
            deed, _, nth = deed.partition("@")
            self._deeds[name] = deed, int(nth or 1)
        self._reached: Counter[str] = Counter()
        self._lock = threading.Lock()

    def reach(self, name: str) -> None:
        if name not in self._deeds:
            return
        deed, nth = self._deeds[name]
        with self._lock:
            self._reached[name] += 1
            if self._reached[name] != nth:
                return
        kind, _, file = deed.partition(":")
        match kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(EXIT_CODE)
            case "raise":
                raise Injected(name)
            case "wait":
                _wait(Path(file))
            case _:
                raise ValueError(f"{VARIABLE} has no deed {deed!r}")


def _wait(file: Path) -> None:
    file.touch()
    pause = threading.Event()
    while file.exists():
        pause.wait(LOOK_SECONDS)


def _nothing(name: str) -> None:
    """Not armed."""


reach: Callable[[str], None] = Armed(os.environ[VARIABLE]).reach if os.environ.get(VARIABLE) else _nothing
