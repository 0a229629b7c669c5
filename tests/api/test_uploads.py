"""Uploads over HTTP: announced, sent straight to storage, vetted, and either ready or gone."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import func, select

from shared.db import transaction
from shared.models import Artifact
from shared.settings import Settings
from tests.api.desk import Desk, announce, data, open_desk, safetensors, send, weights

PART = 5 * 2**20


def test_an_upload_goes_straight_to_storage_and_is_ready_once_it_was_vetted(desk: Desk) -> None:
    content = weights()
    begun = desk.client.post("/v1/uploads", json=announce(content, "safetensors", "unet.safetensors"))
    assert begun.status_code == 201
    upload = begun.json()
    assert (upload["status"], upload["name"], len(upload["parts"])) == ("pending", "unet.safetensors", 1)
    assert upload["parts"][0]["url"].startswith(desk.settings.s3_endpoint_url)

    send(upload, content)
    done = desk.client.post(f"/v1/uploads/{upload['id']}/complete").json()
    assert (done["status"], done["parts"], done["expires_at"]) == ("ready", [], None)
    assert done["summary"]["tensors"]["conv.weight"] == {"dtype": "F32", "shape": [8, 1, 3, 3]}
    assert desk.client.get(f"/v1/uploads/{upload['id']}").json() == done


def test_a_large_file_goes_in_parts_that_are_joined(settings: Settings, sessions: Any, storage: Any) -> None:
    small_parts = settings.model_copy(update={"upload_part_bytes": PART})
    content = safetensors({"w": ("F32", [3 * 2**20])})
    with open_desk(small_parts, sessions, storage) as desk:
        upload = desk.client.post("/v1/uploads", json=announce(content, "safetensors")).json()
        assert [part["number"] for part in upload["parts"]] == [1, 2, 3]
        assert sum(part["size_bytes"] for part in upload["parts"]) == len(content)
        send(upload, content)
        done = desk.client.post(f"/v1/uploads/{upload['id']}/complete")
        assert done.status_code == 200
        assert storage.digest(_row(desk, upload["id"]).key) == (hashlib.sha256(content).hexdigest(), len(content))


def test_a_large_file_with_a_part_missing_is_refused_and_leaves_nothing(
    settings: Settings, sessions: Any, storage: Any
) -> None:
    small_parts = settings.model_copy(update={"upload_part_bytes": PART})
    content = safetensors({"w": ("F32", [3 * 2**20])})
    with open_desk(small_parts, sessions, storage) as desk:
        upload = desk.client.post("/v1/uploads", json=announce(content, "safetensors")).json()
        none_yet = desk.client.post(f"/v1/uploads/{upload['id']}/complete")
        assert (none_yet.status_code, none_yet.json()["code"]) == (409, "upload_incomplete")
        send({"parts": upload["parts"][:2]}, content)
        refused = desk.client.post(f"/v1/uploads/{upload['id']}/complete")
        assert (refused.status_code, refused.json()["code"]) == (422, "digest_mismatch")
        assert f"of the {len(content)}" in refused.json()["detail"]
        _assert_nothing_left(desk)


def test_the_same_file_is_not_sent_twice(desk: Desk) -> None:
    first = desk.upload(weights(), "safetensors", "a.safetensors")
    again = desk.client.post("/v1/uploads", json=announce(weights(), "safetensors", "b.safetensors"))
    assert again.status_code == 200
    assert (again.json()["id"], again.json()["status"], again.json()["parts"]) == (first, "ready", [])
    with desk.stranger() as stranger:
        assert stranger.post("/v1/uploads", json=announce(weights(), "safetensors")).status_code == 201


def test_an_upload_that_was_begun_goes_on(desk: Desk) -> None:
    first = desk.client.post("/v1/uploads", json=announce(weights(), "safetensors")).json()
    again = desk.client.post("/v1/uploads", json=announce(weights(), "safetensors"))
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (200, first["id"], "pending")
    assert again.json()["expires_at"] > first["expires_at"]
    send(again.json(), weights())
    assert desk.client.post(f"/v1/uploads/{first['id']}/complete").json()["status"] == "ready"


def test_completing_twice_or_at_once_changes_nothing(desk: Desk) -> None:
    upload = desk.client.post("/v1/uploads", json=announce(weights(), "safetensors")).json()
    send(upload, weights())
    url = f"/v1/uploads/{upload['id']}/complete"
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: desk.client.post(url), range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.json() == answers[0].json() for answer in [*answers, desk.client.post(url)])


def test_an_upload_that_has_not_arrived_can_still_be_sent(desk: Desk) -> None:
    upload = desk.client.post("/v1/uploads", json=announce(weights(), "safetensors")).json()
    early = desk.client.post(f"/v1/uploads/{upload['id']}/complete")
    assert (early.status_code, early.json()["code"]) == (409, "upload_incomplete")
    assert "PUT its bytes" in early.json()["hint"]
    send(upload, weights())
    assert desk.client.post(f"/v1/uploads/{upload['id']}/complete").status_code == 200


def test_the_url_takes_exactly_the_announced_number_of_bytes(desk: Desk) -> None:
    upload = desk.client.post("/v1/uploads", json=announce(weights(), "safetensors")).json()
    truncated = httpx.put(upload["parts"][0]["url"], content=weights()[:-1], trust_env=False)
    assert truncated.status_code == 403
    early = desk.client.post(f"/v1/uploads/{upload['id']}/complete")
    assert early.status_code == 409


def _torchscript() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("net/constants.pkl", b"x")
        file.writestr("net/code/__torch__.py", b"import os")
    return archive.getvalue()


def _corrupt_zip() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train/a/1.png", bytes(500))
    return archive.getvalue()[:300]


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HOSTILE: list[tuple[str, Callable[[], bytes], str, str, str]] = [
    ("a pickle", lambda: pickle.dumps({"weights": [1.0]}), "safetensors", "unsafe_format", "pickle"),
    ("a TorchScript file", _torchscript, "zip", "unsafe_format", "TorchScript"),
    ("a TorchScript file as weights", _torchscript, "safetensors", "unsafe_format", "TorchScript"),
    ("a corrupt zip", _corrupt_zip, "zip", "invalid_file", "zip"),
    ("text as onnx", lambda: b"not a model at all, only text" * 10, "onnx", "invalid_file", "ONNX"),
    ("a header bomb", lambda: struct.pack("<Q", 2**62) + bytes(64), "safetensors", "invalid_file", "header claims"),
    ("a cut safetensors", lambda: weights()[:-8], "safetensors", "invalid_file", "the file has"),
    (
        "a NUL in a tensor's name",
        lambda: _header(b'{"a\\u0000b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "safetensors",
        "invalid_file",
        "NUL",
    ),
]


@pytest.mark.parametrize(("what", "make", "format", "code", "word"), HOSTILE, ids=[row[0] for row in HOSTILE])
def test_a_hostile_file_is_refused_with_a_sentence_and_leaves_nothing(
    desk: Desk, what: str, make: Callable[[], bytes], format: str, code: str, word: str
) -> None:
    content = make()
    upload = desk.client.post("/v1/uploads", json=announce(content, format)).json()
    send(upload, content)
    refused = desk.client.post(f"/v1/uploads/{upload['id']}/complete")
    assert (refused.status_code, refused.json()["code"]) == (422, code), refused.text
    assert word in refused.json()["detail"]
    if code == "unsafe_format":
        assert "safetensors" in refused.json()["hint"]
    _assert_nothing_left(desk)
    assert desk.client.get(f"/v1/uploads/{upload['id']}").status_code == 404


def test_bytes_with_another_digest_are_refused_and_leave_nothing(desk: Desk) -> None:
    honest, other = weights(), weights()[:-1] + b"\1"
    upload = desk.client.post("/v1/uploads", json=announce(honest, "safetensors")).json()
    send(upload, other)
    refused = desk.client.post(f"/v1/uploads/{upload['id']}/complete")
    assert (refused.status_code, refused.json()["code"]) == (422, "digest_mismatch")
    assert hashlib.sha256(other).hexdigest() in refused.json()["detail"]
    _assert_nothing_left(desk)


SENSELESS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"size_bytes": 2**50}, 413, "upload_too_large", "at most"),
    ({"size_bytes": 0}, 422, "invalid_request", "size_bytes: Input should be greater than 0"),
    ({"size_bytes": "many"}, 422, "invalid_request", "size_bytes"),
    ({"format": "pickle"}, 422, "invalid_request", "format: Input should be 'safetensors', 'onnx' or 'zip'"),
    ({"sha256": "abc"}, 422, "invalid_request", "sha256"),
    ({"name": "../../etc/passwd"}, 422, "invalid_request", "name"),
    ({"name": "a\ud800b"}, 422, "invalid_request", "surrogate"),
    ({"colour": "red"}, 422, "invalid_request", "colour: Extra inputs are not permitted"),
]


def test_an_announcement_that_makes_no_sense_is_refused(desk: Desk, subtests: pytest.Subtests) -> None:
    for changes, status, code, sentence in SENSELESS:
        with subtests.test(changes=changes):
            refused = desk.post("/v1/uploads", {**announce(data(), "safetensors"), **changes})
            assert (refused.status_code, refused.json()["code"]) == (status, code)
            assert sentence in refused.json()["detail"]
            _assert_nothing_left(desk)


def test_an_unknown_upload_is_not_found(desk: Desk) -> None:
    assert desk.client.get(f"/v1/uploads/{uuid4()}").status_code == 404
    assert desk.client.post(f"/v1/uploads/{uuid4()}/complete").status_code == 404


def _row(desk: Desk, upload_id: str) -> Artifact:
    with transaction(desk.sessions) as session:
        return session.scalars(select(Artifact).where(Artifact.id == upload_id)).one()


def _assert_nothing_left(desk: Desk) -> None:
    with transaction(desk.sessions) as session:
        assert session.scalar(select(func.count()).select_from(Artifact)) == 0
    assert list(desk.storage.list_keys()) == []
