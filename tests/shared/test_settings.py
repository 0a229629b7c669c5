"""Settings: read from the environment, and no default secret outside local mode."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shared.settings import DEFAULT_DATABASE_URL, DEFAULT_SECRET, Settings, get_settings

SECRETS = {
    "BURNISH_SECRET_KEY": "one",
    "BURNISH_S3_SECRET_KEY": "two",
    "BURNISH_DATABASE_URL": "postgresql+psycopg://burnish:three@db/burnish",
}


@pytest.fixture(autouse=True)
def _an_empty_environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in os.environ:
        if name.startswith("BURNISH_"):
            monkeypatch.delenv(name)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, "BURNISH_LEASE_SECONDS": "45", "BURNISH_WORKER_QUEUES": '["gpu", "big"]'}.items():
        monkeypatch.setenv(name, value)
    settings = get_settings()
    assert (settings.lease_seconds, settings.worker_queues, settings.local) == (45.0, ["gpu", "big"], False)
    assert settings.secret_key.get_secret_value() == "one"
    monkeypatch.setenv("BURNISH_LEASE_SECONDS", "60")
    assert get_settings() is settings


@pytest.mark.parametrize("name", SECRETS)
def test_outside_local_mode_each_default_secret_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other, value in SECRETS.items():
        if other != name:
            monkeypatch.setenv(other, value)
    with pytest.raises(ValidationError, match=f"set {name}: the default"):
        Settings()


def test_in_local_mode_the_defaults_will_do() -> None:
    settings = Settings(local=True)
    assert settings.secret_key.get_secret_value() == DEFAULT_SECRET
    assert settings.database_url == DEFAULT_DATABASE_URL


def test_a_lease_is_at_least_three_heartbeats_long() -> None:
    assert Settings(local=True, heartbeat_seconds=5, lease_seconds=15).lease_seconds == 15
    with pytest.raises(ValidationError, match="at least three heartbeats"):
        Settings(local=True, heartbeat_seconds=5.1, lease_seconds=15)


def test_settings_do_not_change_and_do_not_show_secrets() -> None:
    settings = Settings(
        local=True,
        secret_key="hush",  # type: ignore[arg-type]
        s3_secret_key="hush",  # type: ignore[arg-type]
        database_url="postgresql+psycopg://burnish:hush@db/burnish",
        broker_url="redis://:hush@valkey:6379/0",
    )
    assert "hush" not in repr(settings)
    assert "hush" not in str(settings)
    with pytest.raises(ValidationError):
        settings.local = False  # type: ignore[misc]


def test_every_setting_has_a_default_of_its_unit() -> None:
    settings = Settings(local=True)
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name.endswith(("_seconds", "_bytes")) and value is not None:
            assert value > 0, name
    assert isinstance(settings.work_directory, Path)
