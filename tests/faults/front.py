"""A front desk in a process of its own, on a port that it keeps: it can be armed, killed and started again."""

from __future__ import annotations

import resource
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from shared import accounts
from shared.settings import Settings
from tests.api.desk import client_of
from tests.faults.ground import Ground, wait_until

OPTIONS = ("--http", "api.doorway:Doorway", "--no-access-log", "--timeout-graceful-shutdown", "1")


@contextmanager
def allowed_files(needed: int) -> Iterator[None]:
    """This process, and those that it starts, may have so many files open meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > hard != resource.RLIM_INFINITY:
        pytest.skip(f"it needs {needed:,} open files, and a process may have {hard:,} here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Front:
    """`client()` speaks for the ground's account."""

    def __init__(self, ground: Ground, settings: Settings | None = None) -> None:
        self._ground, self._settings = ground, settings or ground.settings
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = accounts.create_key(ground.sessions, ground.account_id, "front")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, faults: str = "", *, max_files: int | None = None) -> None:
        """`faults` arms its fault points; it may have `max_files` files open."""
        command = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app", "--port", str(self.port)]
        told = shlex.join([*command, *OPTIONS])
        limit = f"ulimit -n {max_files}; " if max_files else ""
        self.process = self._ground.start(["sh", "-c", f"{limit}exec {told}"], faults, self._settings)
        wait_until(self._answers, "the front desk to answer")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def was_killed(self) -> bool:
        """Whether it killed itself, as it was armed to."""
        assert self.process is not None
        return self.process.wait(timeout=30) == -signal.SIGKILL

    @contextmanager
    def client(self, url: str | None = None) -> Iterator[httpx.Client]:
        with client_of(url or self.url, self.key) as client:
            yield client

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._ground.log()
        try:
            return httpx.get(f"{self.url}/healthz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False
