"""Sends a file's bytes straight to object storage: hashed first, sent once, each part tried again when it breaks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx

from burnish.connection import TRIES, Connection, describe, pause
from burnish.errors import BadInput, Unreachable
from shared.schemas import Upload, UploadFormat, UploadPart

CHUNK_BYTES = 2**18
COMPLETING_BYTES_PER_SECOND = 10e6  # the service reads the whole file once more before it answers

# Called with the file, what is being done to it, and the bytes done so far and in all.
OnBytes = Callable[[Path, Literal["hashing", "sending"], int, int], None]


def upload_file(connection: Connection, path: Path, format: UploadFormat, on_bytes: OnBytes | None = None) -> Upload:
    """Upload a file, unless the account has this very file already; returns the completed upload.

    Raises:
        BadInput: the file cannot be read, or changed while it was sent.
        ServiceSaidNo: the service does not accept it.
        Unreachable: the storage did not take a part in TRIES attempts.
    """
    tell = on_bytes or _silent
    try:
        sha256, size_bytes = _digest(path, tell)
        announced = {"name": path.name, "format": format, "size_bytes": size_bytes, "sha256": sha256}
        upload = _announce(connection, announced)
        for index in range(len(upload.parts)):
            try:
                _send_part(connection.storage, path, upload.parts[index], size_bytes, tell)
            except _UrlLapsed:
                upload = _announce(connection, announced)  # the same upload, with fresh URLs
                if upload.status == "pending":
                    _send_part(connection.storage, path, upload.parts[index], size_bytes, tell)
            if upload.status == "ready":
                break
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    if upload.status == "ready":
        return upload
    patience = 60 + size_bytes / COMPLETING_BYTES_PER_SECOND
    return connection.ask(Upload, "POST", f"/v1/uploads/{upload.id}/complete", timeout=patience)


class _UrlLapsed(Unreachable):
    """The storage does not take a presigned URL any more."""


def _announce(connection: Connection, announced: dict[str, Any]) -> Upload:
    return connection.ask(Upload, "POST", "/v1/uploads", json=announced)


def _digest(path: Path, tell: OnBytes) -> tuple[str, int]:
    digest, size_bytes, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            tell(path, "hashing", done, size_bytes)
    return digest.hexdigest(), done


def _send_part(storage: httpx.Client, path: Path, part: UploadPart, total_bytes: int, tell: OnBytes) -> None:
    """PUT one part; the presigned URL shows in no message."""
    refusal = f"The object storage did not take part {part.number} of {path.name}"
    reason = ""
    for attempt in range(TRIES):
        content, headers = _bytes(path, part, total_bytes, tell), {"Content-Length": str(part.size_bytes)}
        try:
            response = storage.put(part.url, content=content, headers=headers)
        except httpx.TransportError as error:
            reason = describe(error)
        else:
            if response.is_success:
                return
            reason = f"it answered {response.status_code} {response.reason_phrase}"
            if response.status_code == httpx.codes.FORBIDDEN:
                raise _UrlLapsed(f"{refusal}: {reason}.")
        if attempt < TRIES - 1:
            pause(attempt)
    raise Unreachable(f"{refusal}: {reason}.", hint="Try again shortly.")


def _bytes(path: Path, part: UploadPart, total_bytes: int, tell: OnBytes) -> Iterator[bytes]:
    done = 0
    with path.open("rb") as file:
        file.seek(part.offset)
        while done < part.size_bytes:
            chunk = file.read(min(CHUNK_BYTES, part.size_bytes - done))
            if not chunk:
                raise BadInput(f"{path} became shorter while it was being sent.", hint="Send it again.")
            yield chunk
            done += len(chunk)
            tell(path, "sending", part.offset + done, total_bytes)


def _silent(path: Path, doing: Literal["hashing", "sending"], done: int, total: int) -> None:
    """What is told where nobody listens."""
