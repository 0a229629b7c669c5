"""The service under measure: local mode in a directory of its own, as a user starts it, with one worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from burnish import Client
from burnish.local import find_local, launch
from burnish.local.place import Place
from burnish.local.servers import settings_of
from shared.settings import Settings


@dataclass(frozen=True)
class Stand:
    """A running service: where it is, how to speak to it, and what lies behind it."""

    place: Place
    url: str
    key: str
    client: Client

    @property
    def settings(self) -> Settings:
        """Settings that reach its database, broker and storage."""
        return settings_of(self.place)

    def pid(self, service: str) -> int:
        """The process id of one of its processes, such as `api` or `worker-1`: the one that its leash holds."""
        state = self.place.read_state()
        assert state is not None
        (process,) = psutil.Process(state.services[service].pid).children()
        return process.pid


@contextmanager
def running_service(directory: Path) -> Iterator[Stand]:
    """`burnish local up --detach` and `down`."""
    try:
        launch.up(directory, port=0, detach=True)
        found = find_local(directory)
        assert found is not None
        with Client(*found) as client:
            yield Stand(Place(directory), *found, client)
    finally:
        launch.down(directory)
