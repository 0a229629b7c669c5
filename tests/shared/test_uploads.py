"""Uploads without HTTP: what is announced, joined, vetted, forgotten, and what survives a race."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import func, select, update

from shared import accounts, retention, uploads
from shared.db import Sessions, transaction
from shared.errors import DigestMismatch, InvalidFile, NotFound, UploadIncomplete, UploadTooLarge
from shared.models import Artifact
from shared.schemas import UploadRequest
from shared.settings import Settings
from shared.storage import Storage

ONNX = b"\x08\x08" + b"\x3a\x02\x12\x00" + b"\x42\x02\x10\x14"  # ir_version 8, an empty graph, opset 20


@pytest.fixture
def account_id(sessions: Sessions) -> UUID:
    return accounts.ensure_account(sessions, "ours")


def test_parts_cover_the_file_exactly() -> None:
    for size_bytes, part_bytes, expected in (
        (10, 4, [(1, 0, 4), (2, 4, 4), (3, 8, 2)]),
        (8, 4, [(1, 0, 4), (2, 4, 4)]),
        (5, 4, [(1, 0, 4), (2, 4, 1)]),
    ):
        artifact = Artifact(status="pending", multipart_id="m", size_bytes=size_bytes)
        assert uploads.parts(artifact, part_bytes) == expected


def test_a_small_file_is_one_part_and_a_ready_one_none() -> None:
    assert uploads.parts(Artifact(status="pending", multipart_id=None, size_bytes=10), 4) == [(1, 0, 10)]
    assert uploads.parts(Artifact(status="ready", multipart_id=None, size_bytes=10), 4) == []


def test_a_key_is_of_the_account_and_the_digest(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    artifact, is_new = uploads.begin(sessions, storage, settings, account_id, _request(ONNX))
    assert is_new
    assert artifact.key == f"incoming/{account_id}/{artifact.id}/{artifact.sha256}"
    assert artifact.expires_at is not None
    assert artifact.expires_at > artifact.created_at


def test_a_file_that_is_too_large_is_refused_before_anything_is_written(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    small = settings.model_copy(update={"max_upload_bytes": len(ONNX) - 1})
    with pytest.raises(UploadTooLarge, match=f"{len(ONNX)} bytes"):
        uploads.begin(sessions, storage, small, account_id, _request(ONNX))
    assert _num_rows(sessions) == 0


def test_the_same_bytes_in_another_format_are_another_upload(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    first, _ = uploads.begin(sessions, storage, settings, account_id, _request(ONNX))
    second, is_new = uploads.begin(sessions, storage, settings, account_id, _request(ONNX, format="zip"))
    assert is_new
    assert second.id != first.id


def test_completing_checks_and_keeps_what_the_header_told(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    artifact = _sent(sessions, storage, settings, account_id)
    done = uploads.complete(sessions, storage, account_id, artifact.id)
    assert (done.status, done.expires_at) == ("ready", None)
    assert done.summary == {"ir_version": 8, "opsets": {"": 20}}
    assert uploads.complete(sessions, storage, account_id, artifact.id).summary == done.summary


def test_only_its_account_finds_or_completes_an_upload(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    artifact = _sent(sessions, storage, settings, account_id)
    stranger = accounts.ensure_account(sessions, "stranger")
    with pytest.raises(NotFound):
        uploads.find(sessions, stranger, artifact.id)
    for account, upload in ((stranger, artifact.id), (account_id, uuid4())):
        with pytest.raises(NotFound):
            uploads.complete(sessions, storage, account, upload)
    assert uploads.find(sessions, account_id, artifact.id).status == "pending"


def test_a_file_of_a_job_is_no_upload(sessions: Sessions, account_id: UUID) -> None:
    row = Artifact(account_id=account_id, role="model", name="m", format="onnx", key="k", sha256="0" * 64, size_bytes=1)
    with transaction(sessions) as session:
        session.add(row)
    with pytest.raises(NotFound):
        uploads.find(sessions, account_id, row.id)


def test_parts_that_were_joined_by_a_call_whose_answer_was_lost_are_not_joined_again(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    in_parts = settings.model_copy(update={"upload_part_bytes": 8})
    artifact, _ = uploads.begin(sessions, storage, in_parts, account_id, _request(ONNX[:8]))
    assert artifact.multipart_id is None
    artifact, _ = uploads.begin(sessions, storage, in_parts, account_id, _request(ONNX))
    assert artifact.multipart_id is not None
    with pytest.raises(UploadIncomplete):
        uploads.complete(sessions, storage, account_id, artifact.id)
    _put(storage.presign_part(artifact.key, artifact.multipart_id, 1), ONNX)
    assert storage.finish_multipart(artifact.key, artifact.multipart_id) == 1
    assert uploads.complete(sessions, storage, account_id, artifact.id).status == "ready"


@pytest.mark.parametrize(
    ("arrived", "error"),
    [(ONNX + b"x", DigestMismatch), (ONNX[:-1], DigestMismatch), (ONNX[:-1] + b"\x15", DigestMismatch)],
    ids=["more", "fewer", "other"],
)
def test_other_bytes_than_announced_are_refused_and_gone(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID, arrived: bytes, error: type[Exception]
) -> None:
    artifact, _ = uploads.begin(sessions, storage, settings, account_id, _request(ONNX))
    storage.put_bytes(arrived, artifact.key)
    with pytest.raises(error):
        uploads.complete(sessions, storage, account_id, artifact.id)
    assert (_num_rows(sessions), list(storage.list_keys())) == (0, [])


def test_a_header_that_names_too_much_is_refused(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_SUMMARY_BYTES", 10)
    artifact = _sent(sessions, storage, settings, account_id)
    with pytest.raises(InvalidFile, match="names more than 10 bytes"):
        uploads.complete(sessions, storage, account_id, artifact.id)
    assert (_num_rows(sessions), list(storage.list_keys())) == (0, [])


def test_an_upload_completed_by_many_at_once_is_ready_once(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    artifact = _sent(sessions, storage, settings, account_id)
    barrier = threading.Barrier(4)

    def complete(_: int) -> str:
        barrier.wait(timeout=10)
        return uploads.complete(sessions, storage, account_id, artifact.id).status

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(complete, range(4))) == {"ready"}
    kept = uploads.find(sessions, account_id, artifact.id)
    assert list(storage.list_keys()) == [kept.key]
    assert storage.digest(kept.key) == (kept.sha256, len(ONNX))


def test_the_url_that_the_bytes_came_by_cannot_change_a_file_that_is_complete(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    artifact = _sent(sessions, storage, settings, account_id)
    kept = uploads.complete(sessions, storage, account_id, artifact.id)
    storage.put_bytes(b"x" * len(ONNX), artifact.key)  # as a late PUT to the presigned URL would
    assert storage.digest(kept.key) == (kept.sha256, len(ONNX))

    at_once = settings.model_copy(update={"presign_seconds": 0})
    assert retention.forget_files(sessions, storage, settings) == 0
    assert retention.forget_files(sessions, storage, at_once) == 1
    assert list(storage.list_keys()) == [kept.key]


def test_bytes_that_are_still_awaited_are_not_late(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    artifact = _sent(sessions, storage, settings, account_id)
    at_once = settings.model_copy(update={"presign_seconds": 0})
    assert retention.forget_files(sessions, storage, at_once) == 0
    assert uploads.complete(sessions, storage, account_id, artifact.id).status == "ready"


@pytest.mark.parametrize("damage", [b"", ONNX[:-1], ONNX[:-1] + b"?"], ids=["gone", "short", "other bytes"])
def test_a_file_that_storage_has_lost_or_damaged_is_sent_again_once(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID, damage: bytes
) -> None:
    kept = uploads.complete(sessions, storage, account_id, _sent(sessions, storage, settings, account_id).id)
    same, is_new = uploads.begin(sessions, storage, settings, account_id, _request(ONNX))
    assert (same.id, is_new) == (kept.id, False)
    if damage:
        storage.put_bytes(damage, kept.key)
    else:
        storage.remove(kept.key)
    again, is_new = uploads.begin(sessions, storage, settings, account_id, _request(ONNX))
    assert (is_new, again.status) == (True, "pending")
    same, is_new = uploads.begin(sessions, storage, settings, account_id, _request(ONNX))
    assert (same.id, is_new) == (again.id, False)
    httpx.put(storage.presign_put(again.key, len(ONNX)), content=ONNX, trust_env=False).raise_for_status()
    mended = uploads.complete(sessions, storage, account_id, again.id)
    same, is_new = uploads.begin(sessions, storage, settings, account_id, _request(ONNX))
    assert (same.id, same.status, is_new) == (mended.id, "ready", False)


def test_forgotten_uploads_are_collected_with_what_had_arrived(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    in_parts = settings.model_copy(update={"upload_part_bytes": 8})
    lapsed = _sent(sessions, storage, settings, account_id)
    with_parts, _ = uploads.begin(sessions, storage, in_parts, account_id, _request(ONNX, format="zip"))
    with transaction(sessions) as session:
        session.execute(update(Artifact).values(expires_at=func.now()))
    ready = _sent(sessions, storage, settings, account_id, ONNX[:-1] + b"\x13")
    kept = uploads.complete(sessions, storage, account_id, ready.id)
    fresh, _ = uploads.begin(sessions, storage, settings, account_id, _request(ONNX[:-1] + b"\x12"))

    assert uploads.forget_expired(sessions, storage) == 2
    assert uploads.forget_expired(sessions, storage) == 0
    with transaction(sessions) as session:
        assert set(session.scalars(select(Artifact.id))) == {ready.id, fresh.id}
    assert list(storage.list_keys()) == [kept.key]
    assert with_parts.multipart_id is not None
    with pytest.raises(NotFound):
        storage.finish_multipart(with_parts.key, with_parts.multipart_id)
    assert lapsed.id != with_parts.id


def test_an_upload_that_was_prolonged_or_is_being_vetted_is_not_forgotten(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = _sent(sessions, storage, settings, account_id)
    with transaction(sessions) as session:
        session.execute(update(Artifact).values(expires_at=func.now()))
    forget, vet = uploads._forget, uploads._vet

    def prolonged(*args: Any) -> bool:
        uploads.begin(sessions, storage, settings, account_id, _request(ONNX))
        return forget(*args)

    monkeypatch.setattr(uploads, "_forget", prolonged)
    assert uploads.forget_expired(sessions, storage) == 0

    def swept(*args: Any) -> dict[str, Any]:
        assert uploads.forget_expired(sessions, storage) == 0
        return vet(*args)

    with transaction(sessions) as session:
        session.execute(update(Artifact).values(expires_at=func.now()))
    monkeypatch.setattr(uploads, "_vet", swept)
    assert uploads.complete(sessions, storage, account_id, artifact.id).status == "ready"


def test_an_upload_that_became_ready_is_not_forgotten(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID
) -> None:
    artifact = _sent(sessions, storage, settings, account_id)
    kept = uploads.complete(sessions, storage, account_id, artifact.id)
    uploads._forget(sessions, storage, artifact)
    assert storage.stat(kept.key).size_bytes == len(ONNX)


def _request(content: bytes, format: str = "onnx") -> UploadRequest:
    sha256 = hashlib.sha256(content).hexdigest()
    facts: dict[str, Any] = {"name": "net.onnx", "format": format, "size_bytes": len(content), "sha256": sha256}
    return UploadRequest.model_validate(facts)


def _sent(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID, content: bytes = ONNX
) -> Artifact:
    """A pending upload whose bytes have arrived."""
    artifact, _ = uploads.begin(sessions, storage, settings, account_id, _request(content))
    _put(storage.presign_put(artifact.key, len(content)), content)
    return artifact


def _put(url: str, content: bytes) -> None:
    httpx.put(url, content=content, trust_env=False).raise_for_status()


def _num_rows(sessions: Sessions) -> int:
    with transaction(sessions) as session:
        return session.scalar(select(func.count()).select_from(Artifact)) or 0
