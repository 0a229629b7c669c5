"""Burnish's own processes in local mode: migrate, api, workers and sweeper, on top of the servers."""

from __future__ import annotations

import importlib.util
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import httpx
from pydantic import SecretStr

from burnish.local.crew import PYTHON, Service
from burnish.local.place import LocalFailed, Place, write_private
from shared import accounts, workers
from shared.db import Sessions, transaction
from shared.errors import DatabaseUnavailable, Unauthorized
from shared.settings import Settings

ACCOUNT = "local"
API = (*PYTHON, "uvicorn", "--factory", "api.main:create_app", "--host", "127.0.0.1")
API_OPTIONS = ("--http", "api.doorway:Doorway", "--log-level", "warning", "--timeout-graceful-shutdown", "3")
WORKER = (*PYTHON, "worker")
SWEEPER = (*PYTHON, "worker.sweeper")


def apps(place: Place, settings: Settings, sessions: Sessions, port: int, num_workers: int) -> list[Service]:
    """Migrate, then the api on `port`, the workers and the sweeper side by side.

    `settings` lead to the servers, and `sessions` to the database, where the questions whether all is ready are asked.
    """
    environment = environment_of(settings)
    since = datetime.now(UTC)
    own_cores = max(1, (os.cpu_count() or 1) // num_workers)

    def worker(number: int) -> Service:
        name = f"worker-{number}"
        own = {"BURNISH_WORK_DIRECTORY": str(place.work / name)}
        if num_workers > 1:
            own["BURNISH_WORKER_THREADS"] = str(own_cores)
        return Service(
            name=name,
            command=[*WORKER],
            directory=place.work,
            environment={**environment, **own},
            after=["migrate", "valkey", "seaweedfs"],
            ready=lambda: _have_registered(sessions, num_workers, since),
            grace_seconds=15.0,
        )

    return [
        Service(
            name="migrate",
            command=migrate_command(),
            directory=place.work,
            environment=environment,
            after=["postgres"],
            ready=lambda: _ensure_api_key(place, sessions),
            once=True,
        ),
        Service(
            name="api",
            command=[*API, "--port", str(port), *API_OPTIONS],
            directory=place.work,
            environment=environment,
            after=["migrate", "valkey", "seaweedfs"],
            ready=lambda: _answers(f"http://127.0.0.1:{port}/readyz"),
        ),
        *(worker(number) for number in range(1, num_workers + 1)),
        Service(
            name="sweeper",
            command=[*SWEEPER],
            directory=place.work,
            environment=environment,
            after=["migrate", "valkey", "seaweedfs"],
        ),
    ]


def migrate_command() -> list[str]:
    """The command that brings the schema of the database in BURNISH_DATABASE_URL to the newest revision."""
    spec = importlib.util.find_spec("migrations")
    if spec is None or not spec.submodule_search_locations:
        raise LocalFailed("The package `migrations` is not installed beside burnish.")
    configuration = Path(spec.submodule_search_locations[0]) / "alembic.ini"
    return [*PYTHON, "alembic", "-c", str(configuration), "upgrade", "head"]


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings that were given, as the environment variables that carry them to another process."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {f"BURNISH_{name.upper()}": _as_variable(value) for name, value in given.items() if value is not None}


def _as_variable(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def _ensure_api_key(place: Place, sessions: Sessions) -> bool:
    """Make the account and its key, unless the key that lies in the directory opens it already."""
    try:
        if not _is_known(place, sessions):
            account = accounts.ensure_account(sessions, ACCOUNT)
            write_private(place.api_key, accounts.create_key(sessions, account, "made by burnish local") + "\n")
    except DatabaseUnavailable:
        return False
    return True


def _is_known(place: Place, sessions: Sessions) -> bool:
    try:
        accounts.authenticate(sessions, place.api_key.read_text().strip())
    except (FileNotFoundError, Unauthorized):
        return False
    return True


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _have_registered(sessions: Sessions, num_workers: int, since: datetime) -> bool:
    try:
        with transaction(sessions) as session:
            return sum(worker.started_at >= since for worker in workers.alive(session)) >= num_workers
    except DatabaseUnavailable:
        return False
