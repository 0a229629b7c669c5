"""The ledger, one caller at a time: submit, claim, heartbeat, and the stages of a job that runs."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select

from shared import lifecycle
from shared.db import Sessions, transaction
from shared.errors import Conflict, IdempotencyConflict
from shared.ledger import Progress
from shared.models import Artifact, JobEvent
from tests.shared.ledger_desk import (
    ABLE,
    LOST,
    RECIPE,
    account,
    claim,
    events,
    execute,
    job,
    order,
    stages,
    stored,
    submit,
)

pytestmark = pytest.mark.usefixtures("ledger_in_order")


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
