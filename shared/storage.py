"""Object storage: S3 through boto3, one implementation for every environment."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from s3transfer.exceptions import CancelledError
from s3transfer.futures import TransferFuture
from s3transfer.subscribers import BaseSubscriber

from shared.errors import DigestMismatch, NotFound, StorageUnavailable
from shared.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

CHUNK_BYTES = 2**14  # small, so that a slow server is soon noticed
PROMPT, PATIENT = 5, 10  # tries; the pause between them is random and doubles, from 50 ms on
LOOK_SECONDS = 0.05
READS = 2  # before bytes that are not those that were recorded are taken for what is stored


@dataclass(frozen=True)
class Stat:
    size_bytes: int
    etag: str


class Recorded(Protocol):
    """What is known of a file in storage; its etag is from when its bytes were seen, or None."""

    @property
    def key(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def etag(self) -> str | None: ...


class Storage:
    """Put, open, stat, presign and remove objects of one bucket.

    Every method raises StorageUnavailable when the server does not answer or answers with a fault of its own,
    after bounded, jittered retries: PROMPT tries, for whoever has a client waiting, are over within half a second of
    a server that is away, PATIENT ones outlast its restart.
    """

    def __init__(self, settings: Settings, *, tries: int = PROMPT) -> None:
        self.bucket = settings.s3_bucket
        self._presign_seconds = settings.presign_seconds
        self._transfer = settings.transfer_seconds, settings.transfer_bytes_per_second
        self._client = _client(settings, settings.s3_endpoint_url, max_attempts=tries)
        self._probe = _client(settings, settings.s3_endpoint_url, read_timeout=3, max_attempts=1)
        public = settings.s3_public_endpoint_url
        self._public_client = _client(settings, public) if public else self._client

    def put(
        self,
        path: Path,
        key: str,
        *,
        moved: Callable[[], None] = lambda: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> str:
        """Upload a file, in parts if it is large; returns its etag. `moved` is called whenever some of it has left.

        Raises:
            StorageUnavailable: also where it leaves too slowly.
            InterruptedError: `interrupted` said so; asked every LOOK_SECONDS.
        """
        deadline, watch, stopped = self._deadline(key, path.stat().st_size), _Watch(moved), False
        config = TransferConfig(multipart_chunksize=64 * 2**20, max_concurrency=2)
        try:
            with _told(), create_transfer_manager(self._client, config) as transfers:
                upload = transfers.upload(str(path), self.bucket, key, subscribers=[watch])
                while not watch.done.wait(LOOK_SECONDS):
                    stopped = stopped or interrupted()
                    if stopped or deadline.is_over():
                        upload.cancel()  # the body's next read fails
                upload.result()
        except (CancelledError, NotFound) as error:
            if stopped:
                raise InterruptedError from error
            raise StorageUnavailable(deadline.excuse if deadline.is_over() else None) from error
        return self.stat(key).etag

    def put_bytes(self, data: bytes, key: str) -> str:
        """Upload these bytes; returns the object's etag."""
        with _told():
            return self._client.put_object(Bucket=self.bucket, Key=key, Body=data)["ETag"]

    def stat(self, key: str) -> Stat:
        """Size and etag of an object; NotFound if there is none."""
        with _told():
            found = self._client.head_object(Bucket=self.bucket, Key=key)
        return Stat(size_bytes=found["ContentLength"], etag=found["ETag"])

    def holds(self, file: Recorded) -> bool:
        """Whether what was recorded is there, with the same bytes.

        They are read only if the object's etag is another than it was: it has been written since.
        """
        try:
            found = self.stat(file.key)
            if found.size_bytes != file.size_bytes:
                return False
            return found.etag == file.etag or self.digest(file.key)[0] == file.sha256
        except NotFound:
            return False

    def chunks(self, key: str) -> Iterator[bytes]:
        """An object's bytes, a chunk at a time."""
        with _told():
            yield from self._client.get_object(Bucket=self.bucket, Key=key)["Body"].iter_chunks(CHUNK_BYTES)

    def verified_chunks(self, key: str, *, sha256: str, size_bytes: int) -> Iterator[bytes]:
        """The same, but the last one only once the size and sha256 of all are what they must be.

        Raises:
            DigestMismatch: they are not.
        """
        digest, received, last = hashlib.sha256(), 0, b""
        for chunk in self.chunks(key):
            if last:
                yield last
            digest.update(chunk)
            received, last = received + len(chunk), chunk
        if received != size_bytes or digest.hexdigest() != sha256:
            raise _mismatch(key, sha256, size_bytes)
        yield last

    def open(self, key: str) -> BinaryIO:
        """An object as a seekable file that fetches only what is read."""
        return io.BufferedReader(_RangedObject(self, key, self.stat(key).size_bytes), 2**18)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """The bytes start..stop of an object, stop excluded."""
        with _told():
            found = self._client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
            return found["Body"].read()

    def fetch(
        self, key: str, path: Path, *, sha256: str, size_bytes: int, interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """Download an object to a file that appears only once its size and sha256 are what they must be.

        What arrives damaged is fetched once more: the network may have done it.

        Raises:
            DigestMismatch: the stored bytes are not those that were recorded.
            StorageUnavailable: also where they come too slowly.
            InterruptedError: `interrupted` said so; asked after each chunk.
        """
        partial = path.with_name(path.name + ".partial")
        try:
            for _ in range(READS):
                if self._receive(key, partial, sha256, size_bytes, interrupted):
                    partial.rename(path)
                    return
        finally:
            partial.unlink(missing_ok=True)
        raise _mismatch(key, sha256, size_bytes)

    def _receive(self, key: str, partial: Path, sha256: str, size_bytes: int, interrupted: Callable[[], bool]) -> bool:
        digest, received, deadline = hashlib.sha256(), 0, self._deadline(key, size_bytes)
        with partial.open("wb") as file:
            for chunk in self.chunks(key):
                digest.update(chunk)
                received += len(chunk)
                file.write(chunk)
                if received > size_bytes:
                    break
                if interrupted():
                    raise InterruptedError
                if deadline.is_over():
                    raise StorageUnavailable(deadline.excuse)
        return received == size_bytes and digest.hexdigest() == sha256

    def digest(self, key: str) -> tuple[str, int]:
        """sha256 and size of an object, by reading all of it."""
        digest, size_bytes = hashlib.sha256(), 0
        for chunk in self.chunks(key):
            digest.update(chunk)
            size_bytes += len(chunk)
        return digest.hexdigest(), size_bytes

    def remove(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        with _told():
            self._client.delete_object(Bucket=self.bucket, Key=key)

    def copy(self, source: str, key: str) -> None:
        """Copy an object within the bucket, in parts if it is large; NotFound if there is none."""
        with _told():
            self._client.copy({"Bucket": self.bucket, "Key": source}, self.bucket, key)

    def list_keys(self, prefix: str = "", *, older_than_seconds: float = 0) -> Iterator[str]:
        """Keys that begin so, of objects last written that long ago or longer."""
        latest = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        with _told():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for entry in page.get("Contents", []):
                    if older_than_seconds == 0 or entry["LastModified"] <= latest:
                        yield entry["Key"]

    def presign_put(self, key: str, size_bytes: int) -> str:
        """A URL that takes one PUT of exactly that many bytes."""
        parameters = {"Bucket": self.bucket, "Key": key, "ContentLength": size_bytes}
        return self._presign("put_object", parameters)

    def presign_get(self, key: str, filename: str) -> str:
        """A URL that gives the object as a download of that name."""
        parameters = {
            "Bucket": self.bucket,
            "Key": key,
            "ResponseContentDisposition": f'attachment; filename="{filename}"',
        }
        return self._presign("get_object", parameters)

    def start_multipart(self, key: str) -> str:
        """Begin an upload in parts; returns its id."""
        with _told():
            return self._client.create_multipart_upload(Bucket=self.bucket, Key=key)["UploadId"]

    def presign_part(self, key: str, multipart_id: str, number: int) -> str:
        """A URL that takes part `number` (from 1)."""
        parameters = {"Bucket": self.bucket, "Key": key, "UploadId": multipart_id, "PartNumber": number}
        return self._presign("upload_part", parameters)

    def list_multiparts(self, prefix: str = "", *, older_than_seconds: float = 0) -> Iterator[tuple[str, str]]:
        """Id and key of uploads in parts that were begun that long ago or longer and never joined."""
        latest = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        with _told():
            pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix)
            for page in pages:
                for entry in page.get("Uploads", []):
                    if older_than_seconds == 0 or entry["Initiated"] <= latest:
                        yield entry["UploadId"], entry["Key"]

    def finish_multipart(self, key: str, multipart_id: str) -> int:
        """Join the parts that have arrived; returns how many there were (0: nothing was joined)."""
        with _told():
            pages = self._client.get_paginator("list_parts").paginate(
                Bucket=self.bucket, Key=key, UploadId=multipart_id
            )
            parts: list[CompletedPartTypeDef] = [
                {"ETag": part["ETag"], "PartNumber": part["PartNumber"]}
                for page in pages
                for part in page.get("Parts", [])
            ]
            if parts:
                self._client.complete_multipart_upload(
                    Bucket=self.bucket, Key=key, UploadId=multipart_id, MultipartUpload={"Parts": parts}
                )
        return len(parts)

    def abort_multipart(self, key: str, multipart_id: str) -> None:
        """Forget an upload in parts; one that is not there is no error."""
        try:
            with _told():
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=multipart_id)
        except NotFound:
            return

    def ensure_bucket(self) -> None:
        """Make the bucket if it is not there."""
        try:
            with _told():
                self._client.head_bucket(Bucket=self.bucket)
        except NotFound:
            with _told():
                self._client.create_bucket(Bucket=self.bucket)

    def ping(self) -> None:
        """Ask for the bucket, once and impatiently; raises StorageUnavailable or NotFound."""
        with _told():
            self._probe.head_bucket(Bucket=self.bucket)

    def _deadline(self, key: str, size_bytes: int) -> _Deadline:
        seconds, bytes_per_second = self._transfer
        return _Deadline(key, seconds + size_bytes / bytes_per_second)

    def _presign(self, operation: str, parameters: dict[str, Any]) -> str:
        return self._public_client.generate_presigned_url(operation, Params=parameters, ExpiresIn=self._presign_seconds)


class _Deadline:
    """When an object must have been moved."""

    def __init__(self, key: str, seconds: float) -> None:
        self.excuse = f"The object storage is too slow: {key} takes longer than {seconds:.0f} s."
        self._at = time.monotonic() + seconds

    def is_over(self) -> bool:
        return time.monotonic() > self._at


class _Watch(BaseSubscriber):
    """Tells that an upload moves, and that it is done, however it went."""

    def __init__(self, moved: Callable[[], None]) -> None:
        self._moved, self.done = moved, threading.Event()

    def on_progress(self, future: TransferFuture, bytes_transferred: int, **_: Any) -> None:
        self._moved()

    def on_done(self, future: TransferFuture, **_: Any) -> None:
        self.done.set()


class _RangedObject(io.RawIOBase):
    def __init__(self, storage: Storage, key: str, size_bytes: int) -> None:
        self._storage, self._key, self._size_bytes, self._position = storage, key, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size_bytes)
        if stop <= self._position:
            return 0
        data = self._storage.read_range(self._key, self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _client(settings: Settings, endpoint_url: str, *, read_timeout: int = 30, max_attempts: int = PROMPT) -> S3Client:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=settings.s3_secret_key.get_secret_value(),
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            connect_timeout=3,
            read_timeout=read_timeout,
            retries={"mode": "standard", "total_max_attempts": max_attempts},
            response_checksum_validation="when_required",  # whoever reads compares the sha256
        ),
    )
    client.meta.events.register_first("needs-retry.s3", _give_up)
    return client


def _give_up(caught_exception: Exception | None, **_: Any) -> None:
    """Not to try again what `put` has cancelled: boto3 takes that for a bad connection."""
    cause = caught_exception.kwargs.get("error") if isinstance(caught_exception, HTTPClientError) else None
    if isinstance(cause, CancelledError):
        raise cause


def _mismatch(key: str, sha256: str, size_bytes: int) -> DigestMismatch:
    return DigestMismatch(f"{key} is not the {size_bytes} bytes with sha256 {sha256} that were recorded")


@contextmanager
def _told() -> Iterator[None]:
    """Turn boto3's errors into ours."""
    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NoSuchBucket", "NoSuchUpload", "NotFound"):
            raise NotFound("the object is not in storage") from error
        raise StorageUnavailable from error
    except (BotoCoreError, Boto3Error) as error:
        raise StorageUnavailable from error
