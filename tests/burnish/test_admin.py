"""What only who runs the service may do."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from burnish.admin import create_key, find_settings
from burnish.errors import BadInput, Unreachable
from burnish.local.apps import environment_of
from shared import accounts, lifecycle
from shared.db import Sessions
from shared.ledger import Reason
from shared.settings import Settings
from tests.burnish.workbench import run_command
from tests.shared.ledger_desk import claim, job, submit


@pytest.fixture
def configured(nowhere: None, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The service's settings, in the environment."""
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    return settings


def test_a_key_is_good_for_its_account(configured: Settings, sessions: Sessions) -> None:
    first = create_key(configured, "clinic", "of the laboratory")
    second = create_key(configured, "clinic", "of the ward")

    foreign = create_key(configured, "other", "k")

    assert first != second
    assert accounts.authenticate(sessions, first) == accounts.authenticate(sessions, second)
    assert accounts.authenticate(sessions, foreign) != accounts.authenticate(sessions, first)


def test_the_command_prints_the_key_alone_on_stdout(
    configured: Settings, sessions: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run_command(capsys, "admin", "key", "create", "--account", "clinic")

    assert told.status == 0
    assert accounts.authenticate(sessions, told.out.strip()) == accounts.ensure_account(sessions, "clinic")
    assert "not shown again" in told.err
    assert told.out.strip() not in told.err


def test_the_command_is_one_json_document(configured: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    document = run_command(capsys, "admin", "key", "create", "--name", "ward", "--json").document()
    assert {**document, "api_key": "…"} == {"account": "default", "name": "ward", "api_key": "…"}


def test_without_settings_there_is_a_sentence(nowhere: None, capsys: pytest.CaptureFixture[str]) -> None:
    told = run_command(capsys, "admin", "key", "create")
    assert told.status == 2
    assert "none runs in" in told.err
    assert "BURNISH_DATABASE_URL" in told.err


def test_default_secrets_are_refused(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_DATABASE_URL", "postgresql+psycopg://burnish@127.0.0.1:1/burnish")
    monkeypatch.delenv("BURNISH_LOCAL", raising=False)
    with pytest.raises(BadInput, match="BURNISH_SECRET_KEY"):
        find_settings()


def test_a_url_that_is_none_is_told(configured: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_DATABASE_URL", "not a url")
    with pytest.raises(BadInput, match="is not a database's URL"):
        find_settings()


def test_a_database_that_is_away_is_told(configured: Settings) -> None:
    away = configured.model_copy(update={"database_url": "postgresql+psycopg://burnish:b@127.0.0.1:1/burnish"})
    with pytest.raises(Unreachable, match="does not answer"):
        create_key(away, "clinic", "k")


def test_a_database_without_tables_is_told(configured: Settings) -> None:
    bare = configured.model_copy(update={"database_url": configured.database_url.rpartition("/")[0] + "/postgres"})
    with pytest.raises(Unreachable, match="no tables yet"):
        create_key(bare, "clinic", "k")


def test_another_directory_is_looked_into_first(configured: Settings, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=str(tmp_path / "elsewhere")):
        find_settings(tmp_path / "elsewhere")


def _quarantined(sessions: Sessions) -> UUID:
    job_id = submit(sessions)
    for _ in range(2):
        lifecycle.requeue(sessions, claim(sessions).lease, Reason("child_crashed", "It died."), cause="crashed")
    return job_id


def test_a_release_prints_the_new_job_alone_on_stdout(
    configured: Settings, sessions: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = _quarantined(sessions)

    told = run_command(capsys, "admin", "release", str(job_id))
    again = run_command(capsys, "admin", "release", str(job_id))

    assert (told.status, again.status) == (0, 0)
    assert job(sessions, UUID(told.out.strip())).retry_of == job_id
    assert told.out == again.out
    assert "released before" in again.err


def test_a_release_is_one_json_document(
    configured: Settings, sessions: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = _quarantined(sessions)
    document = run_command(capsys, "admin", "release", str(job_id), "--json").document()
    assert (document["job_id"], document["new"]) == (str(job_id), True)
    assert job(sessions, UUID(document["released_as"])).status == "queued"


def test_a_job_that_was_not_quarantined_is_not_released(
    configured: Settings, sessions: Sessions, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run_command(capsys, "admin", "release", str(submit(sessions)))
    assert told.status == 2
    assert "was not quarantined" in told.err
