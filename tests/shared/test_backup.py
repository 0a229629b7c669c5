"""One account's backup: what comes back is what was, and nothing that is here is overwritten."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from shared import accounts, backup, lifecycle
from shared.db import Sessions, transaction
from shared.errors import BackupRefused, LeaseLost, NotFound
from shared.ledger import Claim, Reason
from shared.models import Base
from tests.audit import audit
from tests.shared.ledger_desk import account, claim, execute, job, order, stored, submit

TABLES = ("accounts", *backup.TABLES)


@pytest.fixture
def history(sessions: Sessions) -> Claim:
    """An account with a key, a job that succeeded, one that failed, one that waits and one that runs; and another's."""
    owner = account(sessions)
    accounts.create_key(sessions, owner, "of the ward")
    lifecycle.submit(sessions, order(owner, tags=["ü", "b"], priority=3), "monday")
    held = claim(sessions)
    lifecycle.start_stage(sessions, held.lease, 0)
    lifecycle.finish_stage(sessions, held.lease, 0, "succeeded", {"reason": "naïve"}, [stored()], "key")
    lifecycle.settle(sessions, held.lease, "succeeded", None, {"verdict": "met"}, [stored("report.json")])
    submit(sessions, owner, max_attempts=1)
    lifecycle.requeue(sessions, claim(sessions).lease, Reason("child_crashed", "It died."), cause="crashed")
    running = submit(sessions, owner)
    held = claim(sessions)
    assert held.lease.job_id == running
    submit(sessions, owner)
    submit(sessions, account(sessions, "another"))
    return held


def rows(sessions: Sessions, owner: UUID) -> dict[str, list[Any]]:
    """All that there is of an account, as the database tells it."""
    found = {}
    with transaction(sessions) as session:
        for table in TABLES:
            own = {
                "accounts": "id = :id",
                "stage_runs": "job_id IN (SELECT id FROM jobs WHERE account_id = :id)",
                "job_events": "job_id IN (SELECT id FROM jobs WHERE account_id = :id)",
            }.get(table, "account_id = :id")
            told = text(f"SELECT to_jsonb(t)::text FROM {table} t WHERE {own} ORDER BY 1")
            found[table] = list(session.scalars(told, {"id": owner}))
    return found


def exported(sessions: Sessions, name: str = "clinic") -> list[str]:
    return list(backup.export(sessions, name))


def lose(sessions: Sessions, name: str = "clinic") -> None:
    execute(sessions, "DELETE FROM accounts WHERE name = :name", name=name)


def test_every_table_that_an_account_has_rows_in_is_in_its_backup() -> None:
    assert set(TABLES) == set(Base.metadata.tables) - {"workers", "account_usage"}  # that is counted by triggers


def test_what_comes_back_is_what_was(sessions: Sessions, history: Claim) -> None:
    owner, foreign = account(sessions), account(sessions, "another")
    before, others = rows(sessions, owner), rows(sessions, foreign)
    lines = exported(sessions)
    lose(sessions)
    account_id, counts = backup.load(sessions, lines)

    assert account_id == owner
    assert counts == {table: len(found) for table, found in before.items() if found and table != "accounts"}
    after = rows(sessions, owner)
    for table in set(TABLES) - {"jobs"}:
        assert after[table] == before[table], table
    changed = [(old, new) for old, new in zip(before["jobs"], after["jobs"], strict=True) if old != new]
    assert [json.loads(old)["id"] for old, _new in changed] == [str(history.lease.job_id)]
    assert rows(sessions, foreign) == others
    assert audit(sessions) == []


def test_a_job_that_ran_is_requeued_and_its_old_worker_is_fenced_off(sessions: Sessions, history: Claim) -> None:
    lines = exported(sessions)
    lose(sessions)
    backup.load(sessions, lines)

    with pytest.raises(LeaseLost):
        lifecycle.heartbeat(sessions, history.lease, 30.0)
    assert lifecycle.sweep_leases(sessions) == 1
    found = job(sessions, history.lease.job_id)
    assert (found.status, found.attempt, found.max_attempts) == ("queued", 1, 4)
    assert audit(sessions) == []


def test_a_key_of_an_api_and_one_of_a_submit_hold_as_before(sessions: Sessions, history: Claim) -> None:
    key = accounts.create_key(sessions, account(sessions), "of the laboratory")
    before = lifecycle.submit(sessions, order(account(sessions), tags=["ü", "b"], priority=3), "monday")
    lines = exported(sessions)
    assert key not in "".join(lines)
    lose(sessions)
    backup.load(sessions, lines)
    assert accounts.authenticate(sessions, key) == account(sessions)
    assert lifecycle.submit(sessions, order(account(sessions), tags=["ü", "b"], priority=3), "monday") == before


def test_what_is_here_is_not_overwritten(sessions: Sessions, history: Claim) -> None:
    lines, before = exported(sessions), rows(sessions, account(sessions))
    with pytest.raises(BackupRefused, match="is here already"):
        backup.load(sessions, lines)
    assert rows(sessions, account(sessions)) == before


def test_an_account_that_was_made_anew_is_another_one(sessions: Sessions, history: Claim) -> None:
    lines = exported(sessions)
    lose(sessions)
    anew = account(sessions)
    with pytest.raises(BackupRefused, match="here is another"):
        backup.load(sessions, lines)
    assert sum(len(found) for found in rows(sessions, anew).values()) == 1


def _edited(lines: list[str], number: int, **changes: Any) -> list[str]:
    """The lines with one row changed."""
    line = json.loads(lines[number])
    line["row"].update(changes)
    return [*lines[:number], json.dumps(line), *lines[number + 1 :]]


def test_what_is_no_whole_backup_is_refused_and_leaves_nothing(sessions: Sessions, history: Claim) -> None:
    lines = exported(sessions)
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    tables = [json.loads(line).get("table") for line in lines]
    jobs, stages = tables.index("jobs"), tables.index("stage_runs")
    foreign = str(account(sessions, "another"))
    lose(sessions)
    refused = {
        "is no backup of version": [json.dumps({**first, "burnish_backup": 2}), *lines[1:]],
        "is no backup": [],
        "cut off: its last line": lines[:-1],
        "is not JSON": [*lines[:-1], lines[-1][:-3]],
        "does not hold the rows": [*lines[:-2], lines[-1]],
        "does not know price": _edited(lines, jobs, price=3),
        "does not know": [lines[0], json.dumps({"table": "workers", "row": {"id": "w"}}), lines[-1]],
        "jobs are not all of its account": _edited(lines, jobs, account_id=foreign),
        "stage_runs are not all of its account": _edited(lines, stages, job_id=str(uuid4())),
        "account has no id": [json.dumps({**first, "account": {"id": "7", "name": "clinic"}}), *lines[1:]],
        "fits nothing here": _edited(lines, jobs, status="paused"),
        "fits nothing here: invalid": _edited(lines, jobs, created_at="yesterday's"),
        "is no line": [lines[0], "3", json.dumps(last)],
        "Line 2 is no line": [lines[0], json.dumps({"table": "jobs", "row": 3}), json.dumps(last)],
    }
    for told, broken in refused.items():
        with pytest.raises(BackupRefused, match=told):
            backup.load(sessions, broken)
        with transaction(sessions) as session:
            assert session.scalar(text("SELECT count(*) FROM accounts WHERE name = 'clinic'")) == 0, told
    backup.load(sessions, lines)


def test_a_backup_of_before_a_column_was_added_takes_its_default(sessions: Sessions, history: Claim) -> None:
    lines = exported(sessions)
    lose(sessions)
    older = []
    for line in map(json.loads, lines):
        line.get("row", {}).pop("use_cache", None)
        older.append(json.dumps(line))
    backup.load(sessions, older)
    assert job(sessions, history.lease.job_id).use_cache is True


def test_an_unknown_account_has_no_backup(sessions: Sessions) -> None:
    with pytest.raises(NotFound, match="no account 'nobody'"):
        exported(sessions, "nobody")


def test_a_revocation_fences_every_worker_and_its_attempts_do_not_count(sessions: Sessions, history: Claim) -> None:
    assert backup.revoke_leases(sessions) == 1
    with pytest.raises(LeaseLost):
        lifecycle.start_stage(sessions, history.lease, 0)
    assert lifecycle.sweep_leases(sessions) == 1
    assert job(sessions, history.lease.job_id).max_attempts == 4
    assert audit(sessions) == []
