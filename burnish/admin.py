"""What only who runs the service may do, straight on its database."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import ArgumentError

from burnish.errors import BadInput, Unreachable
from burnish.local.apps import ACCOUNT
from burnish.local.place import find_place
from burnish.local.servers import settings_of
from shared import accounts, backup, quotas, repeats, retention
from shared.db import Sessions, make_sessions
from shared.errors import DatabaseUnavailable, OtherTables, StorageUnavailable, UserError
from shared.quotas import Usage
from shared.retention import Collected
from shared.settings import Settings
from shared.storage import Storage

DEFAULT_ACCOUNT = "default"


def find_settings(directory: Path | None = None) -> tuple[Settings, str]:
    """The service's settings, and the account that is meant if none is named.

    From the environment where that names a database, else from the local mode that runs in `directory` or here.
    Raises BadInput.
    """
    if directory is None and "BURNISH_DATABASE_URL" in os.environ:
        try:
            settings = Settings()
            make_url(settings.database_url)
        except ValidationError as error:
            told = "; ".join(str(found["msg"]).removeprefix("Value error, ") for found in error.errors())
            raise BadInput(f"The settings in the environment cannot be used: {told}.") from None
        except ArgumentError:
            raise BadInput("BURNISH_DATABASE_URL is not a database's URL.") from None
        return settings, DEFAULT_ACCOUNT
    place = find_place(directory)
    if place.read_state() is None:
        raise BadInput(
            f"No service is configured, and none runs in {place.directory}.",
            hint="Set BURNISH_DATABASE_URL and the service's secrets, or start one with 'burnish local up'.",
        )
    return settings_of(place), ACCOUNT


def create_key(settings: Settings, account: str, name: str) -> str:
    """A new API key of an account, which is made if there is none of that name.

    Raises:
        Unreachable: the database does not answer, or has no tables yet.
    """
    with database(settings) as sessions:
        return accounts.create_key(sessions, accounts.ensure_account(sessions, account), name)


def release(settings: Settings, job_id: UUID) -> tuple[UUID, bool]:
    """Release a quarantined job: its input leaves quarantine, and the job runs again as a new one.

    Returns the new job's id, and whether it is new: a second time gives the same. Raises BadInput, Unreachable.
    """
    with database(settings) as sessions:
        try:
            return repeats.release(sessions, job_id)
        except UserError as error:
            raise BadInput(error.detail) from error


def allow(settings: Settings, account: str, **limits: int | None) -> Usage:
    """Give an account limits of its own, or with None the service's again; with no limit told, only look.

    Raises BadInput, Unreachable.
    """
    with database(settings) as sessions:
        try:
            return quotas.allow(sessions, account, **limits)
        except UserError as error:
            raise BadInput(error.detail) from error


def collect(settings: Settings, *, dry_run: bool) -> Collected:
    """Remove what nobody keeps any more, or only count it; raises Unreachable."""
    with database(settings) as sessions, storage(settings) as objects:
        return retention.collect(sessions, objects, settings, dry_run=dry_run)


@dataclass(frozen=True)
class TakenBack:
    """Rows that came back, by table or only those of jobs that ran; and files that rows name and storage lacks."""

    rows: dict[str, int]
    missing: list[str]


def export_account(settings: Settings, account: str) -> Iterator[str]:
    """The lines of an account's backup. Raises BadInput, Unreachable."""
    with database(settings) as sessions:
        try:
            yield from backup.export(sessions, account)
        except UserError as error:
            raise BadInput(error.detail) from error


def import_account(settings: Settings, lines: Iterable[str]) -> TakenBack:
    """Take a backup back, whole or not at all. Raises BadInput, Unreachable."""
    with database(settings) as sessions, storage(settings) as objects:
        try:
            account_id, rows = backup.load(sessions, lines)
        except UserError as error:
            raise BadInput(error.detail) from error
        return TakenBack(rows, list(retention.missing_files(sessions, objects, account_id)))


def reconcile(settings: Settings) -> TakenBack:
    """Bring a database that was set back, and what happened since, into line: no worker of before may go on.

    Raises Unreachable.
    """
    with database(settings) as sessions, storage(settings) as objects:
        revoked = backup.revoke_leases(sessions)
        return TakenBack({"jobs": revoked}, list(retention.missing_files(sessions, objects)))


@contextmanager
def storage(settings: Settings) -> Iterator[Storage]:
    """The service's object storage; raises Unreachable if it does not answer."""
    try:
        yield Storage(settings)
    except StorageUnavailable as error:
        raise Unreachable("The object storage does not answer.", hint="Is BURNISH_S3_ENDPOINT_URL right?") from error


@contextmanager
def database(settings: Settings) -> Iterator[Sessions]:
    """Sessions on the service's database; raises Unreachable if it does not answer or has no tables yet."""
    sessions = make_sessions(settings, pool_size=1)
    try:
        yield sessions
    except OtherTables as error:
        told = "The database has no tables yet, or those of another version."
        raise Unreachable(told, hint="Run the migrations first.") from error
    except DatabaseUnavailable as error:
        raise Unreachable("The database does not answer.", hint="Is BURNISH_DATABASE_URL right?") from error
    finally:
        engine = sessions.kw["bind"]
        assert isinstance(engine, Engine)
        engine.dispose()
