"""Commits whose answer is lost: each write finds out what became of it, and is told or done once, never twice."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select, text

from burnish.local.waiting import wait_until
from shared import checkpoints, lifecycle
from shared.db import Sessions, resolved, transaction
from shared.errors import CommitUnknown, DatabaseUnavailable, LeaseLost
from shared.ledger import Lease, Reason
from shared.models import Artifact
from tests.shared.ledger_desk import (
    ABLE,
    account,
    claim,
    events,
    job,
    lapse,
    lost_answer,
    order,
    stages,
    stored,
    submit,
    waits_for_a_lock,
)

pytestmark = pytest.mark.usefixtures("ledger_in_order")

WHY = Reason("why", "So that it ends.")
Write = Callable[[Sessions, Lease], Any]

both = pytest.mark.parametrize("committed", [True, False], ids=["committed", "not committed"])


@both
@pytest.mark.parametrize("key", ["monday", None], ids=["with a key", "without a key"])
def test_a_submit_is_one_job(sessions: Sessions, committed: bool, key: str | None) -> None:
    owner = account(sessions)
    with lost_answer(sessions, committed=committed):
        job_id, new = lifecycle.submit(sessions, order(owner), key)
    assert new
    assert events(sessions, job_id) == ["submitted"]
    assert len(stages(sessions, job_id)) == 2
    assert claim(sessions).lease.job_id == job_id
    assert lifecycle.claim(sessions, ABLE, 30) is None


def test_a_claim_that_was_committed_is_the_claimers(sessions: Sessions) -> None:
    job_id = submit(sessions)
    with lost_answer(sessions, committed=True):
        taken = claim(sessions)
    assert taken.lease.job_id == job_id
    lifecycle.heartbeat(sessions, taken.lease, 30)
    assert events(sessions, job_id) == ["submitted", "claimed"]


def test_a_claim_that_was_not_committed_leaves_the_job_for_the_next(sessions: Sessions) -> None:
    job_id = submit(sessions)
    with lost_answer(sessions, committed=False):
        assert lifecycle.claim(sessions, ABLE, 30) is None
    assert (job(sessions, job_id).status, job(sessions, job_id).attempt) == ("queued", 0)
    assert claim(sessions).lease.job_id == job_id


@both
def test_a_baseline_is_told_once(sessions: Sessions, committed: bool) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    with lost_answer(sessions, committed=committed):
        lifecycle.record_baseline(sessions, lease, {"p50": 1.5})
    assert job(sessions, job_id).baseline == {"p50": 1.5}
    assert events(sessions, job_id) == ["submitted", "claimed", "baseline_measured"]


@both
def test_a_stage_is_started_and_finished_once(sessions: Sessions, committed: bool) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    with lost_answer(sessions, committed=committed):
        lifecycle.start_stage(sessions, lease, 0)
    with lost_answer(sessions, committed=committed):
        lifecycle.finish_stage(sessions, lease, 0, "succeeded", {"reason": "Good."}, [stored()])
    assert events(sessions, job_id) == ["submitted", "claimed", "stage_started", "stage_finished"]
    assert [stage.status for stage in stages(sessions, job_id)] == ["succeeded", "pending"]
    with transaction(sessions) as session:
        assert len(session.scalars(select(Artifact)).all()) == 1


@both
def test_a_checkpoint_is_kept_once(sessions: Sessions, committed: bool) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    with lost_answer(sessions, committed=committed):
        checkpoints.keep(sessions, lease, 0, replace(stored("0-epoch.checkpoint"), role=checkpoints.ROLE))
    with transaction(sessions) as session:
        kept = session.scalars(select(Artifact).where(Artifact.job_id == job_id)).all()
    assert [(artifact.name, artifact.status) for artifact in kept] == [("0-epoch.checkpoint", "ready")]


ENDINGS: dict[str, tuple[Write, str]] = {
    "succeeded": (lambda s, lease: lifecycle.settle(s, lease, "succeeded", None, {"verdict": "met"}), "succeeded"),
    "failed": (lambda s, lease: lifecycle.settle(s, lease, "failed", WHY), "failed"),
    "given back": (lambda s, lease: lifecycle.requeue(s, lease, WHY, cause="given_back"), "queued"),
    "requeued": (lambda s, lease: lifecycle.requeue(s, lease, WHY, cause="storage"), "queued"),
    "used up": (lambda s, lease: lifecycle.requeue(s, lease, WHY, cause="lost"), "failed"),
}


def _claimed(sessions: Sessions, ending: str) -> Lease:
    submit(sessions, max_attempts=1 if ending == "used up" else 3)
    return claim(sessions).lease


@both
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_attempt_ends_once(sessions: Sessions, ending: str, committed: bool) -> None:
    write, status = ENDINGS[ending]
    lease = _claimed(sessions, ending)
    with lost_answer(sessions, committed=committed):
        told = write(sessions, lease)
    assert told in (None, status)
    assert job(sessions, lease.job_id).status == status
    assert len(events(sessions, lease.job_id)) == 3


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_that_is_written_again_much_later_changes_nothing(sessions: Sessions, ending: str) -> None:
    """The database can be away for longer than one call looks: the worker then makes the whole call again."""
    write, status = ENDINGS[ending]
    lease = _claimed(sessions, ending)
    write(sessions, lease)
    if status == "queued":
        lifecycle.settle(sessions, claim(sessions).lease, "failed", WHY)
    told = events(sessions, lease.job_id)
    assert write(sessions, lease) in (None, status)
    assert events(sessions, lease.job_id) == told


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_the_sweeper_wrote_is_not_taken_for_the_workers_own(sessions: Sessions, ending: str) -> None:
    lease = _claimed(sessions, ending)
    lapse(sessions, lease.job_id)
    assert lifecycle.sweep_leases(sessions) == 1
    with pytest.raises(LeaseLost):
        ENDINGS[ending][0](sessions, lease)


def test_one_ending_is_not_taken_for_another(sessions: Sessions) -> None:
    submit(sessions)
    lease = claim(sessions).lease
    lifecycle.settle(sessions, lease, "succeeded", None, {"verdict": "met"})
    with pytest.raises(LeaseLost):
        lifecycle.settle(sessions, lease, "failed", WHY)
    with pytest.raises(LeaseLost):
        lifecycle.requeue(sessions, lease, WHY, cause="lost")


@both
def test_a_cancel_is_asked_once(sessions: Sessions, committed: bool) -> None:
    owner = account(sessions)
    waiting, running = submit(sessions, owner, priority=1), submit(sessions, owner)
    claim(sessions)
    for job_id in (waiting, running):
        before = job(sessions, job_id).status
        with lost_answer(sessions, committed=committed):
            told = lifecycle.cancel(sessions, owner, job_id)
        assert told == ("cancelled" if before == "queued" else "running")
        assert sum(kind.startswith("cancel") for kind in events(sessions, job_id)) == 1


def test_a_write_waits_for_a_commit_that_is_still_under_way(sessions: Sessions) -> None:
    """Its own, that a cut connection left behind in the server: else it would not know what became of it."""
    submit(sessions)
    lease = claim(sessions).lease
    with sessions() as behind, ThreadPoolExecutor(1) as pool:
        behind.execute(text("SELECT FROM jobs WHERE id = :id FOR UPDATE"), {"id": lease.job_id})
        again = pool.submit(lifecycle.settle, sessions, lease, "failed", WHY)
        assert wait_until(lambda: waits_for_a_lock(sessions), timeout_seconds=10)
        assert not again.done()
        behind.commit()
    assert again.result() is None
    assert events(sessions, lease.job_id) == ["submitted", "claimed", "failed"]


# ---------------------------------------------------------------- how it is found out


def test_what_is_known_is_not_asked_again(sessions: Sessions) -> None:
    def write() -> str:
        raise DatabaseUnavailable

    with pytest.raises(DatabaseUnavailable):
        resolved(write, lambda: pytest.fail("nobody has to look"))


def test_a_lost_commit_is_told_from_other_failures(sessions: Sessions) -> None:
    with pytest.raises(CommitUnknown), lost_answer(sessions, committed=True), transaction(sessions) as session:
        session.execute(select(Artifact))
