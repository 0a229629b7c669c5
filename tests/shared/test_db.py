"""The database's failures: each is told as DatabaseUnavailable, soon, and leaves no half transaction."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DataError, IntegrityError

from shared.db import Sessions, make_sessions, ping, transaction
from shared.errors import DatabaseUnavailable
from shared.settings import Settings
from tests.shared.ledger_desk import account

INSERT = "INSERT INTO accounts (id, name) VALUES (gen_random_uuid(), 'a')"


def _elsewhere(settings: Settings, port: int) -> Sessions:
    head, _, name = settings.database_url.rpartition("/")
    return make_sessions(settings.model_copy(update={"database_url": f"{head.rpartition(':')[0]}:{port}/{name}"}))


def _attempt(sessions: Sessions, *statements: str) -> None:
    with transaction(sessions) as session:
        for statement in statements:
            session.execute(text(statement))


def _engine(sessions: Sessions) -> Engine:
    engine = sessions.kw["bind"]
    assert isinstance(engine, Engine)
    return engine


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port that nobody listens on, kept from others while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@pytest.fixture
def administration(settings: Settings) -> Iterator[Any]:
    with psycopg.connect(settings.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        yield connection


def test_a_transaction_commits_what_was_done(sessions: Sessions) -> None:
    with transaction(sessions) as session:
        session.execute(text(INSERT))
    with transaction(sessions) as session:
        assert session.scalar(text("SELECT name FROM accounts")) == "a"


def test_any_error_takes_all_of_it_back(sessions: Sessions) -> None:
    with pytest.raises(DataError):
        _attempt(sessions, INSERT, "SELECT 'x'::text::int")
    with transaction(sessions) as session:
        assert session.scalar(text("SELECT count(*) FROM accounts")) == 0


def test_a_dead_port_is_told_at_once(settings: Settings, free_port: int) -> None:
    started_at = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        ping(_elsewhere(settings, free_port))
    assert time.monotonic() - started_at < 2


def test_a_server_that_never_answers_is_given_up_on(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started_at = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            ping(_elsewhere(settings, silent.getsockname()[1]))
        assert time.monotonic() - started_at < 12


def test_a_connection_that_the_server_ends_costs_one_failure_and_the_pool_recovers(
    sessions: Sessions, administration: Any
) -> None:
    ping(sessions)
    terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() \
                 AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    assert administration.execute(terminate).fetchone()[0] >= 1
    with pytest.raises(DatabaseUnavailable):
        ping(sessions)
    ping(sessions)


def test_a_connection_lost_before_the_commit_leaves_nothing(sessions: Sessions, administration: Any) -> None:
    with pytest.raises(DatabaseUnavailable):
        _attempt(sessions, INSERT, "SELECT pg_terminate_backend(pg_backend_pid())", INSERT)
    assert administration.execute("SELECT count(*) FROM accounts").fetchone() == (0,)


def test_a_database_that_takes_no_writes_is_unavailable(sessions: Sessions) -> None:
    with pytest.raises(DatabaseUnavailable):
        _attempt(sessions, "SET TRANSACTION READ ONLY", INSERT)
    account(sessions)


@pytest.mark.parametrize("setting", ["lock_timeout", "statement_timeout"])
def test_a_row_that_stays_locked_is_waited_for_only_so_long(
    sessions: Sessions, administration: Any, setting: str
) -> None:
    owner = account(sessions)
    administration.autocommit = False
    administration.execute("SELECT FROM accounts WHERE id = %s FOR UPDATE", [owner])
    with pytest.raises(DatabaseUnavailable):
        _attempt(sessions, f"SET LOCAL {setting} = 50", "UPDATE accounts SET name = 'b'")
    administration.rollback()


def test_two_transactions_that_wait_for_each_other_are_told_to_try_again(sessions: Sessions) -> None:
    owners = [account(sessions, name) for name in ("a", "b")]
    both = threading.Barrier(2)
    failures = []

    def change(first: Any, second: Any) -> None:
        try:
            with transaction(sessions) as session:
                for number, owner in enumerate((first, second)):
                    session.execute(text("UPDATE accounts SET name = name WHERE id = :id"), {"id": owner})
                    if number == 0:
                        both.wait()
        except DatabaseUnavailable as error:
            failures.append(error)

    threads = [threading.Thread(target=change, args=pair) for pair in (owners, owners[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 1


def test_a_pool_that_stays_empty_is_unavailable(settings: Settings) -> None:
    narrow = make_sessions(settings, pool_size=1)
    pool: Any = _engine(narrow).pool
    pool._timeout = 0.05
    held = [_engine(narrow).connect() for _ in range(5)]
    try:
        with pytest.raises(DatabaseUnavailable):
            ping(narrow)
    finally:
        for connection in held:
            connection.close()
        _engine(narrow).dispose()


def test_a_session_left_idle_in_its_transaction_is_ended_by_the_server(sessions: Sessions) -> None:
    def dawdle() -> None:
        with transaction(sessions) as session:
            session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 50"))
            while not threading.Event().wait(0.2):
                session.execute(text("SELECT 1"))

    with pytest.raises(DatabaseUnavailable):
        dawdle()


def test_our_own_mistakes_are_not_blamed_on_the_server(sessions: Sessions) -> None:
    with pytest.raises(IntegrityError):
        _attempt(sessions, INSERT, INSERT)
    with pytest.raises(DataError):
        _attempt(sessions, "SELECT 'x'::text::int")


def test_every_connection_has_its_limits_and_speaks_utc(sessions: Sessions) -> None:
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "TimeZone")
    with transaction(sessions) as session:
        found = [session.scalar(text(f"SHOW {name}")) for name in names]
    assert found == ["20s", "10s", "30s", "UTC"]
