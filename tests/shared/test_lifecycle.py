"""The ledger, one caller at a time: submit, claim, finish, give back, requeue, settle, cancel, retry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, text

from shared import lifecycle, repeats
from shared.db import Sessions, transaction
from shared.errors import Conflict, IdempotencyConflict, LeaseLost, NotFound
from shared.ledger import Lease, Progress, Reason
from shared.models import Artifact, JobEvent
from tests.audit import audit
from tests.shared.ledger_desk import (
    ABLE,
    RECIPE,
    account,
    claim,
    due,
    events,
    execute,
    job,
    lapse,
    order,
    stages,
    stored,
    submit,
)

LOST = Reason("worker_lost", "The worker fell silent.")
CRASHED = Reason("child_crashed", "The process died of signal 11.", stage=0)


@pytest.fixture(autouse=True)
def _the_ledger_is_in_order_after_every_test(sessions: Sessions) -> Any:
    yield
    assert audit(sessions) == []


# ---------------------------------------------------------------- submit


def test_a_submit_writes_the_job_its_stages_its_event_and_its_key(sessions: Sessions) -> None:
    owner = account(sessions)
    wanted = order(owner, tags=["mri", "v2"], priority=7, required_memory_bytes=2**40, queue="gpu", max_attempts=5)
    job_id, new = lifecycle.submit(sessions, wanted, "monday")
    written = job(sessions, job_id)
    assert new
    assert (written.account_id, written.name, written.status, written.attempt) == (owner, "unet", "queued", 0)
    assert (written.tags, written.priority, written.queue, written.max_attempts) == (["mri", "v2"], 7, "gpu", 5)
    assert written.required_memory_bytes == 2**40
    assert written.requires == RECIPE.requirements()
    assert written.recipe == RECIPE.model_dump(mode="json")
    assert [(s.position, s.kind, s.status) for s in stages(sessions, job_id)] == [
        (0, "quantize", "pending"),
        (1, "build_engine", "pending"),
    ]
    assert events(sessions, job_id) == ["submitted"]


def test_the_same_key_and_request_give_the_same_job(sessions: Sessions) -> None:
    owner = account(sessions)
    first, new = lifecycle.submit(sessions, order(owner), "monday")
    second, new_again = lifecycle.submit(sessions, order(owner), "monday")
    assert (first, new, new_again) == (second, True, False)


@pytest.mark.parametrize(
    "change",
    [{"name": "other"}, {"priority": 1}, {"tags": ["x"]}, {"timeout_seconds": 1.0}, {"queue": "gpu"}],
    ids=lambda change: next(iter(change)),
)
def test_the_same_key_for_another_request_is_a_conflict(sessions: Sessions, change: dict[str, Any]) -> None:
    owner = account(sessions)
    lifecycle.submit(sessions, order(owner), "monday")
    with pytest.raises(IdempotencyConflict):
        lifecycle.submit(sessions, order(owner, **change), "monday")


def test_a_key_belongs_to_one_account(sessions: Sessions) -> None:
    mine, new = lifecycle.submit(sessions, order(account(sessions, "a")), "monday")
    theirs, also_new = lifecycle.submit(sessions, order(account(sessions, "b")), "monday")
    assert new
    assert also_new
    assert mine != theirs


def test_without_a_key_every_submit_is_a_new_job(sessions: Sessions) -> None:
    assert submit(sessions) != submit(sessions)


# ---------------------------------------------------------------- claim


def test_a_claim_is_one_attempt_with_a_lease(sessions: Sessions) -> None:
    job_id = submit(sessions)
    taken = claim(sessions)
    held = job(sessions, job_id)
    assert (taken.lease.job_id, taken.attempt, taken.name, taken.queue) == (job_id, 1, "unet", "default")
    assert (taken.recipe, taken.baseline) == (RECIPE.model_dump(mode="json"), None)
    assert (held.status, held.worker_id, held.lease_token) == ("running", "worker-1", taken.lease.token)
    assert held.lease_expires_at is not None
    assert held.started_at is not None
    assert held.lease_expires_at - held.started_at == timedelta(seconds=30)
    assert events(sessions, job_id) == ["submitted", "claimed"]


def test_nothing_is_claimed_twice(sessions: Sessions) -> None:
    submit(sessions)
    claim(sessions)
    assert lifecycle.claim(sessions, ABLE, 30) is None


def test_accounts_take_turns_however_long_their_queues(sessions: Sessions) -> None:
    many = account(sessions, "many")
    for _ in range(5):
        submit(sessions, many)
    single = submit(sessions, account(sessions, "single"))
    first = claim(sessions)
    assert first.account_id == many
    assert claim(sessions).lease.job_id == single
    assert claim(sessions).account_id == many


def test_one_worker_alone_serves_accounts_in_turn(sessions: Sessions) -> None:
    """No job is running when a lone worker claims, so who was served last has to decide."""
    a, b = account(sessions, "a"), account(sessions, "b")
    for owner in (a, a, a, b, b, b):
        submit(sessions, owner, priority=1 if owner == a else 0)
    served = []
    for _ in range(6):
        taken = claim(sessions)
        served.append(taken.account_id)
        lifecycle.settle(sessions, taken.lease, "succeeded", report={"verdict": "met"})
    assert served == [a, b, a, b, a, b]


def test_priority_decides_within_an_account_then_age(sessions: Sessions) -> None:
    owner = account(sessions)
    low, older, newer = (submit(sessions, owner, priority=priority) for priority in (0, 5, 5))
    assert [claim(sessions).lease.job_id for _ in range(3)] == [older, newer, low]


@pytest.mark.parametrize(
    "worker",
    [
        replace(ABLE, queues=["gpu"]),
        replace(ABLE, queues=[]),
        replace(ABLE, memory_bytes=2**20),
        replace(ABLE, capabilities=["stage:quantize"]),
        replace(ABLE, capabilities=[]),
    ],
    ids=["another queue", "no queue", "too little memory", "some capabilities", "no capability"],
)
def test_a_worker_that_cannot_do_a_job_does_not_get_it(sessions: Sessions, worker: Any) -> None:
    submit(sessions, required_memory_bytes=2**30)
    assert lifecycle.claim(sessions, worker, 30) is None
    assert lifecycle.claim(sessions, ABLE, 30) is not None


def test_jobs_that_a_worker_cannot_do_hide_none_that_it_can(sessions: Sessions) -> None:
    owner = account(sessions)
    for _ in range(40):
        submit(sessions, owner, queue="gpu", priority=9)
    possible = submit(sessions, owner)
    assert claim(sessions).lease.job_id == possible


def test_a_job_that_is_not_due_yet_waits(sessions: Sessions) -> None:
    submit(sessions)
    lifecycle.requeue(sessions, claim(sessions).lease, LOST, cause="lost", delay_seconds=3600)
    assert lifecycle.claim(sessions, ABLE, 30) is None


# ---------------------------------------------------------------- heartbeat and progress


def test_a_heartbeat_renews_the_lease_by_the_databases_clock(sessions: Sessions) -> None:
    job_id = submit(sessions)
    taken = claim(sessions, lease_seconds=1)
    lifecycle.heartbeat(sessions, taken.lease, 500)
    with transaction(sessions) as session:
        now = session.execute(select(func.now())).scalar_one()
    expires_at = job(sessions, job_id).lease_expires_at
    assert expires_at is not None
    assert timedelta(seconds=499) < expires_at - now <= timedelta(seconds=500)
    assert events(sessions, job_id) == ["submitted", "claimed"]


def test_a_heartbeat_tells_progress_and_log_once_each(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    lifecycle.heartbeat(sessions, lease, 30, Progress(0, 0.25, "calibrating"), "line 1\n")
    running = stages(sessions, job_id)[0]
    assert (running.progress, running.message) == (0.25, "calibrating")
    assert events(sessions, job_id)[-2:] == ["log", "progress"]


def test_progress_that_comes_after_its_stages_end_changes_nothing_of_it(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    lifecycle.finish_stage(sessions, lease, 0, "succeeded", {}, [])
    lifecycle.heartbeat(sessions, lease, 30, Progress(0, 0.5, "late"))
    assert (stages(sessions, job_id)[0].progress, stages(sessions, job_id)[0].message) == (1.0, None)


def test_progress_of_the_baseline_belongs_to_no_stage(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lifecycle.heartbeat(sessions, claim(sessions).lease, 30, Progress(None, 0.5, "baseline"))
    assert [stage.progress for stage in stages(sessions, job_id)] == [0, 0]


def test_a_heartbeat_hears_of_a_cancel(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    lease = claim(sessions).lease
    assert not lifecycle.heartbeat(sessions, lease, 30).cancel_requested
    lifecycle.cancel(sessions, owner, job_id)
    assert lifecycle.heartbeat(sessions, lease, 30).cancel_requested


def test_a_heartbeat_hears_that_the_time_is_up(sessions: Sessions) -> None:
    job_id = submit(sessions, timeout_seconds=10)
    lease = claim(sessions).lease
    assert not lifecycle.heartbeat(sessions, lease, 30).overdue
    execute(sessions, "UPDATE jobs SET started_at = now() - interval '11 seconds' WHERE id = :id", id=job_id)
    assert lifecycle.heartbeat(sessions, lease, 30).overdue


# ---------------------------------------------------------------- stages


def test_a_finished_stage_points_to_its_files(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    left = stored("model.onnx")
    lifecycle.finish_stage(sessions, lease, 0, "succeeded", {"seconds": 1.5}, [left])
    ended = stages(sessions, job_id)[0]
    assert (ended.status, ended.attempt, ended.report, ended.progress) == ("succeeded", 1, {"seconds": 1.5}, 1.0)
    assert ended.finished_at is not None
    with transaction(sessions) as session:
        found = session.scalars(select(Artifact).where(Artifact.job_id == job_id)).one()
    assert (found.stage_position, found.attempt, found.role, found.name) == (0, 1, "model", "model.onnx")
    assert (found.key, found.sha256, found.size_bytes, found.status) == (left.key, left.sha256, 3, "ready")


def test_finishing_a_stage_again_after_a_lost_answer_changes_nothing(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    left = [stored()]
    lifecycle.finish_stage(sessions, lease, 0, "dropped", {"seconds": 1}, left)
    told = events(sessions, job_id)
    lifecycle.finish_stage(sessions, lease, 0, "dropped", {"seconds": 1}, left)
    assert events(sessions, job_id) == told


def test_a_stage_that_the_job_does_not_have_cannot_be_started_or_finished(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    with pytest.raises(Conflict, match="no stage 2"):
        lifecycle.start_stage(sessions, lease, 2)
    with pytest.raises(Conflict, match="no stage -1"):
        lifecycle.finish_stage(sessions, lease, -1, "succeeded", {}, [])
    assert events(sessions, job_id) == ["submitted", "claimed"]


def test_an_ended_stage_cannot_be_started_again(sessions: Sessions) -> None:
    submit(sessions)
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    lifecycle.finish_stage(sessions, lease, 0, "succeeded", {}, [])
    with pytest.raises(Conflict):
        lifecycle.start_stage(sessions, lease, 0)
    with pytest.raises(Conflict):
        lifecycle.finish_stage(sessions, lease, 0, "dropped", {}, [])


def test_another_attempt_keeps_the_baseline_and_the_finished_stages(sessions: Sessions) -> None:
    job_id = submit(sessions)
    lease = claim(sessions).lease
    lifecycle.record_baseline(sessions, lease, {"p50": 3.5})
    lifecycle.start_stage(sessions, lease, 0)
    lifecycle.finish_stage(sessions, lease, 0, "succeeded", {}, [])
    lifecycle.start_stage(sessions, lease, 1)
    lifecycle.requeue(sessions, lease, LOST, cause="lost")
    assert [stage.status for stage in stages(sessions, job_id)] == ["succeeded", "pending"]
    again = claim(sessions)
    assert (again.attempt, again.baseline) == (2, {"p50": 3.5})
    lifecycle.start_stage(sessions, again.lease, 1)
    assert [stage.attempt for stage in stages(sessions, job_id)] == [1, 2]


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
        "give back": lambda s: lifecycle.give_back(s, lease, LOST, [stored()]),
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
        assert lifecycle.give_back(sessions, claim(sessions).lease, Reason("drained", "The worker stops.")) == "queued"
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


# ---------------------------------------------------------------- events


def test_every_change_tells_its_event_with_the_attempt(sessions: Sessions) -> None:
    job_id: UUID = submit(sessions)
    lease = claim(sessions).lease
    lifecycle.record_baseline(sessions, lease, {})
    lifecycle.start_stage(sessions, lease, 0)
    lifecycle.finish_stage(sessions, lease, 0, "dropped", {"reason": "Dice fell by 3 points."}, [])
    lifecycle.requeue(sessions, lease, LOST, cause="lost")
    lifecycle.settle(sessions, claim(sessions).lease, "failed", LOST)
    with transaction(sessions) as session:
        told = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)).all()
    assert [(event.sequence, event.attempt, event.kind, event.data) for event in told] == [
        (1, 0, "submitted", {}),
        (2, 1, "claimed", {"worker": "worker-1"}),
        (3, 1, "baseline_measured", {}),
        (4, 1, "stage_started", {"stage": 0}),
        (5, 1, "stage_finished", {"stage": 0, "status": "dropped", "reason": "Dice fell by 3 points."}),
        (6, 1, "requeued", {"cause": "lost", **LOST.as_dict()}),
        (7, 2, "claimed", {"worker": "worker-1"}),
        (8, 2, "failed", LOST.as_dict()),
    ]
