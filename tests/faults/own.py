"""A server of a test's own, which it may kill: local mode's, started again by what holds it, as in production."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from burnish.local.apps import environment_of, migrate_command
from burnish.local.crew import Crew
from burnish.local.place import Place
from burnish.local.servers import servers, settings_of
from shared.settings import Settings
from tests.faults.ground import wait_until


class OwnServer:
    """One server: "postgres" or "valkey". `settings` lead to it, and to no other that runs."""

    def __init__(self, name: str, crew: Crew, settings: Settings) -> None:
        self._name, self._crew, self.settings = name, crew, settings

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, and wait until it has been started again."""
        state = self._crew.states()[self._name]
        assert state.pid is not None
        [server] = psutil.Process(state.pid).children()
        server.send_signal(number)
        wait_until(lambda: self._crew.states()[self._name].restarts > state.restarts, f"{self._name} to be restarted")
        wait_until(lambda: self._crew.states()[self._name].phase == "ready", f"{self._name} to be ready")


@contextmanager
def own_server(name: str, directory: Path) -> Iterator[OwnServer]:
    """The server alone, that keeps what it acknowledged; a Postgres has the service's tables."""
    place = Place(directory)
    place.make()
    services = [service for service in servers(place) if service.name in (name, "initdb" if name == "postgres" else "")]
    with Crew(place, services) as crew:
        crew.start()
        crew.wait_ready()
        settings = settings_of(place)
        if name == "postgres":
            given = {**os.environ, **environment_of(settings)}
            subprocess.run(migrate_command(), env=given, cwd=directory, check=True)
        yield OwnServer(name, crew, settings)
