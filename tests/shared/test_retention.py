"""Retention: what nobody keeps goes, what a row points to or may yet point to stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from uuid import UUID

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from shared import browse, lifecycle, retention, uploads
from shared.db import Sessions, transaction
from shared.errors import LeaseLost, NotFound
from shared.ledger import Claim, Reason, Stored
from shared.schemas import UploadRequest
from shared.settings import Settings
from shared.storage import Storage
from tests.audit import audit, orphans
from tests.shared.ledger_desk import account, at_once, claim, due, execute, job, lapse, order, submit

LOST = Reason("worker_lost", "The worker that ran the job stopped answering.")
NOTHING = retention.Collected(jobs=0, uploads=0, files=0, unfinished_transfers=0)


@pytest.fixture(autouse=True)
def _the_laws_hold_and_the_bucket_is_left_empty(sessions: Sessions, storage: Storage) -> Iterator[None]:
    yield
    assert audit(sessions, storage) == []
    for key in list(storage.list_keys()):
        storage.remove(key)


@pytest.fixture
def impatient(settings: Settings) -> Settings:
    """Settings by which a file's time of grace is over at once."""
    return settings.model_copy(update={"orphan_grace_seconds": 0.0, "presign_seconds": 0})


def put(storage: Storage, held: Claim, name: str) -> Stored:
    """A file as an attempt's worker stores it."""
    content = f"{name} of {held.lease.job_id}".encode()
    sha256 = hashlib.sha256(content).hexdigest()
    key = f"accounts/{held.account_id}/jobs/{held.lease.job_id}/{held.attempt}/0/{sha256}/{name}"
    etag = storage.put_bytes(content, key)
    return Stored("model", name, "onnx", key, sha256, len(content), etag)


def ended(sessions: Sessions, storage: Storage, account_id: UUID | None = None, key: str | None = None) -> UUID:
    """A job that succeeded, with a file of a stage and one of its own."""
    lifecycle.submit(sessions, order(account_id or account(sessions)), key)
    held = claim(sessions)
    lifecycle.start_stage(sessions, held.lease, 0)
    lifecycle.finish_stage(sessions, held.lease, 0, "succeeded", {}, [put(storage, held, "0-model.onnx")])
    lifecycle.settle(sessions, held.lease, "succeeded", None, {"verdict": "met"}, [put(storage, held, "report.json")])
    return held.lease.job_id


# ---------------------------------------------------------------- files that nothing points to


def test_a_file_is_not_collected_between_its_upload_and_its_commit(
    sessions: Sessions, storage: Storage, impatient: Settings
) -> None:
    submit(sessions)
    held = claim(sessions)
    lifecycle.start_stage(sessions, held.lease, 0)
    stored = put(storage, held, "0-model.onnx")
    assert retention.collect(sessions, storage, impatient) == NOTHING

    lifecycle.finish_stage(sessions, held.lease, 0, "succeeded", {}, [stored])
    assert retention.collect(sessions, storage, impatient) == NOTHING
    assert storage.holds(stored)


def test_what_an_attempt_left_is_collected_once_it_cannot_commit_any_more(
    sessions: Sessions, storage: Storage, impatient: Settings
) -> None:
    job_id = submit(sessions)
    older = claim(sessions)
    stored = put(storage, older, "0-model.onnx")
    lapse(sessions, job_id)
    assert lifecycle.sweep_leases(sessions) == 1
    due(sessions, job_id)
    newer = claim(sessions)
    kept = put(storage, newer, "0-model.onnx")

    assert retention.collect(sessions, storage, impatient).files == 1
    assert list(storage.list_keys()) == [kept.key]
    with pytest.raises(LeaseLost):  # so the row that would point to it never comes
        lifecycle.finish_stage(sessions, older.lease, 0, "succeeded", {}, [stored])


@pytest.mark.fault(39, "an older attempt uploads after success")
def test_what_an_older_attempt_stores_after_the_jobs_success_changes_nothing_and_is_collected(
    sessions: Sessions, storage: Storage, impatient: Settings
) -> None:
    job_id = submit(sessions)
    older = claim(sessions)
    lapse(sessions, job_id)
    lifecycle.sweep_leases(sessions)
    due(sessions, job_id)
    newer = claim(sessions)
    lifecycle.start_stage(sessions, newer.lease, 0)
    pointed_to = put(storage, newer, "0-model.onnx")
    lifecycle.finish_stage(sessions, newer.lease, 0, "succeeded", {}, [pointed_to])
    lifecycle.settle(sessions, newer.lease, "succeeded", None, {"verdict": "met"})

    late = put(storage, older, "0-model.onnx")
    with pytest.raises(LeaseLost):
        lifecycle.finish_stage(sessions, older.lease, 0, "succeeded", {}, [late])
    assert browse.artifact(sessions, older.account_id, job_id, "0-model.onnx").key == pointed_to.key
    assert orphans(sessions, storage) == {late.key}
    assert retention.collect(sessions, storage, impatient).files == 1
    assert list(storage.list_keys()) == [pointed_to.key]


def test_a_young_file_is_left_and_so_is_what_is_not_the_services(
    sessions: Sessions, storage: Storage, settings: Settings, impatient: Settings
) -> None:
    job_id = submit(sessions)
    held = claim(sessions)
    stored = put(storage, held, "0-model.onnx")
    lifecycle.settle(sessions, held.lease, "failed", LOST)
    storage.put_bytes(b"of somebody else", "elsewhere/file")
    assert retention.collect(sessions, storage, settings) == NOTHING
    assert retention.collect(sessions, storage, impatient).files == 1
    assert not storage.holds(stored)
    assert list(storage.list_keys()) == ["elsewhere/file"]
    assert job(sessions, job_id).status == "failed"


def test_a_dry_run_counts_what_a_run_removes(sessions: Sessions, storage: Storage, impatient: Settings) -> None:
    asked = impatient.model_copy(update={"job_retention_days": 1.0})
    old = ended(sessions, storage)
    submit(sessions)
    held = claim(sessions)
    put(storage, held, "0-model.onnx")
    lifecycle.settle(sessions, held.lease, "failed", LOST)
    request = UploadRequest(name="a.onnx", format="onnx", size_bytes=3, sha256="0" * 64)
    uploads.begin(sessions, storage, impatient, account(sessions), request)
    transfer = f"accounts/{account(sessions)}/jobs/{held.lease.job_id}/1/0/x/y"
    storage.start_multipart(transfer)
    age(sessions, old, days=2)

    before = sorted(storage.list_keys())
    told = retention.collect(sessions, storage, asked, dry_run=True)
    assert told == retention.Collected(jobs=1, uploads=1, files=1, unfinished_transfers=1)
    assert sorted(storage.list_keys()) == before
    assert retention.collect(sessions, storage, asked) == told
    assert retention.collect(sessions, storage, asked) == NOTHING
    assert list(storage.list_keys()) == []


def age(sessions: Sessions, job_id: UUID, days: int) -> None:
    """Have a job ended so long ago, behind the ledger's back."""
    with transaction(sessions) as session:
        session.execute(text("SET LOCAL session_replication_role = replica"))
        aged = "UPDATE jobs SET finished_at = now() - make_interval(days => :days) WHERE id = :id"
        session.execute(text(aged), {"days": days, "id": job_id})


# ---------------------------------------------------------------- jobs


def test_jobs_are_kept_for_ever_unless_it_is_said_for_how_long(
    sessions: Sessions, storage: Storage, impatient: Settings
) -> None:
    job_id = ended(sessions, storage)
    age(sessions, job_id, days=4000)
    for days in (None, 0.0):
        asked = impatient.model_copy(update={"job_retention_days": days})
        assert retention.collect(sessions, storage, asked) == NOTHING
    assert job(sessions, job_id).status == "succeeded"


def test_a_job_past_its_retention_leaves_with_its_files_and_nothing_else_does(
    sessions: Sessions, storage: Storage, settings: Settings
) -> None:
    old, young = ended(sessions, storage), ended(sessions, storage)
    waiting = submit(sessions)
    running = claim(sessions).lease.job_id
    assert running == waiting
    age(sessions, old, days=31)
    age(sessions, young, days=29)

    assert retention.collect(sessions, storage, settings.model_copy(update={"job_retention_days": 30.0})).jobs == 1
    with pytest.raises(NotFound):
        browse.job(sessions, account(sessions), old)
    assert job(sessions, young).status == "succeeded"
    assert job(sessions, running).status == "running"
    assert not [key for key in storage.list_keys() if str(old) in key]
    assert len([key for key in storage.list_keys() if str(young) in key]) == 2


def test_the_key_of_a_job_that_was_forgotten_makes_a_new_one(sessions: Sessions, storage: Storage) -> None:
    old = ended(sessions, storage, key="monday")
    assert lifecycle.submit(sessions, order(account(sessions)), "monday") == (old, False)
    age(sessions, old, days=2)
    assert retention.forget_jobs(sessions, storage, days=1) == 1
    new_id, is_new = lifecycle.submit(sessions, order(account(sessions)), "monday")
    assert is_new
    assert new_id != old


def test_collectors_side_by_side_remove_each_job_once(sessions: Sessions, storage: Storage) -> None:
    for _ in range(6):
        age(sessions, ended(sessions, storage), days=2)
    counts = at_once(*[lambda: retention.forget_jobs(sessions, storage, days=1)] * 3)
    assert sum(counts) == 6
    assert list(storage.list_keys()) == []


def test_files_of_a_job_whose_removal_was_interrupted_are_found_again(
    sessions: Sessions, storage: Storage, impatient: Settings
) -> None:
    job_id = ended(sessions, storage)
    execute(sessions, "DELETE FROM jobs WHERE id = :id", id=job_id)  # and there the collector died
    assert len(list(storage.list_keys())) == 2
    assert retention.collect(sessions, storage, impatient).files == 2
    assert list(storage.list_keys()) == []


# ---------------------------------------------------------------- uploads and transfers


def test_a_transfer_in_parts_goes_on_while_its_attempt_runs_or_its_upload_waits(
    sessions: Sessions, storage: Storage, impatient: Settings
) -> None:
    in_parts = impatient.model_copy(update={"upload_part_bytes": 1, "presign_seconds": 3600})
    request = UploadRequest(name="a.onnx", format="onnx", size_bytes=3, sha256="0" * 64)
    awaited, _new = uploads.begin(sessions, storage, in_parts, account(sessions), request)
    submit(sessions)
    held = claim(sessions)
    key = f"accounts/{held.account_id}/jobs/{held.lease.job_id}/{held.attempt}/0/x/y"
    storage.start_multipart(key)
    assert retention.collect(sessions, storage, impatient) == NOTHING

    lifecycle.settle(sessions, held.lease, "failed", LOST)
    assert retention.collect(sessions, storage, impatient).unfinished_transfers == 1
    assert [found for _id, found in storage.list_multiparts()] == [awaited.key]
    assert awaited.multipart_id is not None
    storage.abort_multipart(awaited.key, awaited.multipart_id)


def test_a_grace_shorter_than_a_lease_or_an_uploads_url_is_refused(settings: Settings) -> None:
    given = settings.model_dump()
    with pytest.raises(ValidationError, match="BURNISH_ORPHAN_GRACE_SECONDS"):
        Settings(**{**given, "orphan_grace_seconds": given["presign_seconds"] - 1})


# ---------------------------------------------------------------- rows that point to nothing


def test_rows_whose_file_is_gone_or_short_are_told(sessions: Sessions, storage: Storage) -> None:
    ended(sessions, storage)
    foreign = ended(sessions, storage, account(sessions, "another"))
    assert list(retention.missing_files(sessions, storage)) == []
    [model] = [key for key in storage.list_keys() if str(foreign) in key and key.endswith(".onnx")]
    content = b"".join(storage.chunks(model))
    storage.put_bytes(content[:-1], model)
    assert list(retention.missing_files(sessions, storage)) == [model]
    assert list(retention.missing_files(sessions, storage, account(sessions))) == []
    storage.put_bytes(content, model)
