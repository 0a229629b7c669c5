"""Burnish's own processes in local mode: how they are started, and with what settings."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psycopg
import pytest

from burnish.local.apps import apps, environment_of, migrate_command
from burnish.local.place import Place
from burnish.local.servers import settings_of
from shared import accounts
from shared.db import Sessions
from shared.settings import Settings


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "place")
    place.make()
    place.choose_ports()
    return place


def test_settings_reach_another_process_unchanged(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"worker_queues": ["default", "gpu"], "lease_seconds": 9.5, "worker_threads": None, "max_attempts": 7}
    settings = settings_of(place).model_copy(update=changes)
    for name, value in environment_of(settings).items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


def test_settings_that_were_not_given_are_left_to_the_other_process(place: Place) -> None:
    names = environment_of(settings_of(place)).keys()
    assert {"BURNISH_LOCAL", "BURNISH_DATABASE_URL", "BURNISH_BROKER_URL", "BURNISH_SECRET_KEY"} <= names
    assert "BURNISH_LEASE_SECONDS" not in names


def test_no_password_stands_in_a_command_line(place: Place, settings: Settings, sessions: Sessions) -> None:
    secrets = [settings.s3_secret_key.get_secret_value(), settings.secret_key.get_secret_value()]
    secrets += [url.split(":")[2].partition("@")[0] for url in (settings.database_url, settings.broker_url)]
    for service in apps(place, settings, sessions, port=8000, num_workers=2):
        assert not any(secret in argument for secret in secrets for argument in service.command)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_worker_has_its_own_directory_and_share_of_the_cores(
    place: Place, settings: Settings, sessions: Sessions, num_workers: int
) -> None:
    services = apps(place, settings, sessions, 8000, num_workers)
    workers = [service for service in services if service.name.startswith("worker")]
    assert [worker.name for worker in workers] == [f"worker-{number}" for number in range(1, num_workers + 1)]
    assert len({worker.environment["BURNISH_WORK_DIRECTORY"] for worker in workers}) == num_workers
    cores = os.cpu_count() or 1
    for worker in workers:
        share = int(worker.environment.get("BURNISH_WORKER_THREADS", cores))
        assert share == max(1, cores // num_workers)


def test_burnishs_own_processes_stop_before_the_servers(
    place: Place, settings: Settings, sessions: Sessions
) -> None:
    for service in apps(place, settings, sessions, port=8000, num_workers=1):
        if not service.once:
            assert {"migrate", "valkey", "seaweedfs"} <= set(service.after)


def test_to_migrate_again_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    before = _tables(settings)
    assert ("jobs", "id") in before
    environment = {**os.environ, **environment_of(settings)}
    subprocess.run(migrate_command(), env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert _tables(settings) == before


def test_the_key_is_made_once_and_opens_the_local_account(
    place: Place, settings: Settings, sessions: Sessions
) -> None:
    (migrate, *_) = apps(place, settings, sessions, port=8000, num_workers=1)
    keys = set()
    for _ in range(2):
        assert migrate.ready()
        keys.add(place.api_key.read_text().strip())
    (key,) = keys
    assert place.api_key.stat().st_mode & 0o777 == 0o600
    assert accounts.authenticate(sessions, key) == accounts.ensure_account(sessions, "local")


def test_a_key_that_the_database_does_not_know_is_replaced(
    place: Place, settings: Settings, sessions: Sessions
) -> None:
    place.api_key.write_text("brn_of_another_database\n")
    (migrate, *_) = apps(place, settings, sessions, port=8000, num_workers=1)
    assert migrate.ready()
    accounts.authenticate(sessions, place.api_key.read_text().strip())


def _tables(settings: Settings) -> list[tuple[str, str]]:
    with psycopg.connect(settings.database_url.replace("+psycopg", "")) as connection:
        return connection.execute(
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
        ).fetchall()
