"""Quotas over HTTP: 429 with a sentence and a time, and never for what is known already."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared import quotas
from shared.db import Sessions
from shared.settings import Settings
from shared.storage import Storage
from tests.api.desk import Desk, announce, data, open_desk, weights


@pytest.fixture
def small(settings: Settings, sessions: Sessions, storage: Storage) -> Iterator[Desk]:
    """A desk at which an account may have two jobs, and hardly more bytes than these need."""
    changes = {
        "max_active_jobs_per_account": 2,
        "max_stored_bytes_per_account": len(weights()) + len(data()) + 10,
    }
    with open_desk(settings.model_copy(update=changes), sessions, storage) as desk:
        yield desk


def test_a_submit_beyond_the_quota_says_what_is_used_and_what_to_do(small: Desk) -> None:
    body = small.order()
    first = small.submit(body, key="one")
    small.submit(body)
    refused = small.post("/v1/jobs", body, **{"Idempotency-Key": "two"})
    told = refused.json()
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "30")
    assert (told["code"], told["fault"], told["retryable"]) == ("too_many_jobs", "user", True)
    assert told["detail"] == "the account has 2 of at most 2 jobs queued or running"
    assert "cancel some" in told["hint"]
    assert small.submit(body, key="one")["id"] == first["id"]
    small.client.post(f"{first['url']}/cancel")
    again = small.client.post(f"{first['url']}/retry")
    assert again.status_code == 202
    assert small.client.post(f"{first['url']}/retry").status_code == 429
    assert small.client.get("/v1/jobs").status_code == 200


def test_an_upload_beyond_the_quota_says_what_is_used_and_what_to_do(small: Desk) -> None:
    small.order()
    refused = small.client.post("/v1/uploads", json=announce(b"x" * 11, "zip"))
    told = refused.json()
    assert (refused.status_code, refused.headers["Retry-After"], told["code"]) == (429, "600", "storage_quota_reached")
    assert told["detail"].startswith("the file has 11 bytes, and the account's uploads have ")
    assert small.client.post("/v1/uploads", json=announce(weights(), "safetensors")).status_code == 200
    assert small.client.post("/v1/uploads", json=announce(b"x" * 10, "zip")).status_code == 201
    quotas.allow(small.sessions, "ours", max_stored_bytes=2**30)
    assert small.client.post("/v1/uploads", json=announce(b"x" * 11, "zip")).status_code == 201


def test_a_refused_upload_gives_its_bytes_back(small: Desk) -> None:
    free = small.settings.max_stored_bytes_per_account
    begun = small.client.post("/v1/uploads", json=announce(b"x" * free, "zip")).json()
    assert small.client.post("/v1/uploads", json=announce(b"y", "zip")).status_code == 429
    small.storage.put_bytes(b"not the announced ones", f"incoming/{small.account_id}/{begun['id']}/{begun['sha256']}")
    assert small.client.post(f"/v1/uploads/{begun['id']}/complete").json()["code"] == "digest_mismatch"
    assert small.client.post("/v1/uploads", json=announce(b"y", "zip")).status_code == 201
