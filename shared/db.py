"""The database: engine, sessions, and how its failures are told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from sqlalchemy import Connection, Dialect, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from shared.errors import CommitUnknown, DatabaseUnavailable, OtherTables
from shared.settings import Settings

Sessions = sessionmaker[Session]
READ_ONLY = "25006"
OTHER_TABLES = ("42703", "42P01", "42883", "0A000")  # no such column, table or function; a plan of before the change
T = TypeVar("T")


def make_engine(settings: Settings, *, pool_size: int = 8) -> Engine:
    """An engine whose connections give up on a dead or stuck server instead of waiting for ever."""
    engine = create_engine(
        settings.database_url,
        pool_size=pool_size,
        max_overflow=4,
        pool_timeout=5,
        pool_pre_ping=False,
        pool_use_lifo=True,
        connect_args={
            "connect_timeout": 10,  # three round trips, and TLS's
            "options": f"-c statement_timeout={1000 * settings.statement_seconds:.0f} "
            f"-c lock_timeout={1000 * settings.lock_seconds:.0f} "
            "-c idle_in_transaction_session_timeout=30000 -c timezone=UTC",
            "keepalives_idle": 10,
            "keepalives_interval": 3,
            "keepalives_count": 3,
            "tcp_user_timeout": 15000,
        },
    )
    event.listen(engine, "do_connect", _connect)
    return engine


def _connect(dialect: Dialect, _record: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
    """Connect as the dialect does; psycopg lets an OSError pass where no more files may be opened."""
    try:
        return dialect.connect(*arguments, **named)
    except OSError as error:
        raise psycopg.OperationalError(str(error)) from error


def make_sessions(settings: Settings, *, pool_size: int = 8) -> Sessions:
    """A session factory on an engine of its own."""
    return sessionmaker(make_engine(settings, pool_size=pool_size), expire_on_commit=False)


@contextmanager
def transaction(sessions: Sessions) -> Iterator[Session]:
    """One transaction: committed at the end, rolled back on any error.

    Raises:
        DatabaseUnavailable: the server is away, restarting, read-only or too slow.
        CommitUnknown: the connection was lost during the COMMIT.
    """
    with _told(), sessions() as session:
        yield session
        with _told(lost=CommitUnknown):
            session.commit()


@contextmanager
def statements(sessions: Sessions) -> Iterator[Connection]:
    """A connection whose every statement is its own transaction: one round trip where BEGIN and COMMIT make three.

    Raises:
        DatabaseUnavailable: the server is away, restarting, read-only or too slow.
        CommitUnknown: the connection was lost during a statement.
    """
    with reads(sessions) as connection, _told(lost=CommitUnknown):
        yield connection


@contextmanager
def reads(sessions: Sessions) -> Iterator[Connection]:
    """The same for what only reads; raises DatabaseUnavailable wherever the connection is lost."""
    engine: Engine = sessions.kw["bind"]
    with _told(), engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")


def resolved(write: Callable[[], T], look: Callable[[], T] | None = None) -> T:
    """Carry out a write; if the connection was lost while it committed, find out what it did, and tell that.

    By `look`, or by the same write once more where that changes nothing that was written before. The latter looks
    under the lock of a row that it changes, so that it waits for a commit that is still under way; a `look` that takes
    no lock may miss that commit, and has to be of something that its caller can lose.

    Raises:
        DatabaseUnavailable: nothing was written, or it cannot be found out now; the whole call may be made again.
    """
    try:
        return write()
    except CommitUnknown:
        return (look or write)()


@contextmanager
def _told(lost: type[DatabaseUnavailable] = DatabaseUnavailable) -> Iterator[None]:
    """Turn the failures of a server that is away into ours; `lost` is raised where the connection broke."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        broken = isinstance(error, DBAPIError) and error.connection_invalidated
        raise (lost if broken else DatabaseUnavailable) from error
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None)
        if error.connection_invalidated:
            raise lost from error
        if state == READ_ONLY:
            raise DatabaseUnavailable from error
        if state in OTHER_TABLES:
            raise OtherTables from error
        raise


def ping(sessions: Sessions) -> None:
    """Ask the database for a sign of life; raises DatabaseUnavailable."""
    with reads(sessions) as connection:
        connection.execute(text("SELECT 1"))
