"""What only who runs the service may do, straight on its database."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import Engine, make_url
from sqlalchemy.exc import ArgumentError, ProgrammingError

from burnish.errors import BadInput, Unreachable
from burnish.local.apps import ACCOUNT
from burnish.local.place import find_place
from burnish.local.servers import settings_of
from shared import accounts
from shared.db import make_sessions
from shared.errors import DatabaseUnavailable
from shared.settings import Settings

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
    sessions = make_sessions(settings, pool_size=1)
    try:
        return accounts.create_key(sessions, accounts.ensure_account(sessions, account), name)
    except DatabaseUnavailable as error:
        raise Unreachable("The database does not answer.", hint="Is BURNISH_DATABASE_URL right?") from error
    except ProgrammingError as error:
        raise Unreachable("The database has no tables yet.", hint="Run the migrations first.") from error
    finally:
        engine = sessions.kw["bind"]
        assert isinstance(engine, Engine)
        engine.dispose()
