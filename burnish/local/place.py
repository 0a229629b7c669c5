"""The directory that a local service lives in: its secrets, ports, lock, state and logs."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from burnish.local.waiting import wait_until

DIRECTORY_NAME = ".burnish"
PORT_NAMES = (
    "postgres",
    "valkey",
    "s3",
    "s3_grpc",
    "filer",
    "filer_grpc",
    "master",
    "master_grpc",
    "volume",
    "volume_grpc",
)
PORT_RANGE = (20_000, 32_000)  # below the range from which the kernel takes ports for outgoing connections

# starting -> ready <-> recovering (something died and is being started again) -> stopping -> stopped
# starting -> failed
Phase = Literal["starting", "ready", "recovering", "stopping", "stopped", "failed"]


class LocalFailed(Exception):
    """Local mode could not do what was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Secrets:
    """Generated passwords and keys, kept for as long as the data they protect."""

    database_password: str = field(default_factory=lambda: secrets.token_hex(24))
    broker_password: str = field(default_factory=lambda: secrets.token_hex(24))
    s3_access_key: str = field(default_factory=lambda: "BRN" + secrets.token_hex(8).upper())
    s3_secret_key: str = field(default_factory=lambda: secrets.token_hex(24))
    secret_key: str = field(default_factory=lambda: secrets.token_hex(32))


@dataclass(frozen=True)
class ServiceState:
    """One service as `status` shows it; `pid` is its leash's, `restarts` how often it died unexpectedly."""

    phase: Literal["waiting", "starting", "ready", "done", "restarting", "stopped", "failed"]
    pid: int | None = None
    restarts: int = 0
    last_exit: int | None = None


@dataclass(frozen=True)
class State:
    """What runs in the directory, as the process that keeps it running last wrote it."""

    phase: Phase
    pid: int = 0
    pid_started_at: float = 0.0  # tells this process from a later one with the same number
    url: str = ""
    message: str = ""
    services: dict[str, ServiceState] = field(default_factory=dict)

    @property
    def is_up(self) -> bool:
        return self.phase in ("ready", "recovering")


class Place:
    """Paths below one directory, and what is written there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.logs = self.directory / "logs"
        self.work = self.directory / "work"
        self.postgres = self.directory / "postgres"
        self.valkey = self.directory / "valkey"
        self.seaweedfs = self.directory / "seaweedfs"
        self.api_key = self.directory / "api-key"

    def make(self) -> None:
        """Make the directory and those below it, closed to other users."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for below in (self.logs, self.work, self.valkey, self.seaweedfs):
                below.mkdir(mode=0o700, exist_ok=True)
            (self.directory / ".gitignore").write_text("*\n")
        except OSError as error:
            raise LocalFailed(f"{self.directory} cannot be used: {error.strerror}.") from error

    def secrets(self) -> Secrets:
        """The directory's secrets, made the first time."""
        path = self.directory / "secrets.json"
        try:
            return Secrets(**json.loads(path.read_text()))
        except FileNotFoundError:
            made = Secrets()
            write_private(path, json.dumps(asdict(made), indent=2))
            return made

    def ports(self) -> dict[str, int]:
        """The loopback port of each of PORT_NAMES, as chosen at the last start."""
        return _read_json(self.directory / "ports.json")

    def choose_ports(self) -> dict[str, int]:
        """A free loopback port for each of PORT_NAMES: the last start's, if they are all free still."""
        ports = self.ports()
        if sorted(ports) != sorted(PORT_NAMES) or not all(is_free(port) for port in ports.values()):
            ports = dict(zip(PORT_NAMES, free_ports(len(PORT_NAMES)), strict=True))
            write_private(self.directory / "ports.json", json.dumps(ports, indent=2))
        return ports

    @contextmanager
    def lock(self, timeout_seconds: float) -> Iterator[int]:
        """Hold the directory alone; yields the lock's file descriptor, for the leashes to hold too.

        The lock is free only once the last of them has seen its command's last descendant go.

        Raises:
            LocalFailed: somebody else holds it for longer than `timeout_seconds`.
        """
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not wait_until(lambda: _try_lock(descriptor), timeout_seconds):
                raise LocalFailed(f"Another process is starting or stopping the service in {self.directory}.")
            yield descriptor
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        """Whether anything of the service still runs in the directory."""
        try:
            descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def write_state(self, state: State) -> None:
        write_private(self.directory / "state.json", json.dumps(asdict(state), indent=2))

    def read_state(self) -> State | None:
        """The state, if the process that wrote it is alive; None if nothing runs here."""
        found = self.read_last_state()
        return found if found is not None and _is_alive(found.pid, found.pid_started_at) else None

    def read_last_state(self) -> State | None:
        """The state as last written, by whomever."""
        raw = _read_json(self.directory / "state.json")
        if not raw:
            return None
        services = {name: ServiceState(**service) for name, service in raw.pop("services").items()}
        return State(**raw, services=services)

    def log_tail(self, name: str, num_lines: int = 15) -> str:
        """The last lines of a service's log."""
        try:
            lines = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-num_lines:])


def find_place(directory: Path | None = None) -> Place:
    """The place in `directory`; without one, `.burnish` here or in the nearest parent that has it.

    One that another user made is passed over: what it says is not to be trusted with anything.
    """
    if directory is not None:
        return Place(directory)
    here = Path.cwd()
    for parent in (here, *here.parents):
        state = parent / DIRECTORY_NAME / "state.json"
        if os.access(state, os.R_OK) and state.stat().st_uid == os.geteuid():
            return Place(parent / DIRECTORY_NAME)
    return Place(here / DIRECTORY_NAME)


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step, readable by its owner alone."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def free_ports(count: int) -> Sequence[int]:
    """Distinct loopback ports that nobody listens on, and for which no SeaweedFS has left a socket."""
    found: set[int] = set()
    while len(found) < count:
        port = PORT_RANGE[0] + secrets.randbelow(PORT_RANGE[1] - PORT_RANGE[0])
        if is_free(port) and not any(Path("/tmp").glob(f"seaweedfs-*-{port}.sock")):
            found.add(port)
    return sorted(found)


def is_free(port: int) -> bool:
    """Whether a server could listen on the loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(pid: int, started_at: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started_at) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False


def _read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty if it is not there or was left half-written by a crash of the machine."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
