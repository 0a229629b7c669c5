"""One account's rows as a file: JSON lines that another database, or the same one after a loss, takes back whole.

The first line says what it is, each further one is a row as the database tells it, and the last one counts them, so
that a file that was cut off is not taken. Files in storage are not in it: the rows say which they are. Of API keys it
holds what the database holds, which is their SHA-256.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any
from uuid import UUID

from sqlalchemy import func, literal_column, select, text
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from shared.db import Sessions, transaction
from shared.errors import BackupRefused, NotFound
from shared.models import Account, Base

VERSION = 1
# In an order in which each row finds those that it points to.
TABLES = ("api_keys", "jobs", "stage_runs", "job_events", "artifacts", "idempotency_keys", "quarantines")
OF_JOBS = ("stage_runs", "job_events")  # which have their account by their job
ROWS_AT_ONCE = 500

# ---------------------------------------------------------------- out


def export(sessions: Sessions, account: str) -> Iterator[str]:
    """The lines of an account's backup, all of one moment. Raises NotFound."""
    with transaction(sessions) as session:
        session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        owner = session.execute(select(Account.id, _as_json("accounts")).where(Account.name == account)).one_or_none()
        if owner is None:
            raise NotFound(f"there is no account {account!r}")
        yield _line({"burnish_backup": VERSION, "account": owner[1]})
        counts: Counter[str] = Counter()
        for table in TABLES:
            for row in _rows(session, table, owner.id):
                counts[table] += 1
                yield _line({"table": table, "row": row})
        yield _line({"end": dict(counts)})


def _rows(session: Session, table: str, account_id: UUID) -> Iterator[dict[str, Any]]:
    jobs = Base.metadata.tables["jobs"]
    rows = Base.metadata.tables[table]
    found = select(_as_json(table)).order_by(*rows.primary_key)
    if table in OF_JOBS:
        found = found.join_from(rows, jobs, rows.c.job_id == jobs.c.id).where(jobs.c.account_id == account_id)
    else:
        found = found.select_from(rows).where(rows.c.account_id == account_id)
    yield from session.scalars(found.execution_options(yield_per=ROWS_AT_ONCE))


def _as_json(table: str) -> Any:
    return func.to_jsonb(literal_column(table))


def _line(facts: dict[str, Any]) -> str:
    return json.dumps(facts, ensure_ascii=False, separators=(",", ":"))


# ---------------------------------------------------------------- in


def load(sessions: Sessions, lines: Iterable[str]) -> tuple[UUID, dict[str, int]]:
    """Take back the account of a backup, all of it or nothing; returns its id, and how many rows of each table.

    A job that ran then comes back with a lease that is over and a token that no worker has: it is requeued.

    Raises:
        BackupRefused: it is no whole backup, of a newer version, or a row of it is here already.
    """
    parsed = _parse(lines)
    first = next(parsed, {})
    if first.get("burnish_backup") != VERSION or not {"id", "name"} <= set(first.get("account", ())):
        raise BackupRefused(f"The file is no backup of version {VERSION}.")
    try:
        account_id = UUID(str(first["account"]["id"]))
    except ValueError:
        raise BackupRefused("The backup's account has no id.") from None
    counts: Counter[str] = Counter()
    try:
        with transaction(sessions) as session:
            _ensure_account(session, first["account"])
            for line in _insert_rows(session, first["account"]["id"], parsed, counts):
                if line.get("end") != counts:
                    raise BackupRefused("The file does not hold the rows that its last line counts.")
                _revoke(session, first["account"]["id"])
                return account_id, dict(counts)
            raise BackupRefused("The file was cut off: its last line is missing.")
    except (IntegrityError, DataError) as error:
        told = str(error.orig).strip().replace("\n", ": ")
        raise BackupRefused(f"A row of the backup is here already, or fits nothing here: {told}") from error


def _parse(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            facts = json.loads(line)
        except ValueError:
            raise BackupRefused(f"Line {number} is not JSON: the file is no backup, or was cut off.") from None
        is_row = isinstance(facts, dict) and "table" in facts
        if not isinstance(facts, dict) or (is_row and not (isinstance(facts.get("row"), dict) and facts["row"])):
            raise BackupRefused(f"Line {number} is no line of a backup.")
        yield facts


def _ensure_account(session: Session, row: dict[str, Any]) -> None:
    """An account of the same name and id may be there already."""
    taken = select(Account.id, Account.name).where((Account.id == UUID(row["id"])) | (Account.name == row["name"]))
    there = session.execute(taken).all()
    if not there:
        _insert(session, "accounts", [row])
    elif [(str(found.id), found.name) for found in there] != [(row["id"], row["name"])]:
        told = ", ".join(f"{found.name} ({found.id})" for found in there)
        raise BackupRefused(f"The backup is of the account {row['name']} ({row['id']}); here is another: {told}.")


def _insert_rows(
    session: Session, account_id: str, lines: Iterator[dict[str, Any]], counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Insert rows, many of a kind at once; yields the lines that are none."""
    jobs = set[str]()
    for (table, _columns), group in groupby(lines, lambda line: (line.get("table"), sorted(line.get("row", ())))):
        if table is None:
            yield from group
            continue
        if table not in TABLES:
            raise BackupRefused(f"The backup has a table {table!r}, which this version does not know.")
        while rows := [line["row"] for line in islice(group, ROWS_AT_ONCE)]:
            jobs.update(str(row.get("id")) for row in rows if table == "jobs")
            of_jobs = {row["job_id"] for row in rows if row.get("job_id")}
            of_others = of_jobs - jobs if table != "quarantines" else set()  # which may outlive the job that showed it
            if of_others or any(row.get("account_id", account_id) != account_id for row in rows):
                raise BackupRefused(f"The backup's {table} are not all of its account.")
            _insert(session, table, rows)
            counts[table] += len(rows)


def _insert(session: Session, table: str, rows: Sequence[dict[str, Any]]) -> None:
    known, told = set(Base.metadata.tables[table].columns.keys()), list(rows[0])
    if unknown := set(told) - known:
        raise BackupRefused(f"This version does not know {', '.join(sorted(unknown))} of the backup's {table}.")
    columns = ", ".join(told)
    statement = f"INSERT INTO {table} ({columns}) SELECT {columns} FROM jsonb_populate_recordset(NULL::{table}, :rows)"
    session.execute(text(statement.replace(":rows", "CAST(:rows AS jsonb)")), {"rows": json.dumps(rows)})


# The attempt does not count, for it did nothing wrong.
REVOKE = text("""
    UPDATE jobs SET lease_token = gen_random_uuid(), lease_expires_at = now(), max_attempts = max_attempts + 1
    WHERE status = 'running' AND (CAST(:account_id AS uuid) IS NULL OR account_id = :account_id)
    RETURNING id
""")


def revoke_leases(sessions: Sessions) -> int:
    """Fence every worker off, after the whole database was set back to an older state; returns how many jobs ran then.

    What a worker did since is not in the ledger any more, so none may go on: each job is requeued by the next sweep.
    """
    with transaction(sessions) as session:
        return _revoke(session, None)


def _revoke(session: Session, account_id: str | None) -> int:
    return len(session.execute(REVOKE, {"account_id": account_id}).all())
