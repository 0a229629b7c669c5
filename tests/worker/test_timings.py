"""Kernel timings on the real road: a job's child saves them, the account's next job has them in its ticket."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import timings
from shared.ledger import Claim
from tests.worker.workshop import Workshop
from worker import wire
from worker.custody import Custody, Forged
from worker.engines import tensorrt
from worker.heart import Heart
from worker.memory import Timings
from worker.process import ChildProcess
from worker.supervisor import _Attempt

NAME = "timing-11.1.0-NVIDIA-RTX-PRO-6000-Blackwell-Max-Q-Workstation-Edition-12.0"


@pytest.fixture(autouse=True)
def _swept(workshop: Workshop) -> Iterator[None]:
    yield
    for key in [key for key in workshop.storage.list_keys() if "/timings/" in key]:
        workshop.storage.remove(key)


def claim_for_tensorrt(workshop: Workshop) -> Claim:
    """A claim as a worker with a GPU would have it."""
    workshop.submit(stages=[{"kind": "export_onnx"}])
    claim = workshop.claim()
    stages = [{"kind": "export_onnx"}, {"kind": "build_engine", "targets": ["tensorrt"]}]
    return dataclasses.replace(claim, recipe={**claim.recipe, "stages": stages})


def ticket(workshop: Workshop, claim: Claim, directory: Path) -> wire.Ticket:
    directory.mkdir()
    return Custody(claim, workshop.storage, workshop.sessions, directory).fetch(1, interrupted=lambda: False)


def hear_timings(workshop: Workshop, claim: Claim, directory: Path) -> None:
    """What a supervisor does when its child says over their socket that it has timings, up to its answer."""
    child = ChildProcess(directory, directory / "log", threads=1, memory_bytes=2**30, timing_lock=directory / "lock")
    heart = Heart(workshop.sessions, workshop.sessions, claim, workshop.settings, directory / "log", child.kill)
    attempt = _Attempt(claim, workshop.tools, workshop.draining, child, heart, directory)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(wire.Timed(name=NAME, path=Path("file")).model_dump_json().encode() + b"\n")
        ear = wire.Ear(ours)
        [line] = ear.lines() or []
        assert attempt._hear(wire.parse(line), ear) is None
        assert theirs.recv(100) == b"{}\n"


def test_what_a_jobs_child_saves_is_in_the_ticket_of_the_accounts_next_job(workshop: Workshop, tmp_path: Path) -> None:
    first = claim_for_tensorrt(workshop)
    (tmp_path / "file").write_bytes(b"timings")
    hear_timings(workshop, first, tmp_path)
    assert timings.ROLE not in [artifact.role for artifact in workshop.artifacts(first.lease.job_id)]

    [found] = ticket(workshop, claim_for_tensorrt(workshop), tmp_path / "next").timings
    path = Timings(Mouth(), [found]).load(NAME)
    assert path is not None
    assert (tmp_path / "next" / path).read_bytes() == b"timings"


class Mouth(wire.Mouth):
    """One whose every word is taken as committed."""

    def __init__(self) -> None:
        self.said: list[wire.Said] = []

    def ask(self, said: wire.Said) -> dict[str, Any]:
        self.said.append(said)
        return {}


def test_what_was_just_saved_is_what_the_next_form_is_built_with(tmp_path: Path) -> None:
    mouth = Mouth()
    memory = Timings(mouth, [])
    assert memory.load(NAME) is None
    memory.save(NAME, tmp_path / "file")
    assert memory.load(NAME) == tmp_path / "file"
    assert mouth.said == [wire.Timed(name=NAME, path=tmp_path / "file")]


def keep(workshop: Workshop, claim: Claim, directory: Path, name: str = NAME) -> None:
    (directory / "file").write_bytes(b"timings")
    custody = Custody(claim, workshop.storage, workshop.sessions, directory)
    stored = custody.store_timings(wire.Timed(name=name, path=Path("file")))
    assert stored is not None
    timings.keep(workshop.sessions, claim.lease, stored)


@pytest.mark.parametrize("damage", ["gone", "other bytes"])
def test_damaged_timings_cost_time_and_not_the_job(workshop: Workshop, tmp_path: Path, damage: str) -> None:
    claim = claim_for_tensorrt(workshop)
    keep(workshop, claim, tmp_path)
    [kept] = timings.of_account(workshop.sessions, workshop.account_id)
    workshop.storage.remove(kept.key)
    if damage == "other bytes":
        workshop.storage.put_bytes(b"TIMINGS", kept.key)
    assert ticket(workshop, claim, tmp_path / "job").timings == []


def test_timings_that_an_earlier_child_named_like_the_source_do_not_replace_it(
    workshop: Workshop, tmp_path: Path
) -> None:
    claim = claim_for_tensorrt(workshop)
    keep(workshop, claim, tmp_path, name="source.safetensors")
    found = ticket(workshop, claim, tmp_path / "job")
    assert (tmp_path / "job" / found.source).read_bytes() != b"timings"
    assert (tmp_path / "job" / found.timings[0].path).read_bytes() == b"timings"


def test_a_job_without_tensorrt_fetches_none(workshop: Workshop, tmp_path: Path) -> None:
    keep(workshop, claim_for_tensorrt(workshop), tmp_path)
    workshop.submit(stages=[{"kind": "export_onnx"}])
    assert ticket(workshop, workshop.claim(), tmp_path / "job").timings == []


def test_timings_that_are_too_large_are_left(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "MAX_BYTES", 3)
    (tmp_path / "file").write_bytes(b"four")
    custody = Custody(claim_for_tensorrt(workshop), workshop.storage, workshop.sessions, tmp_path)
    assert custody.store_timings(wire.Timed(name=NAME, path=Path("file"))) is None


def test_timings_outside_of_the_jobs_directory_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "secret").write_text("secret")
    custody = Custody(claim_for_tensorrt(workshop), workshop.storage, workshop.sessions, tmp_path / "job")
    with pytest.raises(Forged, match="not a plain file of the job's directory"):
        custody.store_timings(wire.Timed(name=NAME, path=Path("../secret")))


class Config:
    """A builder's configuration as TensorRT has it: bytes that are no cache give none, another GPU's are not taken."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content == b"damaged" else Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        taken = ignore_mismatch or cache.content != b"another gpu"
        self.cache = cache if taken else self.cache
        return taken

    def get_timing_cache(self) -> Cache | None:
        return self.cache


@dataclasses.dataclass(frozen=True)
class Cache:
    content: bytes

    def serialize(self) -> bytes:
        return self.content + b", measured"


@pytest.mark.parametrize(
    ("known", "written"),
    [
        (b"known", b"known, measured"),
        (b"damaged", b", measured"),
        (b"another gpu", b", measured"),
        (None, b", measured"),
    ],
)
def test_timings_that_tensorrt_does_not_take_are_measured_anew(
    tmp_path: Path, known: bytes | None, written: bytes
) -> None:
    plan = tensorrt.Plan("tensorrt", (1, 32, 32), timing_cache=tmp_path / "timings")
    if known is not None:
        (tmp_path / "timings").write_bytes(known)
    with tensorrt._timing_cache(Config(), plan):
        pass
    assert (tmp_path / "timings").read_bytes() == written
