"""A job's process dies, hangs, takes too much or takes its machine down with it: its job and its neighbours go on."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from shared import lifecycle
from shared.ledger import Capacity
from shared.models import JobEvent
from tests.faults.ground import Ground, child_of, children, reached


@pytest.mark.fault(1, "kill -9 the child in mid-stage")
def test_a_killed_child_resumes_after_the_last_finished_stage_without_waiting_for_the_lease(
    ground: Ground, tmp_path: Path
) -> None:
    expected = ground.faultless_result()
    gate = tmp_path / "gate"
    job_id = ground.submit(f"wait 1 {gate}")
    thread = ground.start_work(ground.tools(lease_seconds=60.0))
    reached(gate)
    child_of(job_id).kill()
    thread.join()
    gate.unlink()
    job = ground.job(job_id)
    assert (job.status, job.crashes, job.attempt) == ("queued", 1, 1)
    assert ground.reason(job_id)["message"].startswith("The job's process ended in stage 1: SIGKILL")
    assert [stage.status for stage in ground.stages(job_id)] == ["succeeded", "pending"]

    attempt = ground.start_work()
    reached(gate).unlink()
    attempt.join()
    assert ground.job(job_id).status == "succeeded"
    started = [(event.attempt, event.data["stage"]) for event in ground.events(job_id, "stage_started")]
    assert started == [(1, 0), (1, 1), (2, 1)]
    assert ground.result(job_id) == expected


@pytest.mark.fault(6, "SIGSTOP the child only")
def test_a_child_that_stands_still_is_ended_as_stalled(ground: Ground, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job_id = ground.submit(f"wait 1 {gate}")
    tools = ground.tools(stall_seconds=60.0)
    thread = ground.start_work(tools)
    reached(gate)
    child_of(job_id).suspend()
    gate.unlink()
    vars(tools.settings)["stall_seconds"] = 0.5  # not before it stands still: a busy machine is slow to start it
    thread.join()
    requeued = ground.events(job_id, "requeued")[0].data
    assert requeued["cause"] == "stalled"
    assert "gave no sign of life for 0.5 s" in requeued["message"]
    assert children(job_id) == []
    thread = ground.start_work()
    reached(gate).unlink()
    thread.join()
    assert ground.job(job_id).status == "succeeded"


@pytest.mark.fault(7, "the child runs out of memory (rlimit)")
def test_a_child_that_takes_too_much_memory_harms_nobody_else(ground: Ground, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    neighbour = ground.submit(f"wait 1 {gate}", priority=1)
    working = ground.start_work()
    reached(gate)
    job_id = ground.submit("memory 0")
    assert ground.work() == "queued"
    assert ground.events(job_id, "requeued")[0].data["cause"] == "out_of_memory"
    assert ground.work() == "failed"  # a second time, which no retry would change
    reason = ground.reason(job_id)
    assert (reason["code"], reason["stage"]) == ("quarantined", 0)
    gate.unlink()
    working.join()
    assert ground.job(neighbour).status == "succeeded"


@pytest.mark.fault(8, "the device reports a sticky error")
def test_a_lost_device_is_tried_once_more_in_a_fresh_process(ground: Ground) -> None:
    job_id = ground.submit("device 0")
    assert ground.work() == "queued"
    assert ground.work() == "failed"
    assert [event.data["cause"] for event in ground.events(job_id, "requeued")] == ["device"]
    assert "CUDA error" in ground.reason(job_id)["message"]
    again = ground.submit()  # no fault of the input, which another machine can do
    assert ground.work() == "succeeded"
    assert ground.job(again).crashes == 0


@pytest.mark.fault(9, "a model that always segfaults the child")
def test_a_model_that_always_crashes_is_quarantined_and_holds_up_nobody(ground: Ground) -> None:
    job_id = ground.submit("segfault 1")
    others = [ground.submit() for _ in range(6)]
    worker = ground.start_worker()
    for other in others:
        assert ground.wait_for(other).status == "succeeded", ground.reason(other)
    job = ground.wait_for(job_id)
    assert (job.status, job.attempt, ground.reason(job_id)["code"]) == ("failed", 2, "quarantined")
    assert "SIGSEGV" in ground.reason(job_id)["message"]
    assert worker.poll() is None
    # All that the others can have waited for, beside each other, is two attempts of one job.
    claims = sorted((event for found in (job_id, *others) for event in ground.events(found, "claimed")), key=by_time)
    assert [(event.job_id, event.attempt) for event in claims if event.job_id != job_id] == [
        (other, 1) for other in others
    ]
    assert [event.attempt for event in claims if event.job_id == job_id] == [1, 2]


def by_time(event: JobEvent) -> datetime:
    return event.at


@pytest.mark.fault(9, "a model that always segfaults the child")
def test_a_quarantined_input_costs_the_next_job_one_crash(ground: Ground) -> None:
    ground.submit("segfault 0")
    assert [ground.work(), ground.work()] == ["queued", "failed"]
    job_id = ground.submit("segfault 0")
    assert ground.work() == "failed"
    assert ground.reason(job_id)["code"] == "quarantined"
    assert lifecycle.claim(ground.sessions, Capacity("w", ["default"], [], 2**40), 5.0) is None
