"""What the child saves for later: the supervisor keeps it, and the ticket brings it to the next attempt or job."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from worker import wire


class Memory:
    """The checkpoints of one stage."""

    def __init__(self, position: int, mouth: wire.Mouth, fetched: Iterable[wire.Checkpoint]) -> None:
        self._position, self._mouth = position, mouth
        self._newest = {found.name: found.path for found in fetched if found.position == position}

    def load(self, name: str) -> Path | None:
        return self._newest.get(name)

    def save(self, name: str, path: Path) -> None:
        self._mouth.ask(wire.Checkpointed(position=self._position, name=name, path=path))
        self._newest[name] = path


class Timings:
    """The kernel timings of the account, which its later jobs find too."""

    def __init__(self, mouth: wire.Mouth, fetched: Iterable[wire.Timing]) -> None:
        self._mouth = mouth
        self._newest = {found.name: found.path for found in fetched}

    def load(self, name: str) -> Path | None:
        return self._newest.get(name)

    def save(self, name: str, path: Path) -> None:
        self._mouth.ask(wire.Timed(name=name, path=path))
        self._newest[name] = path
