"""Storage on a real S3 server: what is stored is what comes back, or is told to be something else."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from shared.errors import DigestMismatch, NotFound, StorageUnavailable
from shared.settings import Settings
from shared.storage import CHUNK_BYTES, Storage
from tests.faults.proxy import Proxy, port_of, through

MIB = 2**20


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def key(storage: Storage) -> str:
    return f"jobs/{uuid4()}/model.onnx"


@pytest.fixture(autouse=True)
def _the_bucket_is_left_empty(storage: Storage) -> object:
    yield
    for name in list(storage.list_keys()):
        storage.remove(name)


# ---------------------------------------------------------------- whole objects


@pytest.mark.parametrize("size_bytes", [0, 1, 3 * MIB + 7, 70 * MIB], ids=["empty", "a byte", "3 MiB", "in parts"])
def test_what_is_put_is_what_is_fetched(storage: Storage, key: str, tmp_path: Path, size_bytes: int) -> None:
    data = os.urandom(min(size_bytes, MIB)) * max(1, size_bytes // MIB)
    (tmp_path / "in").write_bytes(data)
    storage.put(tmp_path / "in", key)
    assert storage.stat(key).size_bytes == len(data)
    assert storage.digest(key) == (_sha256(data), len(data))
    storage.fetch(key, tmp_path / "out", sha256=_sha256(data), size_bytes=len(data))
    assert (tmp_path / "out").read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    "stored", [b"a bit flipped: Y", b"a bit flip", b"a bit flipped: X and more"], ids=["changed", "shorter", "longer"]
)
def test_a_corrupted_object_is_detected_and_no_file_appears(
    storage: Storage, key: str, tmp_path: Path, stored: bytes
) -> None:
    recorded = b"a bit flipped: X"
    storage.put_bytes(stored, key)
    with pytest.raises(DigestMismatch):
        storage.fetch(key, tmp_path / "out", sha256=_sha256(recorded), size_bytes=len(recorded))
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_is_much_too_large_is_not_downloaded_to_its_end(
    storage: Storage, key: str, tmp_path: Path
) -> None:
    storage.put_bytes(bytes(20 * MIB), key)
    seen = []
    with pytest.raises(DigestMismatch):
        storage.fetch(
            key, tmp_path / "out", sha256="0" * 64, size_bytes=10, interrupted=lambda: bool(seen.append(1)) or False
        )
    assert len(seen) <= 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_no_file(storage: Storage, key: str, tmp_path: Path) -> None:
    storage.put_bytes(bytes(MIB), key)
    with pytest.raises(InterruptedError):
        storage.fetch(key, tmp_path / "out", sha256="0" * 64, size_bytes=MIB, interrupted=lambda: True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size_bytes", [0, 5, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 1])
def test_verified_chunks_are_the_object_and_of_another_one_the_last_is_kept_back(
    storage: Storage, key: str, size_bytes: int
) -> None:
    data = os.urandom(size_bytes)
    recorded = {"sha256": _sha256(data), "size_bytes": len(data)}
    storage.put_bytes(data, key)
    assert b"".join(storage.verified_chunks(key, **recorded)) == data
    storage.put_bytes(data[:-1] + b"X" if data else b"X", key)
    received = list[bytes]()
    with pytest.raises(DigestMismatch):
        received.extend(chunk for chunk in storage.verified_chunks(key, **recorded))
    assert len(b"".join(received)) <= max(0, size_bytes - 1)


def test_a_transfer_that_takes_too_long_is_given_up(
    settings: Settings, storage: Storage, key: str, tmp_path: Path
) -> None:
    data = os.urandom(10 * MIB)
    (tmp_path / "in").write_bytes(data)
    impatient = {"transfer_seconds": 0.0, "transfer_bytes_per_second": 1e12}
    hasty = Storage(settings.model_copy(update=impatient))
    started_at = time.monotonic()
    with pytest.raises(StorageUnavailable, match="too slow"):
        hasty.put(tmp_path / "in", key)
    assert time.monotonic() - started_at < 5, "it was tried again"
    assert list(storage.list_keys()) == []
    assert list(storage.list_multiparts()) == []
    moved = list[None]()
    storage.put(tmp_path / "in", key, moved=lambda: moved.append(None))
    assert moved
    with pytest.raises(StorageUnavailable, match="too slow"):
        hasty.fetch(key, tmp_path / "out", sha256=_sha256(data), size_bytes=len(data))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_interrupted_upload_ends_at_once_and_leaves_nothing(
    settings: Settings, storage: Storage, key: str, tmp_path: Path
) -> None:
    (tmp_path / "in").write_bytes(os.urandom(24 * MIB))  # more than sockets take, which is waited for
    asked = list[float]()
    with Proxy(port_of(settings.s3_endpoint_url)) as network:
        network.throttle(100_000)
        url = through(network, settings.s3_endpoint_url)
        slow = Storage(settings.model_copy(update={"s3_endpoint_url": url}))

        def interrupted() -> bool:
            asked.append(time.monotonic())
            return len(asked) > 5

        with pytest.raises(InterruptedError):
            slow.put(tmp_path / "in", key, interrupted=interrupted)
        assert time.monotonic() - asked[5] < 5, "it waited for what was on its way"
        network.heal()
    assert list(storage.list_keys()) == []
    assert list(storage.list_multiparts()) == []


def test_an_upload_that_nobody_interrupts_is_whole(storage: Storage, key: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"a model")
    etag = storage.put(tmp_path / "in", key, interrupted=lambda: False)
    assert (storage.stat(key).etag, storage.digest(key)) == (etag, (_sha256(b"a model"), 7))


def test_what_is_not_there_is_told_as_missing(storage: Storage, tmp_path: Path) -> None:
    for ask in (
        lambda: storage.stat("nothing"),
        lambda: storage.digest("nothing"),
        lambda: storage.open("nothing"),
        lambda: storage.read_range("nothing", 0, 1),
        lambda: storage.fetch("nothing", tmp_path / "out", sha256="", size_bytes=0),
    ):
        with pytest.raises(NotFound):
            ask()
    storage.remove("nothing")


def test_objects_are_listed_by_prefix_and_removed(storage: Storage) -> None:
    for name in ("a/1", "a/2", "b/1"):
        storage.put_bytes(b"x", name)
    assert list(storage.list_keys("a/")) == ["a/1", "a/2"]
    storage.remove("a/1")
    assert list(storage.list_keys()) == ["a/2", "b/1"]


# ---------------------------------------------------------------- a part of an object


def test_an_opened_object_seeks_and_fetches_only_what_is_read(storage: Storage, key: str) -> None:
    data = os.urandom(3 * MIB)
    storage.put_bytes(data, key)
    fetched = []
    read_range = storage.read_range

    def counting(key: str, start: int, stop: int) -> bytes:
        fetched.append(stop - start)
        return read_range(key, start, stop)

    storage.read_range = counting  # type: ignore[method-assign]
    with storage.open(key) as file:
        assert file.read(8) == data[:8]
        assert file.seek(-16, os.SEEK_END) == len(data) - 16
        assert file.read() == data[-16:]
        assert file.read(1) == b""
        file.seek(MIB)
        file.seek(10, os.SEEK_CUR)
        assert file.tell() == MIB + 10
        assert file.read(100) == data[MIB + 10 : MIB + 110]
        assert file.seekable()
        assert file.readable()
        assert not file.writable()
    assert sum(fetched) < MIB


def test_an_opened_object_reads_whole_too(storage: Storage, key: str) -> None:
    data = os.urandom(MIB + 3)
    storage.put_bytes(data, key)
    with storage.open(key) as file:
        assert file.read() == data
    storage.put_bytes(b"", key)
    with storage.open(key) as file:
        assert file.read() == b""


# ---------------------------------------------------------------- presigned


def test_a_presigned_put_takes_the_announced_bytes(storage: Storage, key: str) -> None:
    assert httpx.put(storage.presign_put(key, 5), content=b"right").status_code == 200
    assert storage.digest(key) == (_sha256(b"right"), 5)


@pytest.mark.parametrize("sent", [b"", b"shor", b"longer than that"])
def test_a_presigned_put_of_another_length_is_refused_and_stores_nothing(
    storage: Storage, key: str, sent: bytes
) -> None:
    assert httpx.put(storage.presign_put(key, 5), content=sent).status_code == 403
    with pytest.raises(NotFound):
        storage.stat(key)


def test_a_presigned_url_is_for_its_key_its_verb_and_its_time(storage: Storage, settings: Settings, key: str) -> None:
    url = storage.presign_put(key, 5)
    assert httpx.put(url.replace("model.onnx", "other.onnx"), content=b"right").status_code == 403
    assert httpx.get(url).status_code == 403
    short = Storage(settings.model_copy(update={"presign_seconds": -1}))
    assert httpx.put(short.presign_put(key, 5), content=b"right").status_code in (400, 403)
    with pytest.raises(NotFound):
        storage.stat(key)


def test_a_presigned_get_is_a_download_by_name(storage: Storage, key: str) -> None:
    storage.put_bytes(b"engine", key)
    answer = httpx.get(storage.presign_get(key, "unet engine.zip"))
    assert answer.content == b"engine"
    assert answer.headers["content-disposition"] == 'attachment; filename="unet engine.zip"'


def test_presigned_urls_lead_where_the_client_can_reach(settings: Settings) -> None:
    public = Storage(settings.model_copy(update={"s3_public_endpoint_url": "https://s3.example.org"}))
    assert public.presign_put("k", 1).startswith("https://s3.example.org/")
    public.ensure_bucket()


# ---------------------------------------------------------------- in parts


def _send_parts(storage: Storage, key: str, multipart_id: str, parts: dict[int, bytes]) -> None:
    for number, data in parts.items():
        assert httpx.put(storage.presign_part(key, multipart_id, number), content=data).status_code == 200


def test_an_upload_in_parts_is_joined_in_the_order_of_their_numbers(storage: Storage, key: str) -> None:
    parts = {2: b"b" * 10, 1: b"a" * 5 * MIB}
    upload = storage.start_multipart(key)
    _send_parts(storage, key, upload, parts)
    with pytest.raises(NotFound):
        storage.stat(key)
    assert storage.finish_multipart(key, upload) == 2
    whole = parts[1] + parts[2]
    assert storage.digest(key) == (_sha256(whole), len(whole))


def test_an_upload_without_parts_joins_nothing(storage: Storage, key: str) -> None:
    upload = storage.start_multipart(key)
    assert storage.finish_multipart(key, upload) == 0
    with pytest.raises(NotFound):
        storage.stat(key)
    storage.abort_multipart(key, upload)


def test_joining_again_after_a_lost_answer_is_told_as_missing_and_keeps_the_object(storage: Storage, key: str) -> None:
    upload = storage.start_multipart(key)
    _send_parts(storage, key, upload, {1: b"only"})
    storage.finish_multipart(key, upload)
    with pytest.raises(NotFound):
        storage.finish_multipart(key, upload)
    assert storage.digest(key) == (_sha256(b"only"), 4)


def test_aborting_an_upload_twice_or_one_that_never_was_is_no_error(storage: Storage, key: str) -> None:
    upload = storage.start_multipart(key)
    _send_parts(storage, key, upload, {1: b"lost"})
    for _ in range(2):
        storage.abort_multipart(key, upload)
    storage.abort_multipart(key, "0123456789abcdef")
    assert list(storage.list_keys()) == []


# ---------------------------------------------------------------- the server is away


def _elsewhere(settings: Settings, port: int) -> Storage:
    return Storage(settings.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{port}"}))


def test_a_dead_port_is_told_in_bounded_time(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        away = _elsewhere(settings, taken.getsockname()[1])
        for ask in (away.ping, lambda: away.put(tmp_path / "in", "key"), lambda: list(away.list_keys())):
            started_at = time.monotonic()
            with pytest.raises(StorageUnavailable):
                ask()
            assert time.monotonic() - started_at < 20


def test_a_server_that_never_answers_is_not_waited_for_by_a_ping(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started_at = time.monotonic()
        with pytest.raises(StorageUnavailable):
            _elsewhere(settings, silent.getsockname()[1]).ping()
        assert time.monotonic() - started_at < 8


def test_wrong_credentials_are_a_fault_of_the_platform(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x")
    stranger = Storage(settings.model_copy(update={"s3_access_key": "nobody"}))
    with pytest.raises(StorageUnavailable):
        stranger.put_bytes(b"x", "key")
    with pytest.raises(StorageUnavailable):
        stranger.put(tmp_path / "in", "key")


def test_a_bucket_is_made_once_and_asked_for(settings: Settings) -> None:
    fresh = Storage(settings.model_copy(update={"s3_bucket": f"{settings.s3_bucket}-2"}))
    with pytest.raises(NotFound):
        fresh.ping()
    fresh.ensure_bucket()
    fresh.ensure_bucket()
    fresh.ping()
