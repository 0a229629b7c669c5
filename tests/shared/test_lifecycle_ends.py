"""The ledger, one caller at a time: how a job ends, or goes back to be tried again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select, text

from shared import lifecycle, repeats
from shared.db import Sessions, transaction
from shared.errors import Conflict, IdempotencyConflict, LeaseLost, NotFound
from shared.ledger import Lease, Progress, Reason
from shared.models import Artifact
from tests.shared.ledger_desk import (
    ABLE,
    CRASHED,
    LOST,
    account,
    claim,
    due,
    events,
    job,
    lapse,
    stages,
    stored,
    submit,
)

pytestmark = pytest.mark.usefixtures("ledger_in_order")


# ---------------------------------------------------------------- the end


def test_a_job_succeeds_with_its_report_and_verdict(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    for position in (0, 1):
        lifecycle.start_stage(sessions, lease, position)
        lifecycle.finish_stage(sessions, lease, position, "succeeded", {}, [stored(f"{position}.onnx")])
    lifecycle.settle(sessions, lease, "succeeded", None, {"verdict": "met"}, [stored("report.json")])
    ended = job(sessions, job_id)
    assert (ended.status, ended.verdict, ended.report, ended.state_reason) == (
        "succeeded",
        "met",
        {"verdict": "met"},
        None,
    )
    assert (ended.lease_token, ended.lease_expires_at, ended.worker_id) == (None, None, None)
    assert ended.finished_at is not None
    assert events(sessions, job_id)[-1] == "succeeded"
    with transaction(sessions) as session:
        positions = session.execute(select(Artifact.name, Artifact.stage_position).order_by(Artifact.name)).all()
    assert [tuple(row) for row in positions] == [("0.onnx", 0), ("1.onnx", 1), ("report.json", None)]


def test_a_failed_job_names_the_stage_and_skips_the_rest(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    reason = Reason("stage_failed", "The weights hold NaN.", hint="Train again.", stage=0, fault="user")
    lifecycle.settle(sessions, lease, "failed", reason)
    ended = job(sessions, job_id)
    assert (ended.status, ended.report, ended.verdict) == ("failed", None, None)
    assert ended.state_reason == {
        "code": "stage_failed",
        "message": "The weights hold NaN.",
        "hint": "Train again.",
        "stage": 0,
        "fault": "user",
    }
    assert [(s.status, s.message) for s in stages(sessions, job_id)] == [
        ("failed", "The weights hold NaN."),
        ("skipped", None),
    ]


def test_what_is_not_known_is_null_and_no_json_null(sessions: Sessions) -> None:
    submit(sessions)
    lifecycle.settle(sessions, claim(sessions).lease, "cancelled")
    with transaction(sessions) as session:
        row = session.execute(
            text("SELECT state_reason IS NULL, report IS NULL, baseline IS NULL FROM jobs")
        ).one()
    assert tuple(row) == (True, True, True)


def _writes(lease: Lease) -> dict[str, Callable[[Sessions], Any]]:
    """Every write of a worker, by name."""
    return {
        "heartbeat": lambda s: lifecycle.heartbeat(s, lease, 30),
        "progress": lambda s: lifecycle.heartbeat(s, lease, 30, Progress(0, 0.5, "still here"), "log"),
        "baseline": lambda s: lifecycle.record_baseline(s, lease, {"stale": True}),
        "start": lambda s: lifecycle.start_stage(s, lease, 0),
        "finish": lambda s: lifecycle.finish_stage(s, lease, 0, "succeeded", {"stale": True}, [stored()]),
        "settle": lambda s: lifecycle.settle(s, lease, "succeeded", None, {"verdict": "met"}, [stored()]),
        "give back": lambda s: lifecycle.requeue(s, lease, LOST, cause="given_back", stored=[stored()]),
        "requeue": lambda s: lifecycle.requeue(s, lease, CRASHED, cause="crashed", stored=[stored()]),
    }


def _everything(sessions: Sessions) -> list[Any]:
    tables = ("jobs", "stage_runs", "job_events", "artifacts")
    with transaction(sessions) as session:
        return [session.execute(text(f"SELECT t::text FROM {name} t ORDER BY 1")).all() for name in tables]


@pytest.mark.parametrize("since", ["requeued", "claimed anew", "finished anew", "settled", "cancelled"])
def test_a_stale_workers_writes_touch_nothing(sessions: Sessions, since: str) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    stale = claim(sessions).lease
    lifecycle.start_stage(sessions, stale, 0)
    lapse(sessions, job_id)
    assert lifecycle.sweep_leases(sessions) == 1
    if since != "requeued":
        fresh = claim(sessions, replace(ABLE, worker_id="worker-2")).lease
        lifecycle.start_stage(sessions, fresh, 0)
        if since != "claimed anew":
            lifecycle.finish_stage(sessions, fresh, 0, "succeeded", {}, [])
        if since == "settled":
            lifecycle.settle(sessions, fresh, "failed", LOST)
        if since == "cancelled":
            lifecycle.cancel(sessions, owner, job_id)
            lifecycle.settle(sessions, fresh, "cancelled", LOST)
    before = _everything(sessions)
    for name, write in _writes(stale).items():
        with pytest.raises(LeaseLost):
            write(sessions)
        assert _everything(sessions) == before, name


def test_a_lease_of_another_job_opens_nothing(sessions: Sessions) -> None:
    first, second = submit(sessions), submit(sessions)
    claim(sessions)
    other = claim(sessions).lease
    assert other.job_id == second
    for write in _writes(Lease(first, other.token)).values():
        with pytest.raises(LeaseLost):
            write(sessions)


# ---------------------------------------------------------------- give back, requeue, quarantine


def test_giving_a_job_back_does_not_burn_an_attempt(sessions: Sessions) -> None:
    job_id = submit(sessions, max_attempts=1)
    for _ in range(4):
        lease, stops = claim(sessions).lease, Reason("drained", "The worker stops.")
        assert lifecycle.requeue(sessions, lease, stops, cause="given_back") == "queued"
    waiting = job(sessions, job_id)
    assert (waiting.status, waiting.attempt, waiting.max_attempts, waiting.crashes) == ("queued", 4, 5, 0)
    lifecycle.settle(sessions, claim(sessions).lease, "succeeded", None, {"verdict": "met"})


def test_a_requeue_says_why_the_job_waits_until_it_is_claimed(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lifecycle.requeue(sessions, claim(sessions).lease, LOST, cause="lost")
    assert job(sessions, job_id).state_reason == LOST.as_dict()
    claim(sessions)
    assert job(sessions, job_id).state_reason is None


def test_a_job_whose_attempts_are_used_up_fails_and_says_so(sessions: Sessions) -> None:
    job_id = submit(sessions, max_attempts=2)
    assert lifecycle.requeue(sessions, claim(sessions).lease, LOST, cause="lost") == "queued"
    assert lifecycle.requeue(sessions, claim(sessions).lease, LOST, cause="lost") == "failed"
    ended = job(sessions, job_id)
    assert ended.state_reason is not None
    assert ended.state_reason["message"] == "All 2 attempts are used up. Last: The worker fell silent."
    assert [stage.status for stage in stages(sessions, job_id)] == ["skipped", "skipped"]


def test_a_job_that_crashes_twice_without_progress_is_quarantined(sessions: Sessions) -> None:
    job_id = submit(sessions, max_attempts=10)
    assert lifecycle.requeue(sessions, claim(sessions).lease, CRASHED, cause="crashed") == "queued"
    assert lifecycle.requeue(sessions, claim(sessions).lease, CRASHED, cause="crashed") == "failed"
    ended = job(sessions, job_id)
    assert ended.state_reason is not None
    assert ended.state_reason["code"] == "quarantined"
    assert [stage.status for stage in stages(sessions, job_id)] == ["failed", "skipped"]


def test_a_finished_stage_takes_the_crashes_before_it_off_the_count(sessions: Sessions) -> None:
    job_id = submit(sessions, max_attempts=10)
    lifecycle.requeue(sessions, claim(sessions).lease, CRASHED, cause="crashed")
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    lifecycle.finish_stage(sessions, lease, 0, "succeeded", {}, [])
    assert lifecycle.requeue(sessions, lease, CRASHED, cause="crashed") == "queued"
    assert job(sessions, job_id).crashes == 1


def test_a_lost_worker_between_two_crashes_does_not_take_them_off_the_count(sessions: Sessions) -> None:
    submit(sessions, max_attempts=10)
    lifecycle.requeue(sessions, claim(sessions).lease, CRASHED, cause="crashed")
    lifecycle.requeue(sessions, claim(sessions).lease, LOST, cause="lost")
    assert lifecycle.requeue(sessions, claim(sessions).lease, CRASHED, cause="crashed") == "failed"


def test_the_delay_doubles_with_each_attempt_and_is_jittered(sessions: Sessions) -> None:
    ratios = []
    for _ in range(4):
        job_id = submit(sessions, max_attempts=10)
        for attempt in (1, 2, 3):
            lifecycle.requeue(sessions, claim(sessions).lease, LOST, cause="lost", delay_seconds=100)
            delay = (job(sessions, job_id).available_at - datetime.now(UTC)).total_seconds()
            ratios.append(delay / (100 * 2 ** (attempt - 1)))
            due(sessions, job_id)
        lifecycle.settle(sessions, claim(sessions).lease, "cancelled")
    assert 0.45 < min(ratios) < max(ratios) < 1.5
    assert max(ratios) - min(ratios) > 0.2  # of 12 between 0.5 and 1.5


def test_files_of_a_lost_attempt_can_be_kept_with_it(sessions: Sessions) -> None:
    job_id = submit(sessions)
    log = replace(stored("log.1.txt"), role="log", format="text")
    lifecycle.requeue(sessions, claim(sessions).lease, CRASHED, cause="crashed", stored=[log])
    with transaction(sessions) as session:
        kept = session.scalars(select(Artifact).where(Artifact.job_id == job_id)).one()
    assert (kept.name, kept.attempt, kept.stage_position) == ("log.1.txt", 1, None)


@pytest.mark.parametrize("way", ["give back", "requeue", "sweep"])
def test_a_cancel_wins_over_another_attempt(sessions: Sessions, way: str) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    lease = claim(sessions).lease
    lifecycle.cancel(sessions, owner, job_id)
    if way == "sweep":
        lapse(sessions, job_id)
        lifecycle.sweep_leases(sessions)
    else:
        assert _writes(lease)[way](sessions) == "cancelled"
    assert job(sessions, job_id).status == "cancelled"


# ---------------------------------------------------------------- the sweeper


def test_the_sweeper_requeues_lapsed_leases_and_no_others(sessions: Sessions) -> None:
    owner = account(sessions)
    lapsed, alive, waiting = (submit(sessions, owner) for _ in range(3))
    claim(sessions)
    claim(sessions)
    lapse(sessions, lapsed)
    assert lifecycle.sweep_leases(sessions) == 1
    assert lifecycle.sweep_leases(sessions) == 0
    assert [job(sessions, job_id).status for job_id in (lapsed, alive, waiting)] == ["queued", "running", "queued"]
    assert events(sessions, lapsed) == ["submitted", "claimed", "requeued"]


def test_a_job_that_lost_its_worker_waits_before_it_takes_the_next(sessions: Sessions) -> None:
    job_id = submit(sessions)
    claim(sessions)
    lapse(sessions, job_id)
    assert lifecycle.sweep_leases(sessions, delay_seconds=100) == 1
    assert lifecycle.claim(sessions, ABLE, 30) is None
    due(sessions, job_id)
    assert claim(sessions).attempt == 2


def test_the_sweeper_takes_no_more_than_its_limit_at_a_time(sessions: Sessions) -> None:
    owner = account(sessions)
    for job_id in [submit(sessions, owner) for _ in range(5)]:
        claim(sessions)
        lapse(sessions, job_id)
    assert [lifecycle.sweep_leases(sessions, limit=2) for _ in range(4)] == [2, 2, 1, 0]


def test_a_waiting_job_is_told_why_once_and_untold_once(sessions: Sessions) -> None:
    job_id = submit(sessions)
    why = Reason("no_worker", "No live worker serves the queue.")
    for _ in range(3):
        lifecycle.explain_waiting(sessions, job_id, why)
    assert job(sessions, job_id).state_reason == why.as_dict()
    for _ in range(3):
        lifecycle.explain_waiting(sessions, job_id, None)
    assert job(sessions, job_id).state_reason is None
    assert events(sessions, job_id) == ["submitted", "waiting", "waiting"]


def test_only_a_queued_job_waits_for_a_reason(sessions: Sessions) -> None:
    job_id = submit(sessions)
    claim(sessions)
    lifecycle.explain_waiting(sessions, job_id, Reason("no_worker", "None."))
    assert job(sessions, job_id).state_reason is None


# ---------------------------------------------------------------- cancel and retry


def test_a_queued_job_is_cancelled_at_once(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    assert lifecycle.cancel(sessions, owner, job_id) == "cancelled"
    ended = job(sessions, job_id)
    assert ended.state_reason == {"code": "cancelled", "message": "Cancelled while it waited.", "fault": "user"}
    assert [stage.status for stage in stages(sessions, job_id)] == ["skipped", "skipped"]
    assert lifecycle.claim(sessions, ABLE, 30) is None


def test_a_running_job_is_asked_once_and_ended_by_its_worker(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    lease = claim(sessions).lease
    assert [lifecycle.cancel(sessions, owner, job_id) for _ in range(3)] == ["running"] * 3
    assert events(sessions, job_id) == ["submitted", "claimed", "cancel_requested"]
    lifecycle.settle(sessions, lease, "cancelled", Reason("cancelled", "Cancelled while it ran.", fault="user"))
    assert lifecycle.cancel(sessions, owner, job_id) == "cancelled"


def test_cancelling_an_ended_job_leaves_it_as_it_is(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    lifecycle.settle(sessions, claim(sessions).lease, "succeeded", None, {"verdict": "missed"})
    assert lifecycle.cancel(sessions, owner, job_id) == "succeeded"
    assert job(sessions, job_id).cancel_requested_at is None


def test_another_accounts_job_reads_as_missing(sessions: Sessions) -> None:
    job_id, stranger = submit(sessions), account(sessions, "stranger")
    for verb in (lifecycle.cancel, repeats.retry):
        with pytest.raises(NotFound):
            verb(sessions, stranger, job_id)
        with pytest.raises(NotFound):
            verb(sessions, stranger, uuid4())
    assert job(sessions, job_id).status == "queued"


def test_a_retry_is_a_new_job_that_says_what_it_repeats(sessions: Sessions) -> None:
    owner = account(sessions)
    facts: dict[str, Any] = {"tags": ["mri"], "queue": "gpu", "priority": 3, "max_attempts": 5}
    job_id = submit(sessions, owner, required_memory_bytes=77, **facts)
    lifecycle.cancel(sessions, owner, job_id)
    again_id, new = repeats.retry(sessions, owner, job_id)
    old, again = job(sessions, job_id), job(sessions, again_id)
    assert new
    assert (again.retry_of, again.status, again.attempt) == (job_id, "queued", 0)
    for name in (*facts, "name", "recipe", "requires", "required_memory_bytes", "timeout_seconds"):
        assert getattr(again, name) == getattr(old, name), name


def test_a_job_that_has_not_ended_is_not_retried(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    for status in ("queued", "running"):
        with pytest.raises(Conflict, match=f"the job is {status}"):
            repeats.retry(sessions, owner, job_id)
        if status == "queued":
            claim(sessions)


def test_a_retry_with_a_key_is_one_job_too(sessions: Sessions) -> None:
    owner = account(sessions)
    first, second = submit(sessions, owner), submit(sessions, owner)
    for job_id in (first, second):
        lifecycle.cancel(sessions, owner, job_id)
    again = repeats.retry(sessions, owner, first, "once")
    assert repeats.retry(sessions, owner, first, "once") == (again[0], False)
    with pytest.raises(IdempotencyConflict):
        repeats.retry(sessions, owner, second, "once")
