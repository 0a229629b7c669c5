"""The process that keeps a local service running, from its first child's start to its last one's end."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Callable, Iterator

import psutil

from burnish.local.apps import apps
from burnish.local.crew import Crew
from burnish.local.place import LocalFailed, Phase, Place, State, is_free
from burnish.local.servers import remove_sockets, servers, settings_of
from shared.db import make_sessions

LOCK_SECONDS = 60.0


def keep_running(place: Place, port: int, workers: int, when_ready: Callable[[], None]) -> None:
    """Run the servers and Burnish's own processes until SIGINT, SIGTERM or SIGHUP comes.

    Raises:
        LocalFailed: something could not be started; nothing is left running.
    """
    with place.lock(LOCK_SECONDS) as lock, _mailbox() as mailbox:
        if not is_free(port):
            raise LocalFailed(f"Port {port} is taken by another program; choose another one with --port.")
        own, url = psutil.Process(), f"http://127.0.0.1:{port}"

        def write(phase: Phase, message: str = "") -> None:
            place.write_state(State(phase, own.pid, own.create_time(), url, message, crew.states()))

        services = servers(place)
        settings = settings_of(place)
        services += apps(place, settings, make_sessions(settings, pool_size=2), port, workers)
        with Crew(place, services, lock, changed=lambda: mailbox.put(None)) as crew:
            try:
                write("starting")
                crew.start()
                signum = _tend(crew, mailbox, write, when_ready)
                write("stopping", f"got {signal.Signals(signum).name}")
                crew.stop()
                write("stopped")
            except LocalFailed as error:
                write("failed", str(error))
                raise
            finally:
                crew.stop()
                remove_sockets(place.ports())


def _tend(
    crew: Crew,
    mailbox: queue.SimpleQueue[int | None],
    write: Callable[[Phase], None],
    when_ready: Callable[[], None],
) -> int:
    """Write down each change of the crew, and say once that it is ready; returns the signal that ended it.

    Raises:
        LocalFailed: a service could not be started.
    """
    was_ready = False
    while (signum := mailbox.get()) is None:
        failed = crew.failed()
        if failed is not None and not was_ready:
            raise LocalFailed(crew.explain(failed))
        if not crew.is_ready():
            write("recovering" if was_ready else "starting")
            continue
        write("ready")
        if not was_ready:
            when_ready()
            was_ready = True
    return signum


@contextlib.contextmanager
def _mailbox() -> Iterator[queue.SimpleQueue[int | None]]:
    """A queue into which SIGINT, SIGTERM and SIGHUP put their number, as long as the context is open."""
    mailbox: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda signum, _: mailbox.put(signum)) for number in numbers}
    try:
        yield mailbox
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

