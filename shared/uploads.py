"""Uploads: a file is announced, its bytes go straight to object storage, and it is vetted before anything uses it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, delete, func, insert, select, update
from uuid6 import uuid7

from shared.db import Sessions, transaction
from shared.errors import (
    DigestMismatch,
    InvalidFile,
    NotFound,
    StorageQuotaReached,
    UploadIncomplete,
    UploadTooLarge,
    UserError,
)
from shared.formats import inspect_file
from shared.models import Artifact
from shared.quotas import demand_bytes
from shared.schemas import UploadRequest
from shared.settings import Settings
from shared.storable import why_not_storable
from shared.storage import Storage

ROLE = "upload"
INCOMING, KEPT = "incoming", "uploads"  # where bytes arrive, by a URL that stays valid for a while; where they are kept
VETTING = timedelta(hours=1)  # to copy and read a large file
MAX_SUMMARY_BYTES = 8 * 2**20


def begin(
    sessions: Sessions, storage: Storage, settings: Settings, account_id: UUID, request: UploadRequest
) -> tuple[Artifact, bool]:
    """Announce a file; returns its artifact, and whether it is new.

    The account's own artifact of the same digest, size and format is returned if there is one: ready and still what it
    was, then nothing is to be sent, or still pending, then its upload goes on.

    Raises:
        UploadTooLarge: the file is larger than the service accepts.
        StorageQuotaReached: the account's uploads have no room for it.
    """
    if request.size_bytes > settings.max_upload_bytes:
        raise UploadTooLarge(
            f"the file has {request.size_bytes} bytes; at most {settings.max_upload_bytes} are accepted"
        )
    lifetime = timedelta(seconds=settings.presign_seconds)
    for found in _same(sessions, account_id, request):
        if found.status == "ready" and storage.holds(found):
            return found, False
        if found.status == "pending" and (prolonged := _prolong(sessions, found, lifetime)):
            return prolonged, False
    artifact_id = uuid7()
    key = f"{INCOMING}/{account_id}/{artifact_id}/{request.sha256}"
    multipart_id = storage.start_multipart(key) if request.size_bytes > settings.upload_part_bytes else None
    facts = {**request.model_dump(), "id": artifact_id, "account_id": account_id, "role": ROLE, "key": key}
    try:
        with transaction(sessions) as session:
            demand_bytes(session, account_id, request.size_bytes, settings.max_stored_bytes_per_account)
            values = {**facts, "multipart_id": multipart_id, "expires_at": func.now() + lifetime}
            return session.scalars(insert(Artifact).values(values).returning(Artifact)).one(), True
    except StorageQuotaReached:
        if multipart_id is not None:
            storage.abort_multipart(key, multipart_id)
        raise


def find(sessions: Sessions, account_id: UUID, artifact_id: UUID) -> Artifact:
    """An upload of the account; NotFound if it has no such upload."""
    with transaction(sessions) as session:
        found = session.scalar(select(Artifact).where(*_mine(account_id, artifact_id)))
    if found is None:
        raise NotFound(f"there is no upload {artifact_id}")
    return found


def complete(sessions: Sessions, storage: Storage, account_id: UUID, artifact_id: UUID) -> Artifact:
    """Check that an upload's bytes are the announced ones and safe, and make it ready; once more is no error.

    A file that is refused leaves nothing behind: its object and its row are gone.

    Raises:
        NotFound: the account has no such upload.
        UploadIncomplete: its bytes have not arrived, or not all of them.
        DigestMismatch, UnsafeFormat, InvalidFile: the file is refused.
    """
    artifact = find(sessions, account_id, artifact_id)
    if artifact.status == "ready":
        return artifact
    _prolong(sessions, artifact, VETTING)
    # A key of this call's own: the URL that the bytes came by, and another call like this, cannot write to it.
    key = f"{KEPT}/{account_id}/{artifact_id}/{uuid7().hex}/{artifact.sha256}"
    try:
        _join_parts(storage, artifact)
        facts = _vet(storage, artifact, key)
    except UploadIncomplete:
        artifact = find(sessions, account_id, artifact_id)
        if artifact.status == "ready":  # another call was faster
            return artifact
        raise
    except UserError:
        storage.remove(key)
        _forget(sessions, storage, artifact)
        raise
    with transaction(sessions) as session:
        ready = {**facts, "status": "ready", "key": key, "multipart_id": None, "expires_at": None}
        made_ready = update(Artifact).where(*_mine(account_id, artifact_id), _PENDING).values(ready)
        won = session.scalar(made_ready.returning(Artifact.id)) is not None
    storage.remove(artifact.key if won else key)
    return find(sessions, account_id, artifact_id)


def parts(artifact: Artifact, part_bytes: int) -> list[tuple[int, int, int]]:
    """Number (from 1), offset and size of every part that an upload is sent in; none once it is ready."""
    if artifact.status == "ready":
        return []
    if artifact.multipart_id is None:
        return [(1, 0, artifact.size_bytes)]
    offsets = range(0, artifact.size_bytes, part_bytes)
    return [(n, offset, min(part_bytes, artifact.size_bytes - offset)) for n, offset in enumerate(offsets, 1)]


def forget_expired(sessions: Sessions, storage: Storage, limit: int = 100) -> int:
    """Drop uploads that were announced and never completed, with what had arrived of them; returns how many."""
    lapsed = [Artifact.role == ROLE, _PENDING, Artifact.expires_at < func.now()]
    with transaction(sessions) as session:
        due = session.scalars(select(Artifact).where(*lapsed).order_by(Artifact.expires_at).limit(limit)).all()
    return sum(_forget(sessions, storage, artifact, *lapsed) for artifact in due)


_PENDING = Artifact.status == "pending"


def _same(sessions: Sessions, account_id: UUID, request: UploadRequest) -> Sequence[Artifact]:
    """The account's artifacts of these very bytes, the ready ones first and of those the newest."""
    same = [Artifact.account_id == account_id, Artifact.role == ROLE, Artifact.sha256 == request.sha256]
    same += [Artifact.size_bytes == request.size_bytes, Artifact.format == request.format]
    with transaction(sessions) as session:
        order = ((Artifact.status == "ready").desc(), Artifact.id.desc())
        return session.scalars(select(Artifact).where(*same).order_by(*order)).all()


def _prolong(sessions: Sessions, artifact: Artifact, lifetime: timedelta) -> Artifact | None:
    """A pending upload with at least so much time left; None if it is pending no longer."""
    until = func.greatest(Artifact.expires_at, func.now() + lifetime)
    prolonged = update(Artifact).where(Artifact.id == artifact.id, _PENDING).values(expires_at=until)
    with transaction(sessions) as session:
        return session.scalar(prolonged.returning(Artifact))


def _mine(account_id: UUID, artifact_id: UUID) -> list[ColumnElement[bool]]:
    return [Artifact.id == artifact_id, Artifact.account_id == account_id, Artifact.role == ROLE]


def _join_parts(storage: Storage, artifact: Artifact) -> None:
    if artifact.multipart_id is None:
        return
    try:
        joined = storage.finish_multipart(artifact.key, artifact.multipart_id)
    except NotFound:  # joined by an earlier call whose answer was lost
        return
    if joined == 0:
        raise UploadIncomplete("no part of the file has arrived", hint="PUT every part, then complete again.")


def _vet(storage: Storage, artifact: Artifact, key: str) -> dict[str, Any]:
    """Copy what arrived to `key`; what is to be recorded of it once its bytes are known to be the announced ones."""
    try:
        arrived_bytes = storage.stat(artifact.key).size_bytes
        if arrived_bytes != artifact.size_bytes:
            raise DigestMismatch(
                f"{arrived_bytes} bytes arrived of the {artifact.size_bytes} that were announced",
                hint="Announce the file again and send all of it.",
            )
        storage.copy(artifact.key, key)
    except NotFound:
        raise UploadIncomplete("the file has not arrived", hint="PUT its bytes, then complete again.") from None
    etag = storage.stat(key).etag
    sha256, size_bytes = storage.digest(key)
    if sha256 != artifact.sha256:  # once more: the network may have done it
        sha256, size_bytes = storage.digest(key)
    if sha256 != artifact.sha256:
        raise DigestMismatch(f"the bytes that arrived have sha256 {sha256}; announced was {artifact.sha256}")
    with storage.open(key) as file:
        summary = inspect_file(file, size_bytes, artifact.format)
    if (reason := why_not_storable(summary)) is not None:
        raise InvalidFile(f"In the file's header, {reason}.")
    if len(json.dumps(summary)) > MAX_SUMMARY_BYTES:
        raise InvalidFile(f"The file's header names more than {MAX_SUMMARY_BYTES} bytes of tensors or images.")
    return {"summary": summary, "etag": etag}


def _forget(sessions: Sessions, storage: Storage, artifact: Artifact, *where: ColumnElement[bool]) -> bool:
    """Take back an upload that is pending still: first the row, so that nobody finds it, then what had arrived."""
    with transaction(sessions) as session:
        taken = delete(Artifact).where(Artifact.id == artifact.id, _PENDING, *where)
        if session.scalar(taken.returning(Artifact.id)) is None:
            return False
    if artifact.multipart_id is not None:
        storage.abort_multipart(artifact.key, artifact.multipart_id)
    storage.remove(artifact.key)
    return True
