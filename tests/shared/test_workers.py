"""Workers: who is there, what they can do, and what a job is told that none of them can do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from shared import lifecycle, workers
from shared.db import Sessions, transaction
from shared.ledger import Reason
from shared.models import Worker
from shared.workers import Registration, waiting_reason
from tests.audit import audit
from tests.shared.ledger_desk import ABLE, RECIPE, account, claim, events, execute, job, submit

CPU = Registration("cpu-1", "host", ["default"], RECIPE.requirements(), 8, 2**34, {"python": "3.11"})


def _alive(sessions: Sessions) -> list[Worker]:
    with transaction(sessions) as session:
        return list(workers.alive(session))


def _silence(sessions: Sessions, seconds: float) -> None:
    execute(sessions, "UPDATE workers SET heartbeat_at = now() - make_interval(secs => :seconds)", seconds=seconds)


def test_a_registered_worker_is_alive_with_what_it_can_do(sessions: Sessions) -> None:
    workers.register(sessions, CPU)
    [known] = _alive(sessions)
    assert (known.id, known.hostname, known.queues) == ("cpu-1", "host", ["default"])
    assert known.capabilities == CPU.capabilities
    assert (known.cores, known.memory_bytes, known.details, known.job_id) == (8, 2**34, {"python": "3.11"}, None)


def test_a_restarted_worker_is_known_anew(sessions: Sessions) -> None:
    workers.register(sessions, CPU)
    workers.beat(sessions, "cpu-1", uuid4())
    workers.register(sessions, replace(CPU, cores=2, queues=["gpu"]))
    [known] = _alive(sessions)
    assert (known.cores, known.queues, known.job_id) == (2, ["gpu"], None)


def test_a_beat_keeps_a_worker_alive_and_says_what_it_is_at(sessions: Sessions) -> None:
    workers.register(sessions, CPU)
    _silence(sessions, workers.ALIVE_SECONDS + 1)
    assert _alive(sessions) == []
    job_id = uuid4()
    workers.beat(sessions, "cpu-1", job_id)
    assert [known.job_id for known in _alive(sessions)] == [job_id]


def test_a_retired_worker_is_gone_and_a_beat_does_not_bring_it_back(sessions: Sessions) -> None:
    workers.register(sessions, CPU)
    workers.retire(sessions, "cpu-1")
    workers.retire(sessions, "cpu-1")
    workers.beat(sessions, "cpu-1", None)
    assert _alive(sessions) == []


def test_workers_silent_for_a_day_are_forgotten_and_no_others(sessions: Sessions) -> None:
    workers.register(sessions, replace(CPU, id="old"))
    _silence(sessions, workers.FORGET_SECONDS + 1)
    workers.register(sessions, CPU)
    workers.forget_dead(sessions)
    with transaction(sessions) as session:
        assert session.scalars(select(Worker.id)).all() == ["cpu-1"]


# ---------------------------------------------------------------- why a job waits


def _worker(**changes: Any) -> Worker:
    return Worker(**{**CPU.__dict__, **changes})


@pytest.mark.parametrize(
    ("there", "code", "sentence"),
    [
        ([], "no_worker", "No live worker serves the queue 'default' (no worker is alive)."),
        (
            [_worker(queues=["gpu", "big"]), _worker(queues=["gpu"])],
            "no_worker",
            "No live worker serves the queue 'default' (live workers serve: big, gpu).",
        ),
        (
            [_worker(capabilities=["stage:quantize", "engine:onnxruntime"]), _worker(capabilities=[])],
            "no_capable_worker",
            "No live worker can do this job: the closest one lacks engine:openvino, stage:build_engine.",
        ),
        (
            [_worker(memory_bytes=2**30), _worker(memory_bytes=2**31)],
            "no_capable_worker",
            "The job needs about 4.0 GiB of memory; the largest live worker that can do it has 2.0 GiB.",
        ),
    ],
    ids=["nobody", "another queue", "a capability", "memory"],
)
def test_the_reason_says_what_is_missing(there: list[Worker], code: str, sentence: str) -> None:
    reason = waiting_reason(there, "default", RECIPE.requirements(), 2**32)
    assert reason is not None
    assert (reason.code, reason.message, reason.fault) == (code, sentence, "platform")
    assert reason.hint


def test_there_is_no_reason_where_one_worker_can() -> None:
    there = [_worker(queues=["gpu"]), _worker(capabilities=[]), _worker()]
    assert waiting_reason(there, "default", RECIPE.requirements(), 2**32) is None


def test_one_workers_memory_and_anothers_engines_do_not_add_up() -> None:
    there = [_worker(memory_bytes=1), _worker(capabilities=[])]
    assert waiting_reason(there, "default", RECIPE.requirements(), 2**32) is not None


def _reason(sessions: Sessions, job_id: Any) -> dict[str, Any]:
    return job(sessions, job_id).state_reason or {}


def test_a_job_is_told_what_is_missing_as_it_changes_and_untold_once_nothing_is(sessions: Sessions) -> None:
    job_id = submit(sessions, required_memory_bytes=2**33)
    workers.explain_waiting(sessions)
    assert "no worker is alive" in _reason(sessions, job_id)["message"]

    workers.register(sessions, replace(CPU, capabilities=["stage:quantize"]))
    workers.explain_waiting(sessions)
    assert "lacks engine:onnxruntime" in _reason(sessions, job_id)["message"]

    workers.register(sessions, replace(CPU, memory_bytes=2**30))
    workers.explain_waiting(sessions)
    assert "The job needs about 8.0 GiB" in _reason(sessions, job_id)["message"]

    workers.register(sessions, CPU)
    workers.explain_waiting(sessions)
    assert job(sessions, job_id).state_reason is None

    workers.retire(sessions, "cpu-1")
    workers.explain_waiting(sessions)
    assert _reason(sessions, job_id)["code"] == "no_worker"
    assert events(sessions, job_id) == ["submitted"] + ["waiting"] * 5
    assert audit(sessions, quiet=True) == []


def test_saying_the_same_again_is_no_event(sessions: Sessions) -> None:
    job_id = submit(sessions)
    for _ in range(3):
        workers.explain_waiting(sessions)
    assert events(sessions, job_id) == ["submitted", "waiting"]


def test_jobs_with_different_needs_are_told_apart(sessions: Sessions) -> None:
    workers.register(sessions, CPU)
    possible, gpu = submit(sessions), submit(sessions, queue="gpu")
    large = submit(sessions, required_memory_bytes=2**40)
    workers.explain_waiting(sessions)
    assert job(sessions, possible).state_reason is None
    assert _reason(sessions, gpu)["code"] == "no_worker"
    assert "1024.0 GiB" in _reason(sessions, large)["message"]


def test_a_long_queue_is_told_bit_by_bit(sessions: Sessions) -> None:
    jobs = [submit(sessions) for _ in range(5)]
    told = []
    for _ in range(3):
        workers.explain_waiting(sessions, limit=2)
        told.append(sum(job(sessions, job_id).state_reason is not None for job_id in jobs))
    assert told == [2, 4, 5]


def test_a_worker_that_fell_silent_counts_for_nothing(sessions: Sessions) -> None:
    workers.register(sessions, CPU)
    job_id = submit(sessions)
    _silence(sessions, workers.ALIVE_SECONDS + 1)
    workers.explain_waiting(sessions)
    assert _reason(sessions, job_id)["code"] == "no_worker"


def test_the_reason_of_a_requeued_job_stays_while_a_worker_can_take_it(sessions: Sessions) -> None:
    workers.register(sessions, CPU)
    job_id = submit(sessions)
    lost = Reason("worker_lost", "The worker fell silent.")
    lifecycle.requeue(sessions, claim(sessions).lease, lost, cause="lost", delay_seconds=600)
    workers.explain_waiting(sessions)
    assert _reason(sessions, job_id)["code"] == "worker_lost"


def test_a_running_job_is_told_nothing(sessions: Sessions) -> None:
    job_id = submit(sessions)
    claim(sessions)
    workers.explain_waiting(sessions)
    assert job(sessions, job_id).state_reason is None


# ---------------------------------------------------------------- whom to ring for


def test_queues_with_work_are_those_of_live_workers_with_a_due_job(sessions: Sessions) -> None:
    workers.register(sessions, replace(CPU, queues=["default", "gpu", "idle"]))
    owner = account(sessions)
    submit(sessions, owner, queue="gpu")
    submit(sessions, owner, queue="unserved")
    submit(sessions, owner)
    assert workers.queues_with_work(sessions) == ["default", "gpu"]
    lifecycle.requeue(sessions, claim(sessions).lease, Reason("x", "x"), cause="lost", delay_seconds=600)
    assert workers.queues_with_work(sessions) == ["gpu"]
    claim(sessions, replace(ABLE, queues=["gpu"]))
    assert workers.queues_with_work(sessions) == []
