"""The ground on which faults are tried: a worker's tools on real servers, and jobs that take no time."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import psutil
import pytest
from sqlalchemy import select, text

from burnish.local.apps import environment_of
from shared import faultpoints, lifecycle
from shared.accounts import ensure_account
from shared.db import Sessions, transaction
from shared.doorbell import Doorbell
from shared.ledger import Capacity, Claim, Order
from shared.models import JOB_TERMINAL, Artifact, Job, JobEvent, StageRun, Worker
from shared.recipe import Recipe
from shared.settings import Settings
from shared.storage import Storage
from tests.audit import audit, half_uploads, leftovers
from tests.faults import tiny_child
from worker import environment, premises
from worker.supervisor import Tools, supervise
from worker.sweeper import forget, sweep

T = TypeVar("T")
HERE = Path(__file__).parent
TINY_WORKER = (sys.executable, str(HERE / "tiny_worker.py"))
SETTINGS: dict[str, Any] = {
    "heartbeat_seconds": 0.25,
    "lease_seconds": 30.0,  # of a machine that is busy with other tests; those of lapsing have their own
    "sweep_seconds": 0.2,
    "poll_seconds": 0.2,
    "retry_delay_seconds": 0.01,
    "drain_seconds": 5.0,
    "worker_threads": 1,
}


@contextmanager
def audited(sessions: Sessions, storage: Storage, directory: Path, *, quiet: bool = True) -> Iterator[None]:
    """Ends with the audit of all that was written, stored and left on this machine, and with an empty bucket."""
    yield
    broken = [*audit(sessions, storage, quiet=quiet), *changed_results(sessions, storage), *leftovers(directory)]
    broken += half_uploads(sessions, storage) if quiet else []
    for key in list(storage.list_keys()):
        storage.remove(key)
    assert broken == [], "\n".join(broken)


@contextmanager
def tiny_jobs(settings: Settings, sessions: Sessions, storage: Storage, directory: Path) -> Iterator[Ground]:
    """A ground whose processes end with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.process.PROGRAM", ("-P", tiny_child.__file__))
        made = Ground(settings, sessions, storage, directory)
        yield made
        made.close()


def changed_results(sessions: Sessions, storage: Storage) -> list[str]:
    """Tiny jobs whose stages left other bytes than their inputs and scripts alone decide.

    One that is from the cache must be what the job itself would have made.
    """
    with transaction(sessions) as session:
        machine = Job.baseline["environment"]["machine"].as_string()
        jobs = session.scalars(select(Job).where(machine == tiny_child.ENVIRONMENT.machine)).all()
        uploads = {file.id: file.key for file in session.scalars(select(Artifact).where(Artifact.role == "upload"))}
        of_stages = select(Artifact).where(Artifact.stage_position.is_not(None), Artifact.role != "checkpoint")
        files = session.scalars(of_stages).all()
    broken = []
    for job in jobs:
        recipe = Recipe.model_validate(job.recipe)
        inputs = (uploads[artifact_id] for artifact_id in (recipe.source.artifact_id, recipe.data.artifact))
        content = b"".join(chunk for key in inputs for chunk in storage.chunks(key))
        right = list(enumerate(tiny_child.faultless(job.name, [stage.kind for stage in recipe.stages], content)))
        left = sorted((file.stage_position, file.sha256) for file in files if file.job_id == job.id)
        if left != (right if job.status == "succeeded" else right[: len(left)]):
            broken.append(f"job {job.id} made other bytes than it would have undisturbed: {left} and not {right}")
    return broken


class Ground:
    """An account with files, whose jobs are tiny_child.py's: a job's name is the script of what happens to it."""

    def __init__(self, settings: Settings, sessions: Sessions, storage: Storage, directory: Path) -> None:
        self.settings = settings.model_copy(update={**SETTINGS, "work_directory": directory / "work"})
        self.sessions, self.storage, self.directory = sessions, storage, directory
        self.draining = threading.Event()
        self.account_id = ensure_account(sessions, "hospital")
        self.source = self.keep("source.onnx", b"a source model")
        self.data = self.keep("data.zip", b"a data set")
        self.has_killed = False  # a worker: what lies in its directory is the next one's to clear
        self._processes: list[subprocess.Popen[bytes]] = []
        self._doorbell: Doorbell | None = None

    def keep(self, name: str, content: bytes) -> UUID:
        """A completed upload of the account's."""
        key, sha256 = f"uploads/{name}", hashlib.sha256(content).hexdigest()
        self.storage.put_bytes(content, key)
        told = {"role": "upload", "name": name, "format": name.rpartition(".")[2], "key": key, "status": "ready"}
        artifact = Artifact(account_id=self.account_id, sha256=sha256, size_bytes=len(content), **told)
        with transaction(self.sessions) as session:
            session.add(artifact)
        return artifact.id

    def recipe(self, kinds: Sequence[str] = ("quantize", "build_engine")) -> Recipe:
        architecture = {"library": "monai", "name": "BasicUNet"}
        torch, onnx = {"architecture": architecture, "weights": str(self.source)}, {"onnx": str(self.source)}
        return Recipe.model_validate(
            {
                "source": torch if kinds[0] in ("prune", "export_onnx") else onnx,
                "task": {"kind": "segmentation", "classes": ["other", "lesion"], "background": 0},
                "data": {"artifact": str(self.data)},
                "stages": [{"kind": kind} for kind in kinds],
            }
        )

    def submit(self, script: str = "nothing", *, idempotency_key: str | None = None, **changes: Any) -> UUID:
        """A job of two stages in which happens what the script says."""
        facts: dict[str, Any] = {"recipe": self.recipe(), "timeout_seconds": 600.0, "use_cache": False}
        order = Order(account_id=self.account_id, name=script, **{**facts, **changes})
        return lifecycle.submit(self.sessions, order, idempotency_key)[0]

    # ------------------------------------------------------------ who works

    def tools(self, sessions: Sessions | None = None, storage: Storage | None = None, **settings: Any) -> Tools:
        own = self.settings.model_copy(update=settings)
        ledger = sessions or self.sessions
        return Tools(own, ledger, ledger, storage or self.storage, 1, 2**30)

    def claim(self, sessions: Sessions | None = None, **changes: Any) -> Claim:
        """Take the next job, waiting until one is due."""
        facts: dict[str, Any] = {"worker_id": "worker", "queues": ["default"], "memory_bytes": 2**40}
        facts["capabilities"] = environment.capabilities()
        capacity = Capacity(**{**facts, **changes})
        return wait_until(
            lambda: lifecycle.claim(sessions or self.sessions, capacity, self.settings.lease_seconds), "a job to be due"
        )

    def work(self, tools: Tools | None = None) -> str | None:
        """Claim a job and carry the attempt out here, to its end; returns the job's status."""
        return supervise(self.claim(), tools or self.tools(), self.draining)

    def start_work(self, tools: Tools | None = None) -> threading.Thread:
        """The same in a thread."""
        thread = threading.Thread(target=supervise, args=(self.claim(), tools or self.tools(), self.draining))
        thread.start()
        return thread

    def start_worker(
        self, faults: str = "", settings: Settings | None = None, **variables: str
    ) -> subprocess.Popen[bytes]:
        """A worker process that is registered; `faults` arms its fault points."""
        known = {worker.id for worker in self.workers()}
        process = self.start([*TINY_WORKER], faults, settings, **variables)

        def registered() -> bool:
            assert process.poll() is None, f"the worker ended with {process.returncode}"
            return bool({worker.id for worker in self.workers()} - known)

        wait_until(registered, "the worker to register")
        return process

    def start(
        self, command: Sequence[str], faults: str = "", settings: Settings | None = None, **variables: str
    ) -> subprocess.Popen[bytes]:
        """A process of the service's, which is killed at the test's end if it still runs."""
        own = {"PYTHONPATH": str(HERE.parents[1]), faultpoints.VARIABLE: faults}
        given = {**os.environ, **environment_of(settings or self.settings), **own, **variables}
        with (self.directory / "processes.log").open("ab") as log:
            process = subprocess.Popen(command, env=given, cwd=self.directory, stdout=log, stderr=log)
        self._processes.append(process)
        return process

    def sweep(self) -> int:
        if self._doorbell is None:
            self._doorbell = Doorbell(self.settings)
        swept = sweep(self.sessions, self._doorbell, self.settings.retry_delay_seconds)
        forget(self.sessions, self.storage)
        return swept

    def take_away(self, job_id: UUID) -> None:
        """Have the job's lease lapse, whatever its holder does, and the job requeued."""

        def taken() -> bool:
            self.execute("UPDATE jobs SET lease_expires_at = now() - interval '1 s' WHERE id = :id", id=job_id)
            return bool(lifecycle.sweep_leases(self.sessions))

        wait_until(taken, "the lease to lapse")

    def close(self) -> None:
        """End what was started: gently, so that workers leave nothing, and then not."""
        if self._doorbell is not None:
            self._doorbell.close()
        self.has_killed |= any(process.poll() == -signal.SIGKILL for process in self._processes)
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.has_killed:
            premises.clear(self.settings.work_directory)

    def log(self) -> str:
        """What the processes that were started here have told."""
        path = self.directory / "processes.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    # ------------------------------------------------------------ what is known

    def job(self, job_id: UUID) -> Job:
        with transaction(self.sessions) as session:
            return session.get_one(Job, job_id)

    def reason(self, job_id: UUID) -> dict[str, Any]:
        return self.job(job_id).state_reason or {}

    def workers(self) -> list[Worker]:
        with transaction(self.sessions) as session:
            return list(session.scalars(select(Worker)))

    def stages(self, job_id: UUID) -> list[StageRun]:
        with transaction(self.sessions) as session:
            found = select(StageRun).where(StageRun.job_id == job_id).order_by(StageRun.position)
            return list(session.scalars(found))

    def events(self, job_id: UUID, *kinds: str) -> list[JobEvent]:
        with transaction(self.sessions) as session:
            found = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)
            return [event for event in session.scalars(found) if not kinds or event.kind in kinds]

    def result(self, job_id: UUID) -> dict[str, str]:
        """The bytes that the job delivers: sha256 by name, of the stages' files."""
        with transaction(self.sessions) as session:
            found = select(Artifact.name, Artifact.sha256).where(
                Artifact.job_id == job_id, Artifact.stage_position.is_not(None), Artifact.role != "checkpoint"
            )
            return {row.name: row.sha256 for row in session.execute(found)}

    def logs(self, job_id: UUID) -> str:
        """What the job's processes wrote, of every attempt that could store its log."""
        with transaction(self.sessions) as session:
            found = select(Artifact.key).where(Artifact.job_id == job_id, Artifact.role == "log")
            keys = session.scalars(found.order_by(Artifact.attempt)).all()
        return b"".join(b"".join(self.storage.chunks(key)) for key in keys).decode()

    def faultless_result(self) -> dict[str, str]:
        """The same of a job to which nothing happens. Nothing else may be queued."""
        job_id = self.submit()
        assert self.work() == "succeeded", self.reason(job_id)
        return self.result(job_id)

    def execute(self, statement: str, **parameters: Any) -> None:
        with transaction(self.sessions) as session:
            session.execute(text(statement), parameters)

    # ------------------------------------------------------------ waiting

    def wait_for(self, job_id: UUID, *statuses: str, timeout_seconds: float = 120.0) -> Job:
        """Wait until the job has one of these statuses, or an end if none is named."""

        def found() -> Job | None:
            job = self.job(job_id)
            return job if job.status in (statuses or JOB_TERMINAL) else None

        return wait_until(found, f"job {job_id} to be {' or '.join(statuses) or 'over'}", timeout_seconds)

    def wait_for_event(self, job_id: UUID, kind: str, timeout_seconds: float = 120.0, **data: Any) -> JobEvent:
        """The newest event of that kind whose data holds these facts."""

        def found() -> JobEvent | None:
            same = [event for event in self.events(job_id, kind) if data.items() <= event.data.items()]
            return same[-1] if same else None

        return wait_until(found, f"event {kind} {data}", timeout_seconds)


def wait_until(condition: Callable[[], T | None], what: str, timeout_seconds: float = 120.0) -> T:
    """The condition's first result that is not None or False."""
    deadline, pause = time.monotonic() + timeout_seconds, threading.Event()
    while time.monotonic() < deadline:
        if found := condition():
            return found
        pause.wait(0.02)
    raise AssertionError(f"waited {timeout_seconds:g} s in vain for: {what}")


def reached(file: Path, timeout_seconds: float = 120.0) -> Path:
    """Wait until a process stands at a line that was armed with `wait`; `file.unlink()` lets it go on."""
    wait_until(file.exists, f"a process to reach {file.name}", timeout_seconds)
    return file


def children(place: Path | UUID) -> list[psutil.Process]:
    """Processes that work below a directory, or in a job's."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        if str(place) in (process.info["cwd"] or "") and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def child_of(job_id: UUID) -> psutil.Process:
    """The job's process."""
    return wait_until(lambda: next(iter(children(job_id)), None), f"the process of job {job_id}")


@contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()
