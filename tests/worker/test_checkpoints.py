"""A long stage that is interrupted: the next attempt goes on after its last whole epoch, through the real road."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from shared import checkpoints, lifecycle
from shared.ledger import Claim, Reason
from shared.report import Report
from tests.worker.workshop import UNET, Workshop, children, kill_in_epoch, num_kept, wait_until
from worker import wire
from worker.custody import MAX_CHECKPOINTS, Custody, Forged
from worker.memory import Memory

STUDENT = {"library": "monai", "name": "BasicUNet", "arguments": {**UNET, "features": [8, 8, 8, 8, 16, 8]}}
EPOCHS = 10


def distill(epochs: int = EPOCHS, batch: int = 6) -> list[dict[str, Any]]:
    training = {"epochs": epochs, "batch": batch, "learning_rate": 0.01, "augmentation": {"flips": ["horizontal"]}}
    taught = {"soft_targets": {"temperature": 4, "alpha": 0.7, "teacher": "always"}, "training": training}
    return [{"kind": "distill", "student": STUDENT, **taught, "on_miss": "continue"}]


def epoch_of(message: str | None) -> int:
    words = (message or "").split()
    return int(words[1]) if words[:1] == ["epoch"] else 0


def stored_checkpoints(workshop: Workshop) -> list[str]:
    return [key for key in workshop.storage.list_keys() if "/kept/" in key]


def details(workshop: Workshop, job_id: UUID) -> dict[str, Any]:
    return Report.model_validate(workshop.job(job_id).report).stages[0].details


def test_a_child_killed_in_mid_training_goes_on_from_its_last_epoch(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workshop.submit(stages=[*distill(), {"kind": "export_onnx"}])
    kill_in_epoch(workshop, job_id, 7, monkeypatch)
    assert [artifact.name for artifact in checkpoints.of_job(workshop.sessions, job_id)] == ["0-training.checkpoint"]
    _, thread = workshop.start()
    workshop.wait_for_event(job_id, "stage_finished", stage=0)

    def roles() -> list[str]:
        return [artifact.role for artifact in workshop.artifacts(job_id) if artifact.stage_position == 0]

    wait_until(lambda: roles() == ["model"], "its checkpoint to be forgotten")  # after the event, in its own time
    for child in children(job_id):  # once more: the finished stage is taken up by the third attempt
        child.kill()
    thread.join(timeout=60)
    if workshop.job(job_id).status == "queued":
        assert workshop.work() == "succeeded"

    report = Report.model_validate(workshop.job(job_id).report)
    assert [stage.status for stage in report.stages] == ["succeeded", "succeeded"]
    found = details(workshop, job_id)
    assert (found["resumed_after"], found["epochs_run"]) == (6, EPOCHS)  # only the epoch that was cut is repeated
    assert (found["architecture"], found["pruned"]) == (STUDENT, False)
    assert [epoch["number"] for epoch in found["history"]] == list(range(1, EPOCHS + 1))
    assert stored_checkpoints(workshop) == []


def test_a_long_training_tells_its_epochs_and_leaves_nothing_when_it_is_cancelled(workshop: Workshop) -> None:
    [stage] = distill(epochs=1000)
    stage["training"]["validation_ratio"] = 0.2
    job_id = workshop.submit(stages=[stage])
    _, thread = workshop.start()

    def told() -> str | None:
        message = workshop.stages(job_id)[0].message
        return message if epoch_of(message) >= 2 else None

    message = wait_until(told, "the second epoch's message", timeout_seconds=120)
    assert "of 1000, loss" in message
    assert "dice" in message
    assert stored_checkpoints(workshop) != []
    lifecycle.cancel(workshop.sessions, workshop.account_id, job_id)
    thread.join(timeout=30)
    assert workshop.job(job_id).status == "cancelled"
    assert stored_checkpoints(workshop) == []


def test_a_worker_that_is_told_to_stop_gives_the_job_back_after_the_epoch(workshop: Workshop) -> None:
    job_id = workshop.submit(stages=distill(epochs=1000))
    _, thread = workshop.start()
    wait_until(lambda: num_kept(workshop, job_id) >= 1, "a checkpoint", timeout_seconds=120)
    workshop.draining.set()
    thread.join(timeout=60)
    job = workshop.job(job_id)
    assert (job.status, job.attempt, job.max_attempts) == ("queued", 1, 4)
    reported = epoch_of(workshop.stages(job_id)[0].message)
    assert num_kept(workshop, job_id) >= max(reported, 1)  # it may have been at its first save when it had to stop


# ---------------------------------------------------------------- custody


def keep(workshop: Workshop, directory: Path) -> Claim:
    """A claimed job whose first stage runs and has kept one checkpoint."""
    workshop.submit(stages=distill())
    claim = workshop.claim()
    lifecycle.start_stage(workshop.sessions, claim.lease, 0)
    (directory / "file").write_bytes(b"epoch 1")
    stored = custody_of(workshop, claim, directory).store_checkpoint(
        wire.Checkpointed(position=0, name="training", path=Path("file"))
    )
    checkpoints.keep(workshop.sessions, claim.lease, 0, stored)
    return claim


def custody_of(workshop: Workshop, claim: Claim, directory: Path) -> Custody:
    return Custody(claim, workshop.storage, workshop.sessions, directory)


def fetch_again(workshop: Workshop, claim: Claim, directory: Path) -> wire.Ticket:
    lifecycle.requeue(workshop.sessions, claim.lease, Reason("worker_lost", "gone"), cause="lost")
    return custody_of(workshop, workshop.claim(), directory).fetch(1, interrupted=lambda: False)


def test_the_next_attempts_ticket_brings_the_checkpoint(workshop: Workshop, tmp_path: Path) -> None:
    claim = keep(workshop, tmp_path)
    [found] = fetch_again(workshop, claim, tmp_path).checkpoints
    assert (found.position, found.name) == (0, "training")
    assert (tmp_path / found.path).read_bytes() == b"epoch 1"
    memory = Memory(0, Mouth(), [found])
    assert memory.load("training") == found.path
    assert memory.load("another") is None
    assert Memory(1, Mouth(), [found]).load("training") is None
    checkpoints.forget_stale(workshop.sessions, workshop.storage)


def test_what_was_just_saved_is_what_is_loaded(tmp_path: Path) -> None:
    mouth = Mouth()
    memory = Memory(3, mouth, [])
    memory.save("training", tmp_path / "file")
    assert memory.load("training") == tmp_path / "file"
    assert mouth.said == [wire.Checkpointed(position=3, name="training", path=tmp_path / "file")]


class Mouth(wire.Mouth):
    """One whose every word is taken as committed."""

    def __init__(self) -> None:
        self.said: list[wire.Said] = []

    def ask(self, said: wire.Said) -> dict[str, Any]:
        self.said.append(said)
        return {}


@pytest.mark.parametrize("damage", ["gone", "other bytes"])
def test_a_damaged_checkpoint_costs_time_and_not_the_job(workshop: Workshop, tmp_path: Path, damage: str) -> None:
    claim = keep(workshop, tmp_path)
    [kept] = checkpoints.of_job(workshop.sessions, claim.lease.job_id)
    workshop.storage.remove(kept.key)
    if damage == "other bytes":
        workshop.storage.put_bytes(b"epoch 2", kept.key)
    assert fetch_again(workshop, claim, tmp_path).checkpoints == []
    workshop.storage.remove(kept.key)


# ---------------------------------------------------------------- a child that lies


def test_a_checkpoint_outside_of_the_jobs_directory_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    workshop.submit(stages=distill())
    custody = Custody(workshop.claim(), workshop.storage, workshop.sessions, tmp_path / "job")
    (tmp_path / "job").mkdir()
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(Forged, match="not a plain file of the job's directory"):
        custody.store_checkpoint(wire.Checkpointed(position=0, name="training", path=Path("../secret")))


def test_a_child_that_keeps_more_and_more_names_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    workshop.submit(stages=distill())
    custody = Custody(workshop.claim(), workshop.storage, workshop.sessions, tmp_path)
    (tmp_path / "file").write_bytes(b"epoch")
    for number in range(MAX_CHECKPOINTS):
        custody.store_checkpoint(wire.Checkpointed(position=0, name=f"training-{number}", path=Path("file")))
    with pytest.raises(Forged, match="keeps more than 100 checkpoints"):
        custody.store_checkpoint(wire.Checkpointed(position=0, name="one-more", path=Path("file")))
    for key in stored_checkpoints(workshop):
        workshop.storage.remove(key)


def test_a_checkpoint_of_a_stage_that_does_not_run_ends_the_job(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workshop.submit(stages=distill(epochs=2))
    parse = wire.parse

    def forge(line: bytes) -> wire.Said:
        said = parse(line)
        return said.model_copy(update={"position": 5}) if isinstance(said, wire.Checkpointed) else said

    monkeypatch.setattr(wire, "parse", forge)
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert reason["code"] == "protocol_broken"


@pytest.mark.parametrize("name", ["../up", "", "a/b", ".hidden", "x" * 61])
def test_a_name_is_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        wire.Checkpointed(position=0, name=name, path=Path("file"))
