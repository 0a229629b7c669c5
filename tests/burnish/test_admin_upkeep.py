"""What only who runs the service may do with what is kept: collect, export, import, reconcile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from burnish import admin
from burnish.errors import Unreachable
from burnish.local.apps import environment_of
from shared import lifecycle
from shared.db import Sessions
from shared.errors import LeaseLost
from shared.ledger import Stored
from shared.settings import Settings
from shared.storage import Storage
from tests.audit import audit
from tests.burnish.workbench import run_command
from tests.shared.ledger_desk import account, claim, execute, job, submit

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def configured(nowhere: None, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The service's settings, in the environment."""
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture(autouse=True)
def _the_laws_hold(sessions: Sessions, storage: Storage) -> Iterator[None]:
    yield
    assert audit(sessions, storage) == []
    for key in list(storage.list_keys()):
        storage.remove(key)


def _report(storage: Storage) -> Stored:
    """A file that is in storage."""
    storage.put_bytes(b"abc", "accounts/a/report.json")
    return Stored("report", "report.json", "json", "accounts/a/report.json", SHA256_OF_ABC, 3)


def test_gc_tells_first_and_does_then(
    configured: Settings,
    sessions: Sessions,
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BURNISH_JOB_RETENTION_DAYS", "0.000001")
    submit(sessions)
    lifecycle.settle(sessions, claim(sessions).lease, "succeeded", None, {"verdict": "met"}, [_report(storage)])
    execute(sessions, "SELECT pg_sleep(0.1)")

    told = run_command(capsys, "admin", "gc", "--dry-run", "--json").document()
    assert told == {"dry_run": True, "jobs": 1, "uploads": 0, "files": 0, "unfinished_transfers": 0}
    done = run_command(capsys, "admin", "gc")
    assert done.status == 0
    assert next(line.split() for line in done.out.splitlines()) == ["1", "jobs"]
    assert "Removed" in done.err
    assert run_command(capsys, "admin", "gc", "--json").document()["jobs"] == 0


def test_an_account_is_exported_and_imported_by_the_commands(
    configured: Settings,
    sessions: Sessions,
    storage: Storage,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    submit(sessions, account(sessions, "clinic"))
    report = _report(storage)
    lifecycle.settle(sessions, claim(sessions).lease, "succeeded", None, {"verdict": "met"}, [report])
    running = submit(sessions, account(sessions, "clinic"))
    held = claim(sessions)

    told = run_command(capsys, "admin", "export", "clinic")
    assert told.status == 0
    backup = tmp_path / "clinic.jsonl"
    backup.write_text(told.out, encoding="utf-8")
    assert {json.loads(line).get("table") for line in told.out.splitlines()} >= {"jobs", "job_events", "artifacts"}

    refused = run_command(capsys, "admin", "import", str(backup))
    assert refused.status == 2
    assert "is here already" in refused.err

    execute(sessions, "DELETE FROM accounts")
    storage.remove(report.key)
    document = run_command(capsys, "admin", "import", str(backup), "--json").document()
    assert document["rows"]["jobs"] == 2
    assert document["missing_files"] == [report.key]
    storage.put_bytes(b"abc", report.key)
    with pytest.raises(LeaseLost):
        lifecycle.heartbeat(sessions, held.lease, 30.0)
    assert lifecycle.sweep_leases(sessions) == 1
    assert job(sessions, running).status == "queued"


def test_reconcile_fences_workers_off_and_tells_what_storage_lacks(
    configured: Settings, sessions: Sessions, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(sessions)
    report = _report(storage)
    lifecycle.settle(sessions, claim(sessions).lease, "succeeded", None, {"verdict": "met"}, [report])
    submit(sessions)
    held = claim(sessions)
    assert run_command(capsys, "admin", "reconcile", "--json").document() == {"requeued": 1, "missing_files": []}
    with pytest.raises(LeaseLost):
        lifecycle.heartbeat(sessions, held.lease, 30.0)

    storage.remove(report.key)
    told = run_command(capsys, "admin", "reconcile")
    assert told.status == 0
    assert report.key in told.out
    storage.put_bytes(b"abc", report.key)


def test_an_unknown_account_and_a_file_that_is_no_backup_are_told(
    configured: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run_command(capsys, "admin", "export", "nobody")
    assert (told.status, told.out) == (2, "")
    assert "no account 'nobody'" in told.err
    (tmp_path / "file").write_text("no backup\n", encoding="utf-8")
    told = run_command(capsys, "admin", "import", str(tmp_path / "file"))
    assert told.status == 2
    assert "no backup" in told.err


def test_a_storage_that_is_away_is_told(configured: Settings, sessions: Sessions) -> None:
    away = configured.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"})
    with pytest.raises(Unreachable, match="object storage does not answer"):
        admin.collect(away, dry_run=True)
