"""Quotas: the last place is given away once, what is known is never refused, and counts are what a recount gives."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from shared import backup, lifecycle, quotas, repeats, uploads
from shared.db import Sessions, transaction
from shared.errors import IdempotencyConflict, NotFound, StorageQuotaReached, TooManyJobs
from shared.ledger import Reason
from shared.quotas import Usage
from shared.schemas import UploadRequest
from shared.settings import Settings
from shared.storage import Storage
from tests.audit import audit
from tests.shared.ledger_desk import account, at_once, claim, execute, lost_answer, order, submit


def limited(sessions: Sessions, limit: int, key: str | None = None, **changes: Any) -> tuple[UUID, bool]:
    return lifecycle.submit(sessions, order(account(sessions), **changes), key, limit)


def announced(sessions: Sessions, storage: Storage, settings: Settings, limit: int, size_bytes: int = 60) -> UUID:
    request = UploadRequest(name="f", format="zip", size_bytes=size_bytes, sha256=uuid4().hex * 2)
    own = settings.model_copy(update={"max_stored_bytes_per_account": limit, "upload_part_bytes": 100})
    return uploads.begin(sessions, storage, own, account(sessions), request)[0].id


# ---------------------------------------------------------------- jobs


def test_an_account_has_at_most_its_limit_of_jobs(sessions: Sessions) -> None:
    for _ in range(2):
        limited(sessions, 2)
    with pytest.raises(TooManyJobs, match="2 of at most 2 jobs queued or running") as refused:
        limited(sessions, 2)
    assert refused.value.hint is not None
    assert "cancel some" in refused.value.hint
    assert (refused.value.status, refused.value.retry_after_seconds) == (429, 30)
    lifecycle.submit(sessions, order(account(sessions, "another")), None, 2)
    assert audit(sessions) == []


def test_a_job_counts_until_it_has_ended_and_its_claim_changes_nothing(sessions: Sessions) -> None:
    limited(sessions, 1)
    lease = claim(sessions).lease
    with pytest.raises(TooManyJobs):
        limited(sessions, 1)
    lifecycle.requeue(sessions, lease, Reason("lost", "Gone."), cause="lost")
    with pytest.raises(TooManyJobs):
        limited(sessions, 1)
    lifecycle.settle(sessions, claim(sessions).lease, "failed", Reason("bug", "It broke."))
    job_id, _ = limited(sessions, 1)
    lifecycle.cancel(sessions, account(sessions), job_id)
    lifecycle.cancel(sessions, account(sessions), job_id)
    limited(sessions, 1)
    assert quotas.usage(sessions, "clinic").active_jobs == 1
    assert audit(sessions) == []


def test_the_last_place_is_given_away_once(sessions: Sessions) -> None:
    for _ in range(3):
        limited(sessions, 4)
    outcomes = at_once(*[lambda: limited(sessions, 4)] * 8)
    assert [type(outcome) for outcome in outcomes].count(TooManyJobs) == 7
    assert quotas.usage(sessions, "clinic").active_jobs == 4


def test_a_known_key_is_never_refused(sessions: Sessions) -> None:
    job_id, _ = limited(sessions, 1, "one")
    assert limited(sessions, 1, "one") == (job_id, False)
    with pytest.raises(IdempotencyConflict):
        limited(sessions, 1, "one", name="another")
    with pytest.raises(TooManyJobs):
        limited(sessions, 1, "two")
    with transaction(sessions) as session:
        assert session.scalars(text("SELECT key FROM idempotency_keys")).all() == ["one"]


def test_one_key_at_once_takes_the_last_place_once_and_all_get_it(sessions: Sessions) -> None:
    outcomes = at_once(*[lambda: limited(sessions, 1, "one")] * 8)
    assert len({job_id for job_id, _ in outcomes}) == 1
    assert sorted(is_new for _, is_new in outcomes) == [False] * 7 + [True]
    assert quotas.usage(sessions, "clinic").active_jobs == 1


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("key", ["one", None])
def test_a_submit_whose_answer_is_lost_takes_one_place(sessions: Sessions, committed: bool, key: str | None) -> None:
    account(sessions)
    with lost_answer(sessions, committed=committed):
        job_id, is_new = lifecycle.submit(sessions, order(account_of(sessions)), key, 1)
    assert is_new
    assert quotas.usage(sessions, "clinic").active_jobs == 1
    assert claim(sessions).lease.job_id == job_id


def account_of(sessions: Sessions) -> UUID:
    """The account's id by a look alone, for whoever counts commits."""
    engine = sessions.kw["bind"]
    with engine.connect() as connection:
        found: UUID = connection.scalar(text("SELECT id FROM accounts WHERE name = 'clinic'"))
    return found


def test_a_retry_needs_room_and_an_operators_release_does_not(sessions: Sessions) -> None:
    job_id = submit(sessions)
    for _ in range(2):
        lifecycle.requeue(sessions, claim(sessions).lease, Reason("child_crashed", "It died."), cause="crashed")
    submit(sessions)
    with pytest.raises(TooManyJobs):
        repeats.retry(sessions, account(sessions), job_id, None, 1)
    assert repeats.release(sessions, job_id)[1]


def test_an_accounts_own_limit_is_stronger(sessions: Sessions) -> None:
    account(sessions)
    assert quotas.allow(sessions, "clinic", max_active_jobs=2) == Usage(0, 2, 0, None)
    for _ in range(2):
        limited(sessions, 1)
    with pytest.raises(TooManyJobs, match="of at most 2"):
        limited(sessions, 1)
    quotas.allow(sessions, "clinic", max_active_jobs=0)  # what it has it keeps
    with pytest.raises(TooManyJobs, match="2 of at most 0 jobs queued or running"):
        limited(sessions, 9)
    quotas.allow(sessions, "clinic", max_active_jobs=None)
    limited(sessions, 9)
    with pytest.raises(NotFound):
        quotas.allow(sessions, "nobody", max_active_jobs=1)


# ---------------------------------------------------------------- bytes


def test_uploads_have_at_most_so_many_bytes(sessions: Sessions, storage: Storage, settings: Settings) -> None:
    announced(sessions, storage, settings, 150)
    announced(sessions, storage, settings, 150)
    with pytest.raises(StorageQuotaReached, match=r"the file has 60 bytes, and the account's uploads have 120 of"):
        announced(sessions, storage, settings, 150)
    with pytest.raises(StorageQuotaReached, match="at most 150"):  # one that would have been sent in parts
        announced(sessions, storage, settings, 150, size_bytes=101)
    assert list(storage.list_multiparts("incoming/", older_than_seconds=-60)) == []
    quotas.allow(sessions, "clinic", max_stored_bytes=180)
    announced(sessions, storage, settings, 150)
    assert quotas.usage(sessions, "clinic") == Usage(0, None, 180, 180)
    assert audit(sessions) == []


def test_two_files_for_the_last_bytes_are_one(sessions: Sessions, storage: Storage, settings: Settings) -> None:
    outcomes = at_once(*[lambda: announced(sessions, storage, settings, 100)] * 4)
    assert [type(outcome) for outcome in outcomes].count(StorageQuotaReached) == 3


def test_what_lapsed_is_given_back(sessions: Sessions, storage: Storage, settings: Settings) -> None:
    announced(sessions, storage, settings, 100)
    execute(sessions, "UPDATE artifacts SET expires_at = now() - interval '1 second'")
    uploads.forget_expired(sessions, storage)
    announced(sessions, storage, settings, 100)
    assert audit(sessions) == []


# ---------------------------------------------------------------- counts


def test_a_backup_that_comes_back_is_counted_once(sessions: Sessions, storage: Storage, settings: Settings) -> None:
    for _ in range(3):
        submit(sessions)
    announced(sessions, storage, settings, 100)
    lines = list(backup.export(sessions, "clinic"))
    execute(sessions, "DELETE FROM accounts WHERE name = 'clinic'")
    backup.load(sessions, lines)
    assert quotas.usage(sessions, "clinic") == Usage(3, None, 60, None)
    assert audit(sessions) == []


def test_rows_that_are_removed_by_hand_are_counted_too(sessions: Sessions) -> None:
    for _ in range(3):
        submit(sessions)
    execute(sessions, "DELETE FROM jobs WHERE id = (SELECT id FROM jobs LIMIT 1)")
    execute(sessions, "UPDATE jobs SET priority = 7")
    assert quotas.usage(sessions, "clinic").active_jobs == 2
