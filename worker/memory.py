"""A stage's memory as the child has it: the supervisor keeps what is saved, and the ticket brings it to the next."""

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
