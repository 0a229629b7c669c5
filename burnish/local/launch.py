"""Up, status and down: the whole service as child processes of one process, under one directory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from burnish.local.crew import PYTHON
from burnish.local.place import LocalFailed, Place, State, find_place, free_ports
from burnish.local.waiting import wait_until

STOP_SECONDS = 60.0
START_SECONDS = 120.0


@dataclass(frozen=True)
class Running:
    """A service that is there: its URL, and where its API key lies."""

    url: str
    api_key_path: Path


def up(
    directory: Path | None = None,
    port: int = 8000,
    workers: int = 1,
    detach: bool = False,
    announce: Callable[[Running, bool], None] = lambda running, is_new: None,
) -> None:
    """Start everything, `announce` it once it is usable, and keep it running until SIGINT or SIGTERM.

    `announce` gets the service and whether this call started it.

    With `detach`, or if the service runs there already, it returns once it is usable.

    Raises:
        LocalFailed: it could not be started; nothing is left running.
    """
    place = find_place(directory)
    place.make()
    wait_until(lambda: not place.is_locked() or place.read_state() is not None, STOP_SECONDS)
    running = _find_running(place)
    if running is not None:
        announce(running, False)
        return
    port = port or free_ports(1)[0]
    if detach:
        announce(_start_detached(place, port, workers), True)
    else:
        from burnish.local.keeper import keep_running  # noqa: PLC0415  loads much that nothing else here needs

        keep_running(place, port, workers, lambda: announce(Running(f"http://127.0.0.1:{port}", place.api_key), True))


def status(directory: Path | None = None) -> State:
    """What runs in the directory, service by service; `stopped` or `failed` if nothing does."""
    place = find_place(directory)
    state = place.read_state()
    if state is None and place.is_locked():
        return State(phase="stopping", message="The process that kept it running is gone; what it left is ending.")
    last = place.read_last_state()
    return state or (last if last is not None and last.phase == "failed" else State(phase="stopped"))


def down(directory: Path | None = None) -> bool:
    """Stop everything; False if nothing was running. It returns when every process is gone.

    Raises:
        LocalFailed: something still runs after a minute.
    """
    place = find_place(directory)
    state = place.read_state()
    if state is None and not place.is_locked():
        return False
    if state is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)
    if not wait_until(lambda: not place.is_locked() and place.read_state() is None, STOP_SECONDS):
        raise LocalFailed(f"The service in {place.directory} does not stop; see {place.logs}.")
    return True


def _find_running(place: Place) -> Running | None:
    """The service that runs in the place already, waiting for it if it is just being started."""
    wait_until(lambda: (state := place.read_state()) is None or state.phase != "starting", START_SECONDS)
    state = place.read_state()
    return Running(state.url, place.api_key) if state is not None and state.is_up else None


def _start_detached(place: Place, port: int, workers: int) -> Running:
    """Start a process of its own session that keeps the service running, and wait until it is usable."""
    options = ["--dir", str(place.directory), "--port", str(port), "--workers", str(workers)]
    log = place.logs / "keeper.log"
    with log.open("wb") as output:
        keeper = subprocess.Popen(
            [*PYTHON, "burnish.local", "up", *options],
            cwd=place.directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    try:
        wait_until(lambda: keeper.poll() is not None or _find_running(place) is not None, START_SECONDS)
        running = _find_running(place)
        if running is None:
            raise LocalFailed(log.read_text(errors="replace").strip().removeprefix("Error: "))
    except BaseException:
        keeper.terminate()
        keeper.wait()
        raise
    if keeper.poll() is None:
        keeper.returncode = 0  # it outlives this process on purpose: no warning that nobody waited for it
    return running
