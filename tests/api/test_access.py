"""Who may see what: no key and a wrong key are 401, another account's things are as if they were not there."""

from __future__ import annotations

import json
import time
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, update

from api import deps
from api.deps import KnownKeys
from api.examples import A_JOB, AN_UPLOAD
from api.main import create_app
from shared import lifecycle
from shared.db import transaction
from shared.ledger import Reason
from shared.models import ApiKey
from shared.settings import Settings
from tests.api.desk import Desk, client_of
from tests.api.test_files import a_report

OPEN = {"/healthz", "/readyz", "/v1/version"}
ROUTES = [
    (method.upper(), path)
    for path, methods in create_app(Settings(local=True)).openapi()["paths"].items()
    for method in methods
]
BODIES: dict[str, Any] = {"/v1/uploads": AN_UPLOAD, "/v1/jobs": A_JOB, "/v1/jobs/validate": A_JOB}


def test_every_route_but_the_open_ones_asks_for_a_key(desk: Desk, subtests: pytest.Subtests) -> None:
    for key in ("", "brn_wrong", desk.key + "x", desk.key[:-1]):
        with client_of(desk.url, key) as client:
            if not key:
                client.headers.pop("Authorization")
            for method, path in ROUTES:
                with subtests.test(method=method, path=path, key=key[:6]):
                    answer = client.request(method, _filled(path, str(uuid4())), json=BODIES.get(path))
                    if path in OPEN:
                        assert answer.status_code == 200
                        continue
                    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
                    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_a_key_of_another_scheme_is_refused(desk: Desk) -> None:
    for header in (f"Basic {desk.key}", desk.key, "Bearer"):
        assert desk.client.get("/v1/jobs", headers={"Authorization": header}).status_code == 401


def test_every_route_with_another_accounts_id_finds_nothing(desk: Desk, subtests: pytest.Subtests) -> None:
    job = _job_with_everything(desk)
    upload = job["recipe"]["data"]["artifact"]
    before = desk.client.get(job["url"]).json()
    owned = [(method, path) for method, path in ROUTES if "{" in path]
    assert len(owned) >= 10
    with desk.stranger() as stranger:
        for method, path in owned:
            with subtests.test(method=method, path=path):
                filled = _filled(path, job["id"], upload)
                foreign = stranger.request(method, filled)
                missing = stranger.request(method, _filled(path, str(uuid4())))
                assert (foreign.status_code, missing.status_code) == (404, 404), foreign.text
                assert _shape(foreign.json()) == _shape(missing.json())
                ours = desk.client.get(filled) if method == "GET" else None
                assert ours is None or ours.status_code in (200, 307)
        assert stranger.get("/v1/jobs").json()["items"] == []
    assert desk.client.get(job["url"]).json() == before


def test_a_revoked_key_stops_working_within_seconds(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deps, "KEY_SECONDS", 0.0)
    with desk.stranger() as stranger:
        assert stranger.get("/v1/jobs").status_code == 200
        with transaction(desk.sessions) as session:
            session.execute(update(ApiKey).values(revoked_at=func.now()))
        assert stranger.get("/v1/jobs").status_code == 401


def test_known_keys_are_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, account_id = KnownKeys(), uuid4()
    keys.remember("k", account_id)
    assert keys.find("k") == account_id
    assert keys.find("other") is None
    later = time.monotonic() + deps.KEY_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert keys.find("k") is None


def test_known_keys_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deps, "MAX_KEYS", 3)
    keys = KnownKeys()
    for number in range(5):
        keys.remember(f"key-{number}", UUID(int=number))
    assert [keys.find(f"key-{number}") for number in range(5)] == [None, None, UUID(int=2), UUID(int=3), UUID(int=4)]


def _filled(path: str, job_id: str, upload_id: str | None = None) -> str:
    return path.format(job_id=job_id, upload_id=upload_id or job_id, name="engine.zip")


def _shape(problem: dict[str, Any]) -> str:
    """A problem without the ids in it."""
    told = {name: value for name, value in problem.items() if name not in ("instance", "detail")}
    return json.dumps(told, sort_keys=True)


def _job_with_everything(desk: Desk) -> dict[str, Any]:
    """An ended job with a log, a file and a report."""
    job = desk.submit()
    stored = [desk.keep("engine", "engine.zip", b"engine"), desk.keep("log", "attempt-1.log", b"line\n")]
    report = a_report(job)
    lifecycle.settle(desk.sessions, desk.claim().lease, "failed", Reason("x", "y"), report, stored)
    return job
