"""A stage's memory that keeps nothing: a benchmark that is cut off begins the training again."""

from __future__ import annotations

from pathlib import Path


class NoMemory:
    """`worker.context.Checkpoints` without any."""

    def load(self, name: str) -> Path | None:
        return None

    def save(self, name: str, path: Path) -> None:
        path.unlink()
