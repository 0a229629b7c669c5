"""Fetches a job's file: straight from object storage, and into place only once its bytes are what was recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import httpx

from burnish.connection import TRIES, Connection, describe, pause
from burnish.errors import BadInput, BrokenDownload, Unreachable
from shared.schemas import Artifact

CHUNK_BYTES = 2**18


def download_file(
    connection: Connection, artifact: Artifact, directory: Path, on_bytes: Callable[[int, int], None] | None = None
) -> Path:
    """Download an artifact into `directory` under its own name; a file of that name is replaced.

    Raises:
        BrokenDownload: the bytes that arrived have another size or sha256; nothing is left behind.
        BadInput: the directory cannot be written.
        Unreachable: the storage did not answer in TRIES attempts.
    """
    path = directory / PurePosixPath(artifact.name).name
    partial = path.with_name(path.name + ".part")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            _fetch(connection, artifact, partial, on_bytes)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"{error.filename or path} cannot be written: {error.strerror}.") from error
    return path


def _fetch(
    connection: Connection, artifact: Artifact, partial: Path, on_bytes: Callable[[int, int], None] | None
) -> None:
    reason = ""
    for attempt in range(TRIES):
        location = connection.send("GET", _path(artifact.url)).headers.get("location", "")
        try:
            with connection.storage.stream("GET", location, headers={"Accept-Encoding": "identity"}) as response:
                if response.is_success:
                    _receive(response, artifact, partial, on_bytes)
                    return
                reason = f"it answered {response.status_code} {response.reason_phrase}"
        except httpx.TransportError as error:
            reason = describe(error)
        if attempt < TRIES - 1:
            pause(attempt)
    raise Unreachable(f"The object storage did not give {artifact.name}: {reason}.", hint="Try again shortly.")


def _path(url: str) -> str:
    """The artifact's path: it is asked of the service that told of it, whatever that calls itself."""
    return urlsplit(url).path


def _receive(
    response: httpx.Response, artifact: Artifact, partial: Path, on_bytes: Callable[[int, int], None] | None
) -> None:
    digest, received = hashlib.sha256(), 0
    with partial.open("wb") as file:
        for chunk in response.iter_raw(CHUNK_BYTES):
            digest.update(chunk)
            received += len(chunk)
            file.write(chunk)
            if on_bytes is not None:
                on_bytes(received, artifact.size_bytes)
    if received != artifact.size_bytes or digest.hexdigest() != artifact.sha256:
        raise BrokenDownload(
            f"{artifact.name} arrived with {received} bytes and sha256 {digest.hexdigest()}, but {artifact.size_bytes} "
            f"bytes with {artifact.sha256} are recorded. Nothing was kept.",
            hint="Try again; if it stays so, the stored file is damaged: run the job again with 'burnish retry'.",
        )
