"""Checkpoints: one a name, fenced, invisible to the job's owner, and gone once nobody will go on from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select

from shared import browse, checkpoints, lifecycle
from shared.accounts import ensure_account
from shared.db import Sessions, transaction
from shared.errors import Conflict, LeaseLost, NotFound
from shared.ledger import Capacity, Claim, Lease, Order, Reason, Stored
from shared.models import Artifact
from shared.recipe import Recipe
from shared.storage import Storage

RECIPE = {
    "source": {"architecture": {"library": "torchvision", "name": "resnet18"}, "weights": str(uuid4())},
    "task": {"kind": "classification", "classes": ["no", "yes"]},
    "data": {"artifact": str(uuid4())},
    "stages": [{"kind": "distill", "width": 0.5}, {"kind": "export_onnx"}],
}
STALE = Reason("worker_lost", "The worker that ran the job stopped answering.")


@pytest.fixture
def claim(sessions: Sessions) -> Claim:
    """A job whose first stage runs."""
    account_id = ensure_account(sessions, "hospital")
    lifecycle.submit(sessions, Order(account_id, "job", Recipe.model_validate(RECIPE), timeout_seconds=60.0))
    found = claim_again(sessions)
    lifecycle.start_stage(sessions, found.lease, 0)
    return found


def claim_again(sessions: Sessions) -> Claim:
    capabilities = Recipe.model_validate(RECIPE).requirements()
    found = lifecycle.claim(sessions, Capacity("worker", ["default"], capabilities, 2**40), 60.0)
    assert found is not None
    return found


@pytest.fixture
def put(storage: Storage, tmp_path: Path) -> Iterator[object]:
    numbers = iter(range(100))

    def upload(content: bytes, name: str = "0-training.checkpoint") -> Stored:
        path = tmp_path / "file"
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        key = f"kept/{next(numbers)}/{sha256}/{name}"
        storage.put(path, key)
        return Stored(checkpoints.ROLE, name, "safetensors", key, sha256, len(content))

    yield upload
    for key in list(storage.list_keys("kept/")):
        storage.remove(key)


def names(sessions: Sessions, job_id: UUID) -> list[str]:
    return [found.name for found in checkpoints.of_job(sessions, job_id)]


def keys(storage: Storage) -> list[str]:
    return list(storage.list_keys("kept/"))


def test_the_newest_checkpoint_of_a_name_is_the_one_that_is_found(
    sessions: Sessions, storage: Storage, claim: Claim, put: object
) -> None:
    assert callable(put)
    job_id = claim.lease.job_id
    for content in (b"epoch 1", b"epoch 2", b"epoch 3"):
        checkpoints.keep(sessions, claim.lease, 0, put(content))
    checkpoints.keep(sessions, claim.lease, 0, put(b"another", "0-second.checkpoint"))
    assert names(sessions, job_id) == ["0-second.checkpoint", "0-training.checkpoint"]
    newest = checkpoints.of_job(sessions, job_id)[1]
    assert (newest.sha256, newest.attempt) == (hashlib.sha256(b"epoch 3").hexdigest(), 1)
    assert checkpoints.forget_stale(sessions, storage, job_id) == 2
    assert len(keys(storage)) == 2
    assert checkpoints.forget_stale(sessions, storage) == 0


def test_a_later_attempt_finds_what_an_earlier_one_kept(sessions: Sessions, claim: Claim, put: object) -> None:
    assert callable(put)
    checkpoints.keep(sessions, claim.lease, 0, put(b"epoch 1"))
    lifecycle.requeue(sessions, claim.lease, STALE, cause="lost")
    assert claim_again(sessions).attempt == 2
    assert names(sessions, claim.lease.job_id) == ["0-training.checkpoint"]


def test_a_replaced_worker_keeps_nothing(sessions: Sessions, claim: Claim, put: object) -> None:
    assert callable(put)
    lifecycle.requeue(sessions, claim.lease, STALE, cause="lost")
    with pytest.raises(LeaseLost):
        checkpoints.keep(sessions, claim.lease, 0, put(b"late"))
    again = claim_again(sessions)
    with pytest.raises(LeaseLost):
        checkpoints.keep(sessions, claim.lease, 0, put(b"late"))
    with pytest.raises(LeaseLost):
        checkpoints.keep(sessions, Lease(again.lease.job_id, uuid4()), 0, put(b"forged"))
    assert names(sessions, claim.lease.job_id) == []


def test_only_a_running_stage_keeps_checkpoints(sessions: Sessions, claim: Claim, put: object) -> None:
    assert callable(put)
    for position in (1, 7):
        with pytest.raises(Conflict, match=f"stage {position} does not run"):
            checkpoints.keep(sessions, claim.lease, position, put(b"x", f"{position}-training.checkpoint"))


def test_a_finished_stages_checkpoints_are_stale(
    sessions: Sessions, storage: Storage, claim: Claim, put: object
) -> None:
    assert callable(put)
    checkpoints.keep(sessions, claim.lease, 0, put(b"epoch 1"))
    assert checkpoints.forget_stale(sessions, storage) == 0
    lifecycle.finish_stage(sessions, claim.lease, 0, "succeeded", {}, [])
    assert names(sessions, claim.lease.job_id) == []
    assert checkpoints.forget_stale(sessions, storage) == 1
    assert keys(storage) == []


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_an_ended_jobs_checkpoints_are_stale(
    sessions: Sessions, storage: Storage, claim: Claim, put: object, status: str
) -> None:
    assert callable(put)
    checkpoints.keep(sessions, claim.lease, 0, put(b"epoch 1"))
    lifecycle.settle(sessions, claim.lease, "failed" if status == "failed" else "cancelled", STALE)
    assert checkpoints.forget_stale(sessions, storage) == 1
    assert keys(storage) == []
    with transaction(sessions) as session:
        assert session.scalars(select(Artifact)).all() == []


def test_forgetting_that_was_interrupted_is_finished_by_the_next(
    sessions: Sessions, storage: Storage, claim: Claim, put: object
) -> None:
    assert callable(put)
    checkpoints.keep(sessions, claim.lease, 0, put(b"epoch 1"))
    lifecycle.settle(sessions, claim.lease, "failed", STALE)
    storage.remove(keys(storage)[0])  # the object went, and the worker with it
    assert checkpoints.forget_stale(sessions, storage) == 1
    assert checkpoints.forget_stale(sessions, storage) == 0


def test_the_jobs_owner_does_not_see_checkpoints(sessions: Sessions, claim: Claim, put: object) -> None:
    assert callable(put)
    checkpoints.keep(sessions, claim.lease, 0, put(b"epoch 1"))
    job_id = claim.lease.job_id
    assert list(browse.artifacts(sessions, claim.account_id, job_id)) == []
    with pytest.raises(NotFound):
        browse.artifact(sessions, claim.account_id, job_id, "0-training.checkpoint")
