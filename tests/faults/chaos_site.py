"""The whole service on servers of its own, as `burnish local` runs it, and the hand that kills its parts."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from burnish.local.apps import apps
from burnish.local.crew import Crew, Service
from burnish.local.place import Place, ServiceState, free_ports
from burnish.local.servers import remove_sockets, servers, settings_of
from shared.db import Sessions, make_sessions
from shared.storage import Storage
from tests.audit import audit, leftovers
from tests.faults.chaos_plan import Kill
from tests.faults.ground import HERE, TINY_WORKER, children, wait_until
from worker import premises

NUM_WORKERS = 4
SETTINGS: dict[str, Any] = {
    "heartbeat_seconds": 0.5,
    "lease_seconds": 10.0,
    "sweep_seconds": 1.0,
    "poll_seconds": 1.0,
    "retry_delay_seconds": 0.5,
    "drain_seconds": 5.0,
}
SERVICES = {"api": "api", "sweeper": "sweeper", "valkey": "valkey", "postgres": "postgres", "s3": "seaweedfs"}
PATIENCE_SECONDS = 60.0  # for whoever is to be killed to be there


class Site:
    """Servers and apps, each started again by its crew when it dies; `sessions` and `storage` look at what is so."""

    def __init__(self, place: Place, url: str, sessions: Sessions, server_crew: Crew, app_crew: Crew) -> None:
        self.place, self.url = place, url
        self.sessions, self.storage = sessions, Storage(settings_of(place))
        self._server_crew, self._app_crew = server_crew, app_crew
        self._deaths: Counter[str] = Counter()  # that were dealt here, by service
        self._struck: set[str] = set()  # attempts' jobs whose process was killed alone

    # ------------------------------------------------------------ killing

    def kill(self, kill: Kill) -> str:
        """Kill what is meant as soon as it runs; returns who that was."""
        match kill.what:
            case "child":
                return self._kill_child(kill.draw)
            case "supervisor" | "tree":
                name = self._worker(kill.draw)
                self._kill_worker(name, whole=kill.what == "tree")
                return name
            case what:
                name = SERVICES[what]
                _, server = self._leash_and_process(name)
                server.send_signal(signal.SIGQUIT if what == "postgres" else signal.SIGKILL)
                self._deaths[name] += 1
                return name

    def _kill_child(self, draw: float) -> str:
        """A job's process, of a job that did not lose one before: twice would rightly be taken for the job's fault."""
        found = wait_until(self._fresh_children, "a job's process to kill", PATIENCE_SECONDS)
        job_id, process = found[int(draw * len(found))]
        process.kill()
        self._struck.add(job_id)
        return f"job {job_id}"

    def _fresh_children(self) -> list[tuple[str, psutil.Process]]:
        found = [(Path(process.info["cwd"]).name[:36], process) for process in self._job_processes()]
        return sorted((entry for entry in found if entry[0] not in self._struck), key=lambda entry: entry[0])

    def _job_processes(self) -> list[psutil.Process]:
        """Those that stand in an attempt's directory, which lies in a worker's."""
        below = children(self.place.work)
        return [process for process in below if premises.ATTEMPT.fullmatch(Path(process.info["cwd"]).name)]

    def _worker(self, draw: float) -> str:
        """Half of the time one that has a job's process, if there is one; else any, whatever it is at."""
        busy = {Path(process.info["cwd"]).parents[1].name for process in self._job_processes()} if draw < 0.5 else ()
        names = sorted(busy) or [f"worker-{number}" for number in range(1, NUM_WORKERS + 1)]
        return names[int(draw * 2 % 1 * len(names))]

    def _kill_worker(self, name: str, whole: bool) -> None:
        leash, worker = self._leash_and_process(name)
        # The worker first: it is not to see its child die.
        doomed = [worker, *worker.children(recursive=True), leash] if whole else [worker]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._deaths[name] += 1

    def _leash_and_process(self, name: str) -> tuple[psutil.Process, psutil.Process]:
        """A service's own process and what holds it; waited for if it is just being started again."""

        def found() -> tuple[psutil.Process, psutil.Process] | None:
            state = self.states()[name]
            if state.pid is None or state.restarts < self._deaths[name]:
                return None
            with suppress(psutil.NoSuchProcess):
                leash = psutil.Process(state.pid)
                return next(((leash, process) for process in leash.children()), None)
            return None

        return wait_until(found, f"{name} to run", PATIENCE_SECONDS)

    # ------------------------------------------------------------ what is known

    def states(self) -> dict[str, ServiceState]:
        return {**self._server_crew.states(), **self._app_crew.states()}

    def wait_whole(self) -> None:
        """Wait until everything runs again."""
        wait_until(lambda: self._server_crew.is_ready() and self._app_crew.is_ready(), "every service to be ready")

    def close_apps(self) -> list[str]:
        """Stop all but the servers; returns what tells of bugs: deaths that were not dealt here, and logged errors."""
        told = [
            f"{name} died {state.restarts - self._deaths[name]} times without having been killed"
            for name, state in self.states().items()
            if state.restarts != self._deaths[name] or state.phase == "failed"
        ]
        self._app_crew.stop()
        for name in self._app_crew.states():
            told += [f"{name} logged: {line}" for line in self._logged_errors(name)]
        return told

    def _logged_errors(self, name: str) -> Iterator[str]:
        """Lines of a log that tell of a bug: an error of the service's own, or what nobody expected to be raised.

        That a library could not connect is none.
        """
        log = self.place.logs / f"{name}.log"
        for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
            is_error = '"level": "error"' in line and ('"trace": ' in line or '"logger": ' not in line)
            if is_error or line.startswith("Traceback"):
                yield line[:2000]

    def audit(self) -> list[str]:
        """The audit of ledger and storage, and what the apps left on this machine."""
        broken = audit(self.sessions, self.storage, quiet=True) + leftovers(self.place.work)
        for directory in self.place.work.glob("worker-*"):
            broken += leftovers(directory)
        return broken


@contextmanager
def standing(directory: Path) -> Iterator[Site]:
    """The service in a directory, until the end; nothing of it runs afterwards."""
    place = Place(directory)
    place.make()
    try:
        with place.lock(timeout_seconds=10) as lock, Crew(place, servers(place), lock) as server_crew:
            server_crew.start()
            server_crew.wait_ready()
            settings, port = settings_of(place).model_copy(update=SETTINGS), free_ports(1)[0]
            sessions = make_sessions(settings)
            services = [_in_small(place, service) for service in apps(place, settings, sessions, port, NUM_WORKERS)]
            try:
                with Crew(place, services, lock) as app_crew:
                    app_crew.start()
                    app_crew.wait_ready()
                    yield Site(place, f"http://127.0.0.1:{port}", sessions, server_crew, app_crew)
            finally:
                sessions.kw["bind"].dispose()
    finally:
        remove_sockets(place.ports())
    wait_until(lambda: not place.is_locked(), "the last process to be gone", 10)


def _in_small(place: Place, service: Service) -> Service:
    """The same service from this source tree, whose workers' jobs are tiny ones."""
    environment = {**service.environment, "PYTHONPATH": str(HERE.parents[1])}
    if not service.name.startswith("worker-"):
        return replace(service, environment=environment)
    environment["BURNISH_WORK_DIRECTORY"] = str(place.work / service.name / "work")
    return replace(service, environment=environment, command=TINY_WORKER)
