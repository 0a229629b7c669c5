"""Where attempts work: each has a directory of its own, locked for as long as its worker lives.

What a killed worker left behind is thereby known for what it is, and the next worker that starts here removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

# The job's id, the attempt's number, and something that nobody else has where it is on its way out.
ATTEMPT = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}-[0-9]+(\.[0-9a-f]{32})?")


class Workplace:
    """One attempt's directory, which nobody else may enter."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock: int | None = None

    def occupy(self) -> None:
        """Make it, empty but for its `tmp`; raises OSError where the disk does not take it."""
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        with _held(self._directory.parent):
            shutil.rmtree(self._directory, ignore_errors=True)
            (self._directory / "tmp").mkdir(parents=True)
            self._directory.chmod(0o700)
            self._lock = os.open(self._directory, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def vacate(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def clear(root: Path) -> int:
    """Remove what attempts left whose workers have died, or could not remove it; returns how many there were.

    Raises OSError where no file may be opened now.
    """
    if not root.is_dir():
        return 0
    with ExitStack() as locks:
        with _held(root):  # or one that is just being made would look deserted
            found = [_take_away(path, locks) for path in root.iterdir() if ATTEMPT.fullmatch(path.name)]
        deserted = [path for path in found if path is not None]
        for path in deserted:  # which may take long: nobody waits for it
            shutil.rmtree(path, ignore_errors=True)
    return len(deserted)


def _take_away(directory: Path, locks: ExitStack) -> Path | None:
    """Its new place, locked: unless somebody is in it, or that cannot be told now."""
    try:
        lock = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    locks.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    is_on_its_way_out = bool(directory.suffix)
    return directory if is_on_its_way_out else directory.rename(f"{directory}.{uuid4().hex}")


@contextmanager
def _held(root: Path) -> Iterator[None]:
    lock = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
