"""What the tests of the client and the command work with: a service that can be stopped, and a worker's pen."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import uvicorn
import yaml
from sqlalchemy import update

from api.main import create_app
from burnish import Client
from burnish.cli import main
from shared import accounts, lifecycle
from shared.db import Sessions, transaction
from shared.ledger import Capacity, Claim, Reason, Stored
from shared.models import Artifact
from shared.recipe import Goal, Recipe
from shared.report import (
    Baseline,
    Environment,
    GoalResult,
    Latency,
    Measurement,
    Method,
    Ratio,
    Report,
    StageReport,
    Verdict,
)
from shared.settings import Settings
from shared.storage import Storage
from tests.api.desk import CAPABILITIES, data, wait_until, weights

ENGINE = b"an engine's bytes" * 1000
RECIPE: dict[str, Any] = {
    "source": {"architecture": {"library": "monai", "name": "BasicUNet"}, "weights": "weights.safetensors"},
    "task": {"kind": "segmentation", "classes": ["background", "brain"], "background": 0},
    "data": {"artifact": "data.safetensors"},
    "stages": [{"kind": "export_onnx"}, {"kind": "quantize"}, {"kind": "build_engine"}],
    "goals": [{"metric": "dice", "kind": "max_drop", "value": 0.01}],
}


class Service:
    """The api on one port, which it keeps over restarts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.requests: list[tuple[str, str]] = []

    def start(self) -> None:
        app = create_app(self._settings)
        listener = socket.create_server(("127.0.0.1", self.port))
        config = uvicorn.Config(
            self._noting(app), log_level="error", ws="none", timeout_graceful_shutdown=1, access_log=False
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([listener])), name="api")
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=15)
        assert not self._thread.is_alive(), "the service did not stop"

    def num_requests(self, method: str, path: str) -> int:
        """How often a route was asked."""
        return self.requests.count((method, path))

    def _noting(self, app: Any) -> Any:
        async def noting(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                self.requests.append((scope["method"], scope["path"]))
            await app(scope, receive, send)

        return noting


@dataclass(frozen=True)
class Workbench:
    """One account of a running service, a folder with a job file, and the ledger to play a worker with."""

    service: Service
    settings: Settings
    sessions: Sessions
    storage: Storage
    directory: Path
    account_id: UUID
    key: str

    @property
    def url(self) -> str:
        return self.service.url

    def client(self) -> Client:
        return Client(self.url, self.key)

    def job_file(self, **changes: Any) -> Path:
        """job.yaml with its two files; `changes` replace parts of the recipe."""
        return write_job(self.directory, **changes)

    def claim(self) -> Claim:
        """Take the next job as a worker does, as soon as there is one."""
        claims = list[Claim]()

        def taken() -> bool:
            capacity = Capacity("worker-1", ["default"], CAPABILITIES, 2**40)
            claimed = lifecycle.claim(self.sessions, capacity, lease_seconds=60)
            claims.extend([claimed] if claimed else [])
            return claimed is not None

        wait_until(taken)
        return claims[0]

    def finish_stages(self, claim: Claim, kinds: int = 3) -> None:
        """Run every stage of a claimed job in no time; the last leaves ENGINE."""
        for position in range(kinds):
            lifecycle.start_stage(self.sessions, claim.lease, position)
            progress = lifecycle.Progress(position, 0.5, "half way")
            lifecycle.heartbeat(self.sessions, claim.lease, 60, progress, f"line of stage {position}\n")
            kept = [self.keep("engine", "engine.zip", ENGINE)] if position == kinds - 1 else []
            report = stage_report(position, claim.recipe["stages"][position]["kind"]).model_dump(mode="json")
            lifecycle.finish_stage(self.sessions, claim.lease, position, "succeeded", report, kept)

    def succeed(self, claim: Claim, verdict: Verdict = "met") -> None:
        """Finish a claimed job with a whole report."""
        self.finish_stages(claim)
        report = make_report(claim, verdict).model_dump(mode="json")
        log = self.keep("log", f"attempt-{claim.attempt}.log", b"line of stage 0\nline of stage 1\nline of stage 2\n")
        lifecycle.settle(self.sessions, claim.lease, "succeeded", None, report, [log])

    def fail(self, claim: Claim) -> None:
        """End a claimed job in its second stage."""
        lifecycle.start_stage(self.sessions, claim.lease, 1)
        reason = Reason("stage_failed", "The calibration data are all zero.", "Send other data.", 1, "user")
        lifecycle.settle(self.sessions, claim.lease, "failed", reason)

    def keep(self, role: str, name: str, content: bytes) -> Stored:
        """Put a job's file into storage; returns what the ledger is to be told of it."""
        sha256 = hashlib.sha256(content).hexdigest()
        key = f"jobs/test/{sha256}/{name}"
        etag = self.storage.put_bytes(content, key)
        return Stored(role, name, name.rpartition(".")[2], key, sha256, len(content), etag)

    def damage(self, name: str, content: bytes) -> None:
        """Put other bytes in a file's place, as a disk might: behind the back of the service and of its storage."""
        [key] = [key for key in self.storage.list_keys() if key.endswith(name)]
        etag = self.storage.put_bytes(content, key)
        with transaction(self.sessions) as session:
            session.execute(update(Artifact).where(Artifact.key == key).values(etag=etag))

    def in_background(self, act: Callable[[], object]) -> Background:
        """Do something while the test waits for it to show."""
        return Background(act)


@dataclass
class Background:
    act: Callable[[], object]
    _thread: threading.Thread = field(init=False)
    _failed: list[BaseException] = field(default_factory=list)

    def __enter__(self) -> Background:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()
        if self._failed:
            raise self._failed[0]

    def _run(self) -> None:
        try:
            self.act()
        except BaseException as error:
            self._failed.append(error)


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it told."""

    status: int
    out: str
    err: str

    def document(self) -> Any:
        """stdout as the one JSON document that it must be."""
        return json.loads(self.out)


def open_workbench(settings: Settings, sessions: Sessions, storage: Storage, directory: Path) -> Workbench:
    account_id = accounts.ensure_account(sessions, "clinic")
    key = accounts.create_key(sessions, account_id, "test")
    return Workbench(Service(settings), settings, sessions, storage, directory, account_id, key)


def write_job(directory: Path, **changes: Any) -> Path:
    (directory / "weights.safetensors").write_bytes(weights())
    (directory / "data.safetensors").write_bytes(data())
    path = directory / "job.yaml"
    document = {"name": "unet", "tags": ["test"], "recipe": {**RECIPE, **changes}}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def run_command(capsys: Any, *arguments: str | Path) -> Answer:
    """The `burnish` command, in this process."""
    capsys.readouterr()
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        status = int(ended.code or 0)
    told = capsys.readouterr()
    return Answer(status, told.out, told.err)


# ---------------------------------------------------------------- a report


def make_report(claim: Claim, verdict: Verdict) -> Report:
    goal = Goal(metric="dice", kind="max_drop", value=0.01)
    met = GoalResult(goal=goal, reached=0.004, bound=0.008, outcome="met")
    goals: dict[Verdict, GoalResult] = {
        "met": met,
        "missed": GoalResult(goal=goal, reached=0.2, bound=0.25, outcome="missed"),
        "not_shown": GoalResult(goal=goal, reached=0.004, bound=0.02, needed=1234, outcome="not_shown"),
        "not_evaluated": GoalResult(goal=goal, reached=None, outcome="not_evaluated"),
        "no_gain": met,
    }
    recipe = Recipe.model_validate(claim.recipe)
    return Report(
        job=claim.lease.job_id,
        name=claim.name,
        recipe=recipe,
        source_sha256="a" * 64,
        data_sha256="b" * 64,
        environment=ENVIRONMENT,
        baseline=Baseline(source=measurement(40.0, 0.9), onnxruntime=None, environment=ENVIRONMENT),
        stages=[stage_report(position, stage.kind) for position, stage in enumerate(recipe.stages)],
        final=len(recipe.stages) - 1,
        goals=[goals[verdict]],
        verdict=verdict,
        reason=f"The headline of {verdict}.",
        warnings=["Stage 1 (quantize): a warning."],
    )


def stage_report(position: int, kind: str, status: Literal["succeeded", "dropped"] = "succeeded") -> StageReport:
    found = measurement(10.0, 0.896).model_copy(update={"speedup": Ratio(value=4, low=3.9, high=4.1)})
    return StageReport(position=position, kind=kind, status=status, seconds=1.0, measurement=found)


def measurement(p50: float, dice: float) -> Measurement:
    how = {"engine": "onnxruntime", "precision": "fp32", "device": "cpu", "threads": 1, "batch": 1, "versions": {}}
    method = Method.model_validate({**how, "warm_up": 5, "runs": 50, "samples": 4})
    return Measurement(
        parameters=1000,
        macs=None,
        size_bytes=4000,
        latency_ms=Latency(p50=p50, p90=p50 + 1),
        throughput_per_second={1: 1000 / p50},
        peak_memory_bytes=None,
        metrics={"dice": dice},
        method=method,
    )


ENVIRONMENT = Environment(
    machine="x86_64", cpu="a cpu", cores=2, memory_bytes=2**33, gpu=None, python="3.11", packages={"torch": "2.14.1"}
)
