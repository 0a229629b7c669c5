"""The ledger, many callers at once: whoever comes first, exactly one of them wins and the events say which."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from burnish.local.waiting import wait_until
from shared import entries, lifecycle
from shared.db import Sessions, make_sessions, transaction
from shared.errors import IdempotencyConflict, LeaseLost
from shared.ledger import Lease, Progress, Reason
from shared.models import Artifact, StageRun
from shared.settings import Settings
from tests.audit import audit
from tests.shared.ledger_desk import (
    ABLE,
    LOST,
    account,
    at_once,
    claim,
    due,
    events,
    job,
    lapse,
    order,
    stages,
    stored,
    submit,
    waits_for_a_lock,
)

pytestmark = pytest.mark.usefixtures("ledger_in_order")

ENDED = ("succeeded", "failed", "cancelled")


@pytest.fixture
def crowd(settings: Settings) -> Any:
    """Sessions for 16 threads at once."""
    made = make_sessions(settings, pool_size=16)
    yield made
    made.kw["bind"].dispose()


def test_two_claims_have_one_winner(sessions: Sessions) -> None:
    for _ in range(50):
        job_id = submit(sessions)
        taken = at_once(*[lambda: lifecycle.claim(sessions, ABLE, 30)] * 2)
        winners = [entry for entry in taken if entry is not None]
        assert [entry.lease.job_id for entry in winners] == [job_id]
        lifecycle.settle(sessions, winners[0].lease, "succeeded", None, {"verdict": "met"})


def test_sixteen_workers_claim_two_hundred_jobs_once_each(sessions: Sessions, crowd: Sessions) -> None:
    owners = [account(sessions, f"account-{number}") for number in range(4)]
    expected = {submit(sessions, owners[number % 4]) for number in range(200)}

    def claim_all(worker: int) -> list[UUID]:
        mine = replace(ABLE, worker_id=f"worker-{worker}")
        return [taken.lease.job_id for taken in iter(lambda: lifecycle.claim(crowd, mine, 30), None)]

    claimed = list(itertools.chain(*at_once(*[lambda n=n: claim_all(n) for n in range(16)])))
    while (left := lifecycle.claim(crowd, ABLE, 30)) is not None:
        claimed.append(left.lease.job_id)
    assert len(claimed) == 200
    assert set(claimed) == expected


def test_ten_submits_with_one_key_are_one_job(sessions: Sessions, crowd: Sessions) -> None:
    owner = account(sessions)
    for key in ("monday", "tuesday", "wednesday"):
        answers = at_once(*[lambda key=key: lifecycle.submit(crowd, order(owner), key)] * 10)
        assert len({job_id for job_id, _new in answers}) == 1
        assert [new for _job_id, new in answers].count(True) == 1


def test_one_key_for_ten_requests_is_one_job_and_nine_conflicts(sessions: Sessions, crowd: Sessions) -> None:
    owner = account(sessions)
    answers = at_once(*[lambda n=n: lifecycle.submit(crowd, order(owner, name=f"n{n}"), "key") for n in range(10)])
    assert sorted(type(answer).__name__ for answer in answers) == ["IdempotencyConflict"] * 9 + ["tuple"]
    assert any(isinstance(answer, IdempotencyConflict) for answer in answers)


def test_eight_sweepers_requeue_a_lapsed_job_once(sessions: Sessions, crowd: Sessions) -> None:
    owner = account(sessions)
    jobs = [submit(sessions, owner) for _ in range(20)]
    for job_id in jobs:
        claim(sessions)
        lapse(sessions, job_id)
    assert sum(at_once(*[lambda: lifecycle.sweep_leases(crowd)] * 8)) == 20
    assert all(events(sessions, job_id) == ["submitted", "claimed", "requeued"] for job_id in jobs)


def test_cancel_against_claim_never_loses_the_cancel(sessions: Sessions) -> None:
    owner = account(sessions)
    for _ in range(100):
        job_id = submit(sessions, owner)
        told, taken = at_once(
            lambda job_id=job_id: lifecycle.cancel(sessions, owner, job_id),
            lambda: lifecycle.claim(sessions, ABLE, 30),
        )
        if told == "cancelled":
            assert taken is None
            assert job(sessions, job_id).status == "cancelled"
        else:
            assert lifecycle.heartbeat(sessions, taken.lease, 30).cancel_requested
            lifecycle.settle(sessions, taken.lease, "cancelled", LOST)


def test_cancel_against_requeue_never_loses_the_cancel(sessions: Sessions) -> None:
    owner = account(sessions)
    for _ in range(100):
        job_id = submit(sessions, owner)
        lease = claim(sessions).lease
        at_once(
            lambda job_id=job_id: lifecycle.cancel(sessions, owner, job_id),
            lambda lease=lease: lifecycle.requeue(sessions, lease, LOST, cause="lost"),
        )
        assert job(sessions, job_id).status == "cancelled"


def test_three_cancels_at_once_end_a_queued_job_once(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    assert at_once(*[lambda: lifecycle.cancel(sessions, owner, job_id)] * 3) == ["cancelled"] * 3
    assert events(sessions, job_id) == ["submitted", "cancelled"]


def test_heartbeat_against_sweeper_leaves_no_second_lease(sessions: Sessions) -> None:
    owner = account(sessions)
    for _ in range(50):
        job_id = submit(sessions, owner)
        lease = claim(sessions).lease
        lapse(sessions, job_id)
        swept, beaten = at_once(
            lambda: lifecycle.sweep_leases(sessions), lambda lease=lease: lifecycle.heartbeat(sessions, lease, 30)
        )
        assert isinstance(beaten, LeaseLost) == (swept == 1)
        assert job(sessions, job_id).status == ("queued" if swept else "running")
        lifecycle.cancel(sessions, owner, job_id)
        if not swept:
            lifecycle.requeue(sessions, lease, LOST, cause="given_back")


def test_finishing_a_stage_twice_at_once_is_one_completion(sessions: Sessions) -> None:
    for _ in range(20):
        job_id = submit(sessions)
        lease = claim(sessions).lease
        lifecycle.start_stage(sessions, lease, 0)
        at_once(*[lambda lease=lease: lifecycle.finish_stage(sessions, lease, 0, "succeeded", {}, [])] * 2)
        assert events(sessions, job_id).count("stage_finished") == 1
        lifecycle.settle(sessions, lease, "failed", LOST)


def end_behind(sessions: Sessions, lease: Lease, others: Callable[[Session], object]) -> None:
    """The first stage's end, which waits for a transaction in which others change the job, and comes after it."""
    with ThreadPoolExecutor(1) as pool:
        with transaction(sessions) as session:
            others(session)
            end = pool.submit(lifecycle.finish_stage, sessions, lease, 0, "succeeded", {"ok": 1}, [stored("own.onnx")])
            assert wait_until(lambda: waits_for_a_lock(sessions), timeout_seconds=10)
        end.result(timeout=30)


@pytest.mark.parametrize("came_first", ["log", "cancel_requested"])
def test_an_event_that_comes_as_a_stage_ends_is_followed_by_that_end(sessions: Sessions, came_first: str) -> None:
    """The end was made from what it saw before: it looks again, and is written once."""
    lease = running(sessions)
    end_behind(sessions, lease, lambda session: entries.change(session, entries.held(lease), {}, came_first))
    assert events(sessions, lease.job_id) == ["submitted", "claimed", "stage_started", came_first, "stage_finished"]
    stage = stages(sessions, lease.job_id)[0]
    assert (stage.status, stage.report, stage.attempt) == ("succeeded", {"ok": 1}, 1)
    assert pointers(sessions, lease.job_id) == ["own.onnx"]


def test_a_stages_end_that_is_still_being_committed_is_not_written_again(sessions: Sessions) -> None:
    """The first try of the same end, which a cut connection left behind in the server."""
    lease = running(sessions)

    def first_try(session: Session) -> None:
        told = {"stage": 0, "status": "succeeded", "reason": None}
        entries.change(session, entries.held(lease), {"crashes": 0}, "stage_finished", told, lease)
        ended = update(StageRun).where(StageRun.job_id == lease.job_id, StageRun.position == 0)
        session.execute(ended.values(status="succeeded", report={}, progress=1.0, finished_at=func.now(), attempt=1))
        entries.point_to(session, lease.job_id, [stored("first.onnx")])

    end_behind(sessions, lease, first_try)
    assert events(sessions, lease.job_id) == ["submitted", "claimed", "stage_started", "stage_finished"]
    assert pointers(sessions, lease.job_id) == ["first.onnx"]


def test_a_lease_that_is_taken_as_a_stage_ends_keeps_that_end_out(sessions: Sessions) -> None:
    lease = running(sessions)

    def take(session: Session) -> None:
        away = {"status": "queued", "lease_token": None, "lease_expires_at": None, "worker_id": None}
        entries.change(session, entries.held(lease), away, "requeued", {"cause": "lost"}, lease)
        session.execute(update(StageRun).where(StageRun.job_id == lease.job_id).values(status="pending"))

    with pytest.raises(LeaseLost):
        end_behind(sessions, lease, take)
    assert events(sessions, lease.job_id) == ["submitted", "claimed", "stage_started", "requeued"]
    assert (stages(sessions, lease.job_id)[0].status, pointers(sessions, lease.job_id)) == ("pending", [])


def running(sessions: Sessions) -> Lease:
    """The lease of a new job whose first stage was started."""
    submit(sessions)
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    return lease


def pointers(sessions: Sessions, job_id: UUID) -> list[str]:
    """The names of the files that the job's rows point to."""
    with transaction(sessions) as session:
        return list(session.scalars(select(Artifact.name).where(Artifact.job_id == job_id)).all())


def test_everybody_at_once_leaves_a_legal_and_gapless_history(sessions: Sessions, crowd: Sessions) -> None:
    """Workers that finish, fail, crash, drain and fall silent, owners that cancel, sweepers: until all has ended."""
    owners = [account(sessions, f"account-{number}") for number in range(3)]
    jobs = [(owner, submit(sessions, owner, max_attempts=4)) for owner in owners for _ in range(12)]
    finished = threading.Event()

    def work(number: int) -> None:
        chance = random.Random(number)
        while not finished.is_set():
            taken = lifecycle.claim(crowd, replace(ABLE, worker_id=f"worker-{number}"), 30)
            if taken is None:
                finished.wait(0.005)
                continue
            try:
                _walk(crowd, taken.lease, chance)
            except LeaseLost:
                continue

    def sweep() -> None:
        while not finished.is_set():
            lifecycle.sweep_leases(crowd)
            finished.wait(0.005)

    def disturb() -> None:
        chance = random.Random(99)
        for owner, job_id in chance.sample(jobs, 10):
            lifecycle.cancel(crowd, owner, job_id)

    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(work, number) for number in range(6)]
        running += [pool.submit(sweep), pool.submit(sweep), pool.submit(disturb)]
        try:
            for _ in range(6000):
                open_jobs = [job_id for _owner, job_id in jobs if job(sessions, job_id).status not in ENDED]
                if not open_jobs:
                    break
                assert audit(sessions) == []
        finally:
            finished.set()
    assert [future.exception() for future in running] == [None] * len(running)
    assert open_jobs == []
    assert audit(sessions, quiet=True) == []


def _walk(sessions: Sessions, lease: Any, chance: random.Random) -> None:
    """One worker's fate with one job."""
    for position in (0, 1):
        fate = chance.random()
        if fate < 0.1:
            lifecycle.requeue(sessions, lease, LOST, cause="crashed")
            due(sessions, lease.job_id)
            return
        if fate < 0.2:
            lifecycle.requeue(sessions, lease, LOST, cause="given_back")
            return
        if fate < 0.3:
            lifecycle.heartbeat(sessions, lease, -1)  # falls silent: the lease is over
            return
        if fate < 0.35:
            lifecycle.settle(sessions, lease, "failed", Reason("stage_failed", "No.", stage=position))
            return
        if position in _open_stages(sessions, lease.job_id):
            lifecycle.start_stage(sessions, lease, position)
            lifecycle.heartbeat(sessions, lease, 30, Progress(position, 0.5, "half"))
            lifecycle.finish_stage(sessions, lease, position, "succeeded", {}, [])
    lifecycle.settle(sessions, lease, "succeeded", None, {"verdict": "met"})


def _open_stages(sessions: Sessions, job_id: UUID) -> list[int]:
    return [stage.position for stage in stages(sessions, job_id) if stage.status in ("pending", "running")]
