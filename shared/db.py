"""The database: engine, sessions, and how its failures are told."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from shared.errors import DatabaseUnavailable
from shared.settings import Settings

Sessions = sessionmaker[Session]


def make_engine(settings: Settings, *, pool_size: int = 8) -> Engine:
    """An engine whose connections give up on a dead or stuck server instead of waiting for ever."""
    return create_engine(
        settings.database_url,
        pool_size=pool_size,
        max_overflow=4,
        pool_timeout=5,
        pool_pre_ping=False,
        pool_use_lifo=True,
        connect_args={
            "connect_timeout": 5,
            "options": "-c statement_timeout=20000 -c lock_timeout=10000 "
            "-c idle_in_transaction_session_timeout=30000 -c timezone=UTC",
            "keepalives_idle": 10,
            "keepalives_interval": 3,
            "keepalives_count": 3,
            "tcp_user_timeout": 15000,
        },
    )


def make_sessions(settings: Settings, *, pool_size: int = 8) -> Sessions:
    """A session factory on an engine of its own."""
    return sessionmaker(make_engine(settings, pool_size=pool_size), expire_on_commit=False)


@contextmanager
def transaction(sessions: Sessions) -> Iterator[Session]:
    """One transaction: committed at the end, rolled back on any error.

    Raises:
        DatabaseUnavailable: the server is away, restarting, read-only or too slow.
    """
    with _told(), sessions.begin() as session:
        yield session


@contextmanager
def statements(sessions: Sessions) -> Iterator[Connection]:
    """A connection whose every statement is its own transaction: one round trip where BEGIN and COMMIT make three.

    Raises:
        DatabaseUnavailable: the server is away, restarting, read-only or too slow.
    """
    engine: Engine = sessions.kw["bind"]
    with _told(), engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


@contextmanager
def _told() -> Iterator[None]:
    """Turn the failures of a server that is away into ours."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        raise DatabaseUnavailable from error
    except DBAPIError as error:
        read_only = getattr(error.orig, "sqlstate", None) == "25006"
        if error.connection_invalidated or read_only:
            raise DatabaseUnavailable from error
        raise


def ping(sessions: Sessions) -> None:
    """Ask the database for a sign of life; raises DatabaseUnavailable."""
    with transaction(sessions) as session:
        session.execute(text("SELECT 1"))
