"""Keeps a set of services running: starts them side by side, restarts what dies, stops them in order."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from burnish.local.place import LocalFailed, Place, ServiceState
from burnish.local.waiting import POLL_SECONDS, wait_until

PYTHON = (sys.executable, "-P", "-m")  # -P: no module is taken from the directory it starts in
LEASH = Path(__file__).with_name("leash.py")
STEADY_SECONDS = 30.0  # who has run for so long is restarted without delay
FIRST_BACKOFF_SECONDS, MAX_DOUBLINGS = 0.25, 7


@dataclass(frozen=True)
class Service:
    """One program: how it is started, when it is usable, and how it is asked to stop.

    `ready` is asked, again and again, whether the program can be used, and may do what is left to do for that. A
    service that runs `once` has to exit with 0 first. `after` names the services that must be ready before.
    """

    name: str
    command: Sequence[str]
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    after: Sequence[str] = ()
    ready: Callable[[], bool] = lambda: True
    once: bool = False
    stop_signal: signal.Signals = signal.SIGTERM
    grace_seconds: float = 10.0
    start_seconds: float = 60.0
    identity: str = "same"


class Crew:
    """Services under one holder: this process. Whatever ends this process ends them, by their leashes.

    `changed` is called, from any thread, whenever a service's state has changed.
    """

    def __init__(
        self, place: Place, services: Sequence[Service], lock: int = -1, changed: Callable[[], None] = lambda: None
    ) -> None:
        self._hold, self._holder = os.pipe()
        self._members = {service.name: _Member(service, place, self._hold, lock, changed) for service in services}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.kill()
        os.close(self._hold)

    def start(self) -> None:
        """Start every service as soon as those it needs are ready; returns at once."""
        for member in self._members.values():
            member.start([self._members[name] for name in member.service.after if name in self._members])

    def is_ready(self) -> bool:
        return all(state.phase in ("ready", "done") for state in self.states().values())

    def failed(self) -> str | None:
        """The name of a service that could not be started, if there is one."""
        return next((name for name, state in self.states().items() if state.phase == "failed"), None)

    def wait_ready(self) -> None:
        """Wait until every service is ready; raises LocalFailed with the log of the one that is not."""
        ended = wait_until(lambda: self.is_ready() or self.failed() is not None, timeout_seconds=float("inf"))
        failed = self.failed()
        if failed is not None or not ended:
            raise LocalFailed(self.explain(failed or ""))

    def explain(self, name: str) -> str:
        """Why a service could not be started: its exit status and the end of its log."""
        member = self._members[name]
        how = f"ended with status {member.state.last_exit}" if member.state.last_exit is not None else "is not ready"
        log = member.place.log_tail(name)
        return f"{name} {how}. The end of {member.place.logs / (name + '.log')}:\n{log}"

    def states(self) -> dict[str, ServiceState]:
        return {name: member.state for name, member in self._members.items()}

    def stop(self) -> None:
        """Stop every service, each after those that need it; returns when all are gone."""
        for member in self._members.values():
            member.stopping.set()
        left = dict(self._members)
        while left:
            needed = {name for member in left.values() for name in member.service.after}
            ending = [left.pop(name) for name in list(left) if name not in needed]
            for member in ending:
                member.ask_to_stop()
            for member in ending:
                member.join()

    def kill(self) -> None:
        """Let go of every leash: each kills its command and all its descendants at once."""
        if self._holder >= 0:
            os.close(self._holder)
            self._holder = -1


class _Member:
    """One service of a crew, in a thread of its own that starts it, waits for its end and starts it again."""

    def __init__(
        self, service: Service, place: Place, hold: int, lock: int, changed: Callable[[], None]
    ) -> None:
        self.service, self.place = service, place
        self.state = ServiceState("waiting")
        self.stopping, self.is_ready = threading.Event(), threading.Event()
        self._hold, self._lock, self._changed = hold, lock, changed
        self._process: subprocess.Popen[bytes] | None = None
        self._process_guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, needed: Sequence[_Member]) -> None:
        log = self.place.logs / f"{self.service.name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.old"))
        self._thread = threading.Thread(target=self._run, args=(needed,), name=self.service.name, daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        with self._process_guard:
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self, needed: Sequence[_Member]) -> None:
        try:
            self._live(needed)
        finally:
            if self.state.phase not in ("done", "stopped", "failed"):  # an error of ours, told on stderr
                self.ask_to_stop()
                self._become(phase="failed")

    def _live(self, needed: Sequence[_Member]) -> None:
        while not all(other.is_ready.wait(POLL_SECONDS) for other in needed):
            if self.stopping.is_set():
                return self._become(phase="stopped")
        short_lives = 0  # in a row
        for restarts in itertools.count():
            started_at = time.monotonic()
            process = self._spawn()
            if process is None:
                return self._become(phase="stopped", pid=None)
            self._become(phase="starting", pid=process.pid, restarts=restarts)
            if self._wait_ready(process):
                self.is_ready.set()
                if self.service.once:
                    return self._become(phase="done", pid=None)
                self._become(phase="ready")
            elif not self.stopping.is_set():
                process.terminate()
            last_exit = process.wait()
            if not self.is_ready.is_set() and not self.stopping.is_set():
                return self._become(phase="failed", pid=None, last_exit=last_exit)
            if self.stopping.is_set():
                return self._become(phase="stopped", pid=None, last_exit=last_exit)
            self._become(phase="restarting", pid=None, last_exit=last_exit)
            short_lives = 0 if time.monotonic() - started_at > STEADY_SECONDS else short_lives + 1
            self.stopping.wait(FIRST_BACKOFF_SECONDS * 2 ** min(short_lives - 1, MAX_DOUBLINGS) if short_lives else 0)
        return None

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """The service on a leash; None if it is to stop."""
        service = self.service
        leash = [
            *(sys.executable, "-IS", str(LEASH), str(self._hold), str(self._lock)),
            *(str(int(service.stop_signal)), str(service.grace_seconds), service.identity),
        ]
        with self._process_guard, open(self.place.logs / f"{service.name}.log", "ab") as log:
            if self.stopping.is_set():
                return None
            self._process = subprocess.Popen(
                [*leash, *service.command],
                cwd=service.directory,
                env={**os.environ, **service.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[descriptor for descriptor in (self._hold, self._lock) if descriptor >= 0],
                start_new_session=True,
            )
            return self._process

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether the service became ready; False if it ended before, took too long, or is to stop."""
        usable = threading.Event()

        def is_settled() -> bool:
            ended = process.poll() is not None
            if self.stopping.is_set() or (ended and not (self.service.once and process.returncode == 0)):
                return True
            if (ended or not self.service.once) and self.service.ready():
                usable.set()
            return usable.is_set()

        wait_until(is_settled, self.service.start_seconds)
        return usable.is_set()

    def _become(self, **changes: object) -> None:
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]
        self._changed()
