"""What the worker's tests begin with: a tiny network and its data in storage, and jobs on them in the ledger."""

from __future__ import annotations

import hashlib
import itertools
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psutil
import pytest
import torch
from monai.networks.nets import BasicUNet
from safetensors.torch import save_file
from sqlalchemy import select as sql_select

from shared import checkpoints, lifecycle
from shared.accounts import ensure_account
from shared.db import Sessions, transaction
from shared.ledger import Capacity, Claim, Order
from shared.models import Artifact, Job, JobEvent, StageRun
from shared.recipe import Recipe
from shared.settings import Settings
from shared.storage import Storage
from tests.worker.workbench import small_onnx
from worker import environment, wire
from worker.supervisor import Tools, supervise

T = TypeVar("T")
UNET = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 3,
    "features": [8, 8, 16, 16, 32, 8],
    "norm": "batch",
    "act": "relu",
}
STAGES: list[dict[str, Any]] = [
    {"kind": "export_onnx"},
    {"kind": "quantize", "calibration_samples": 8},
    {"kind": "build_engine", "targets": ["cpu-fastest"]},
]

BRIEF: list[dict[str, Any]] = [
    {"kind": "quantize", "scheme": "fp16"},
    {"kind": "build_engine", "targets": ["onnxruntime"]},
]


class Workshop:
    """One worker's tools on the test's servers, and an account with a network and data to work on."""

    def __init__(self, settings: Settings, sessions: Sessions, storage: Storage, directory: Path) -> None:
        # A lease that a busy machine cannot let lapse; tests of lapsing set their own.
        own = {"work_directory": directory / "work", "lease_seconds": 60.0, "retry_delay_seconds": 0.0}
        self.settings = settings.model_copy(update=own)
        self.sessions, self.storage, self.directory = sessions, storage, directory
        self.account_id = ensure_account(sessions, "hospital")
        self.tools = Tools(self.settings, sessions, sessions, storage, threads=1, memory_bytes=8 * 2**30)
        self.draining = threading.Event()
        self.weights = self.keep(unet(directory / "unet.safetensors"), "safetensors")
        self.data = self.keep(slices(directory / "data.safetensors"), "safetensors")

    def keep(self, path: Path, format: str, sha256: str | None = None) -> UUID:
        """A completed upload of the account's."""
        content = path.read_bytes()
        key = f"uploads/{path.stem}-{uuid4()}{path.suffix}"
        self.storage.put(path, key)
        artifact = Artifact(
            account_id=self.account_id,
            role="upload",
            name=path.name,
            format=format,
            key=key,
            sha256=sha256 or hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
            status="ready",
        )
        with transaction(self.sessions) as session:
            session.add(artifact)
        return artifact.id

    def recipe(self, **changes: Any) -> dict[str, Any]:
        return {
            "source": {
                "architecture": {"library": "monai", "name": "BasicUNet", "arguments": UNET},
                "weights": str(self.weights),
            },
            "task": {"kind": "segmentation", "classes": ["air", "tissue", "bone"], "background": 0},
            "data": {"artifact": str(self.data)},
            "stages": STAGES,
            "benchmark": {"runs": 10, "warm_up": 1, "batches": [1]},
            **changes,
        }

    def brief(self, **changes: Any) -> dict[str, Any]:
        """A job's changes that make it short: an ONNX of one convolution, which needs neither PyTorch nor an export."""
        path = self.directory / "brief.onnx"
        small_onnx(path, classes=3)
        return {"source": {"onnx": str(self.keep(path, "onnx"))}, "stages": BRIEF, **changes}

    def submit(
        self, *, timeout_seconds: float = 600.0, max_attempts: int = 3, use_cache: bool = False, **changes: Any
    ) -> UUID:
        recipe = Recipe.model_validate(self.recipe(**changes))
        order = Order(
            self.account_id, "job", recipe, timeout_seconds, max_attempts=max_attempts, use_cache=use_cache
        )
        return lifecycle.submit(self.sessions, order)[0]

    def claim(self) -> Claim:
        capacity = Capacity("worker", ["default"], environment.capabilities(), 2**40)
        claim = lifecycle.claim(self.sessions, capacity, self.settings.lease_seconds)
        assert claim is not None
        return claim

    def work(self) -> str | None:
        """Claim a job and run it here, to the end of the attempt; returns its status."""
        return supervise(self.claim(), self.tools, self.draining)

    def start(self) -> tuple[Claim, threading.Thread]:
        """Claim a job and run it in a thread."""
        claim = self.claim()
        thread = threading.Thread(target=supervise, args=(claim, self.tools, self.draining))
        thread.start()
        return claim, thread

    def job(self, job_id: UUID) -> Job:
        with transaction(self.sessions) as session:
            return session.get_one(Job, job_id)

    def stages(self, job_id: UUID) -> list[StageRun]:
        with transaction(self.sessions) as session:
            found = session.scalars(sql_select(StageRun).where(StageRun.job_id == job_id).order_by(StageRun.position))
            return list(found)

    def events(self, job_id: UUID) -> list[JobEvent]:
        with transaction(self.sessions) as session:
            found = session.scalars(sql_select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence))
            return list(found)

    def artifacts(self, job_id: UUID) -> list[Artifact]:
        with transaction(self.sessions) as session:
            return list(session.scalars(sql_select(Artifact).where(Artifact.job_id == job_id).order_by(Artifact.name)))

    def wait_for_event(self, job_id: UUID, kind: str, **data: Any) -> JobEvent:
        """The first event of that kind whose data holds these facts."""

        def found() -> JobEvent | None:
            same_kind = (event for event in self.events(job_id) if event.kind == kind)
            return next((event for event in same_kind if data.items() <= event.data.items()), None)

        return wait_until(found, f"event {kind} {data}")


def wait_until(condition: Callable[[], T | None], what: str, timeout_seconds: float = 60.0) -> T:
    """The condition's first result that is not None or False."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        select.select([], [], [], 0.05)
    raise AssertionError(f"waited {timeout_seconds:g} s in vain for: {what}")


def children(job_id: UUID) -> list[psutil.Process]:
    """Processes that work in a job's directory."""
    found = []
    for process in psutil.process_iter(["cwd"]):
        if str(job_id) in (process.info["cwd"] or ""):
            found.append(process)
    return found


def kill_in_epoch(workshop: Workshop, job_id: UUID, epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an attempt and kill its child at the end of an epoch, before the epoch's checkpoint is heard of."""
    parse, heard = wire.parse, itertools.count(1)

    def kill(line: bytes) -> wire.Said:
        said = parse(line)
        if isinstance(said, wire.Checkpointed) and next(heard) == epoch:
            [child] = [process for process in children(job_id) if "worker.child" in process.cmdline()]
            child.kill()
            return wire.Progressed(position=0, fraction=0.5, message="killed")
        return said

    with monkeypatch.context() as patch:
        patch.setattr(wire, "parse", kill)
        assert workshop.work() == "queued"
    assert num_kept(workshop, job_id) == epoch - 1


def num_kept(workshop: Workshop, job_id: UUID) -> int:
    """Checkpoints that were uploaded so far, by the number in the newest one's key."""
    kept = checkpoints.of_job(workshop.sessions, job_id)
    return int(kept[0].key.split("/kept/")[1].split("/")[0]) if kept else 0


def unet(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_file(BasicUNet(**UNET).state_dict(), path)
    return path


def slices(path: Path, **changes: torch.Tensor) -> Path:
    """Twelve 32x32 slices in three grey levels that are their classes, in all three parts; `changes` by tensor name."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (12, 4, 4), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = masks[:, None].float() + 0.1 * torch.randn((12, 1, 32, 32), generator=generator)
    tensors = {f"{part}.images": images for part in ("train", "calibration", "evaluation")}
    tensors |= {f"{part}.masks": masks.to(torch.uint8) for part in ("train", "evaluation")}
    save_file({name: tensor.contiguous().clone() for name, tensor in {**tensors, **changes}.items()}, path)
    return path
