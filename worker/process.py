"""The child as a process: spawned in a group of its own with a scrubbed environment, and ended with all its own."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from shared import faultpoints
from shared.faultpoints import reach
from worker.child import MEMORY_VARIABLE
from worker.save_timer import INTERVAL_VARIABLE
from worker.timing_lock import VARIABLE as TIMING_LOCK_VARIABLE
from worker.wire import TICKET, Ear, Ticket

PROGRAM = ("-P", "-m", "worker.child")

# What the numerical libraries need of this process's environment; nothing else is passed on.
PASSED_ON = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
    faultpoints.VARIABLE,
    INTERVAL_VARIABLE,
)


class ChildProcess:
    """At most one child, started once; `kill` may come from any thread, also before the start."""

    def __init__(
        self, directory: Path, log: Path, *, threads: int, memory_bytes: int, timing_lock: Path
    ) -> None:
        self._directory, self._log, self._threads, self._memory_bytes = directory, log, threads, memory_bytes
        self._timing_lock = timing_lock
        self._lock = threading.Lock()
        self._killed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def start(self, ticket: Ticket) -> Ear:
        """Spawn the child in its directory; raises InterruptedError if it was killed before."""
        (self._directory / TICKET).write_text(ticket.model_dump_json(), encoding="utf-8")
        ours, theirs = socket.socketpair()
        command = [sys.executable, *PROGRAM, str(theirs.fileno())]
        with self._lock, theirs, self._log.open("ab") as log:
            if self._killed:
                ours.close()
                raise InterruptedError
            self._process = subprocess.Popen(
                command,
                cwd=self._directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            self._connection = ours
        reach("child.spawned")
        return Ear(ours)

    def readable(self, timeout_seconds: float) -> bool:
        """Whether the child said something, or ended, within the time."""
        poller = select.poll()
        if self._connection is not None:
            poller.register(self._connection, select.POLLIN)
        return bool(poller.poll(timeout_seconds * 1000))

    def kill(self) -> None:
        """End the child and every process of its group; a second time is no error."""
        with self._lock:
            self._killed = True
            if self._process is None or self._process.returncode is not None:
                return
            # Not yet reaped, so its number is still its own.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def death(self) -> str:
        """What ended the child, in words; waits for it."""
        with self._lock:
            if self._process is None:
                return "it never started"
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name} (often out of memory)" if -code == signal.SIGKILL else name

    def close(self) -> None:
        """Let go of the connection, once the child is dead."""
        if self._connection is not None:
            self._connection.close()

    def _environment(self) -> dict[str, str]:
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        threads = str(self._threads)
        return {
            **passed,
            "HOME": str(self._directory),
            "TMPDIR": str(self._directory / "tmp"),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            MEMORY_VARIABLE: str(self._memory_bytes),
            TIMING_LOCK_VARIABLE: str(self._timing_lock),
        }
