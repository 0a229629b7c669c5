"""Files on their way to a real object storage: known ones, large ones, and what breaks on the way."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

import burnish.connection
import burnish.upload
from burnish import BadInput, Client, ServiceSaidNo, Unreachable
from tests.api.desk import safetensors, weights
from tests.burnish.workbench import RECIPE, Workbench


def large_weights() -> bytes:
    """A file of 12 MiB, which is three parts of 5 MiB."""
    return safetensors({"conv.weight": ("F32", [3 * 2**20])})


def test_the_same_file_is_not_uploaded_twice(bench: Workbench, client: Client) -> None:
    path, sent = bench.job_file(), list[tuple[str, str]]()

    def note(file: Path, doing: str, done: int, total: int) -> None:
        if done == total:
            sent.append((file.name, doing))

    client.submit(path, on_bytes=note)
    assert sent == [
        ("weights.safetensors", "hashing"),
        ("weights.safetensors", "sending"),
        ("data.safetensors", "hashing"),
        ("data.safetensors", "sending"),
    ]

    sent.clear()
    (bench.directory / "copy.safetensors").write_bytes(weights())
    assert client.upload(bench.directory / "copy.safetensors") == client.upload(bench.directory / "weights.safetensors")
    client.submit(path, on_bytes=note)

    assert sent == [("weights.safetensors", "hashing"), ("data.safetensors", "hashing")]
    assert len(list(bench.storage.list_keys("uploads/"))) == 2


def test_a_file_under_two_names_in_one_job_is_sent_once(bench: Workbench, client: Client) -> None:
    both = safetensors(
        {"evaluation.images": ("F32", [4, 1, 8, 8]), "evaluation.masks": ("I32", [4, 8, 8])}
    )  # weights by its suffix, data by its tensors
    (bench.directory / "both.safetensors").write_bytes(both)
    path = bench.job_file(
        source={**RECIPE["source"], "weights": "both.safetensors"},
        data={"artifact": "both.safetensors"},
        stages=[{"kind": "export_onnx"}],
    )

    client.submit(path)

    assert bench.service.num_requests("POST", "/v1/uploads") == 1


class TestLargeFiles:
    """Files that are sent in parts."""

    @pytest.fixture
    def settings(self, settings: Any) -> Any:
        return settings.model_copy(update={"upload_part_bytes": 5 * 2**20})

    def test_a_large_file_is_sent_in_parts(self, bench: Workbench, client: Client) -> None:
        path, progress = bench.directory / "large.safetensors", list[int]()
        path.write_bytes(large_weights())

        artifact = client.upload(path, on_bytes=lambda _, doing, done, __: progress.append(done * (doing == "sending")))

        [key] = bench.storage.list_keys("uploads/")
        assert str(artifact) in key
        assert bench.storage.digest(key) == (hashlib.sha256(large_weights()).hexdigest(), len(large_weights()))
        assert progress[-1] == len(large_weights())
        assert progress == sorted(progress)

    def test_a_part_that_breaks_is_sent_again(
        self, bench: Workbench, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, tries = bench.directory / "large.safetensors", list[str]()
        path.write_bytes(large_weights())
        put = client._connection.storage.put

        def break_the_second_part_twice(url: str, *, content: Any, headers: Any) -> httpx.Response:
            number = httpx.URL(url).params["partNumber"]
            tries.append(number)
            if number == "2" and tries.count("2") < 3:
                next(content)
                raise httpx.WriteError("connection reset")
            return put(url, content=content, headers=headers)

        monkeypatch.setattr(client._connection.storage, "put", break_the_second_part_twice)
        client.upload(path)

        assert tries == ["1", "2", "2", "2", "3"]
        [key] = bench.storage.list_keys("uploads/")
        assert bench.storage.stat(key).size_bytes == len(large_weights())

    def test_a_url_that_has_lapsed_is_asked_for_again(
        self, bench: Workbench, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, refused = bench.directory / "large.safetensors", list[str]()
        path.write_bytes(large_weights())
        put = client._connection.storage.put

        def refuse_the_first_url_of_part_2(url: str, *, content: Any, headers: Any) -> httpx.Response:
            if httpx.URL(url).params["partNumber"] == "2" and not refused:
                refused.append(url)
                url = url.replace("X-Amz-Signature=", "X-Amz-Signature=0")
            return put(url, content=content, headers=headers)

        monkeypatch.setattr(client._connection.storage, "put", refuse_the_first_url_of_part_2)
        client.upload(path)

        assert bench.service.num_requests("POST", "/v1/uploads") == 2
        assert len(list(bench.storage.list_keys("uploads/"))) == 1


def test_a_storage_that_is_away_is_told_without_the_presigned_url(
    bench: Workbench, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(burnish.upload, "TRIES", 2)

    def refuse(url: str, **_: Any) -> httpx.Response:
        raise httpx.ConnectError("refused", request=httpx.Request("PUT", url))

    monkeypatch.setattr(client._connection.storage, "put", refuse)

    with pytest.raises(Unreachable) as told:
        client.submit(bench.job_file())

    assert "did not take part 1 of weights.safetensors" in told.value.detail
    assert "X-Amz" not in str(told.value)


def test_a_file_that_shrinks_while_it_is_sent_is_told(
    bench: Workbench, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bench.directory / "weights.safetensors"
    path.write_bytes(weights())

    def shrink(file: Path, doing: str, done: int, total: int) -> None:
        if doing == "hashing" and done == total:
            file.write_bytes(weights()[:20])

    with pytest.raises(BadInput, match="became shorter"):
        client.upload(path, on_bytes=shrink)


def test_a_file_that_changes_after_it_was_hashed_is_refused(bench: Workbench, client: Client) -> None:
    path = bench.directory / "weights.safetensors"
    path.write_bytes(weights())

    def change(file: Path, doing: str, done: int, total: int) -> None:
        if doing == "hashing" and done == total:
            file.write_bytes(weights()[:-1] + b"\x01")

    with pytest.raises(ServiceSaidNo) as told:
        client.upload(path, on_bytes=change)

    assert told.value.code == "digest_mismatch"
    assert list(bench.storage.list_keys()) == []
