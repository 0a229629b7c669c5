"""56: the ledger against a pure model of it, step by step, in orders that nobody would think of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from shared import accounts, checkpoints, lifecycle, repeats
from shared.db import Sessions, transaction
from shared.errors import ServiceError
from shared.ledger import Lease, Reason, Stored
from shared.recipe import Recipe
from shared.storage import Storage
from tests.audit import audit
from tests.faults import ledger_model as model
from tests.shared.ledger_desk import ABLE, RECIPE, due, lapse, order

EXAMPLES, STEPS, LEAST = 50, 50, 2000  # some examples end early
LEASE_SECONDS, LONG_SECONDS = 3600.0, 3600.0
BROKE = Reason("broke", "It broke.")
WORKERS = {
    "plain": (("plain",), [*ABLE.capabilities]),
    "gpu": (("plain", "gpu"), [*ABLE.capabilities, "engine:tensorrt"]),
}
RECIPES = [RECIPE.model_copy(update={"seed": number}) for number in range(2)]
GPU_STAGES = [{"kind": "quantize"}, {"kind": "build_engine", "targets": ["tensorrt"]}]
GPU_RECIPES = [
    Recipe.model_validate({**recipe.model_dump(mode="json"), "stages": GPU_STAGES}) for recipe in RECIPES
]

positions = st.integers(0, 1)
keys = st.sampled_from([None, None, "monday", "tuesday"])
ROWS = text("""
    SELECT id, status, state_reason ->> 'code' AS code, attempt, max_attempts, crashes, retry_of, lease_token,
           cancel_requested_at IS NOT NULL AS cancel_requested, available_at <= now() AS due,
           ARRAY(SELECT status || ' ' || coalesce(attempt::text, '-') FROM stage_runs
                 WHERE job_id = jobs.id ORDER BY position) AS stages,
           ARRAY(SELECT kind || ' ' || attempt FROM job_events WHERE job_id = jobs.id ORDER BY sequence) AS events
    FROM jobs WHERE queue = :queue
""")
MARKS = text("SELECT account_id, input_sha256 FROM quarantines WHERE account_id = ANY(:accounts)")


class LedgerMachine(RuleBasedStateMachine):
    """One example: accounts and a queue of its own in a database that all examples share."""

    jobs: Bundle[UUID] = Bundle("jobs")
    leases: Bundle[model.Lease] = Bundle("leases")

    def __init__(self, sessions: Sessions, steps: list[str]) -> None:
        super().__init__()
        self.sessions, self.steps, self.model = sessions, steps, model.Ledger()
        self.queue = f"q-{uuid4().hex[:12]}"
        self.accounts = [accounts.ensure_account(sessions, f"{self.queue}-{number}") for number in range(3)]

    # ---------------------------------------------------------------- the owner's side

    @rule(
        target=jobs,
        account=st.integers(0, 2),
        priority=st.integers(0, 1),
        need=st.sampled_from(["plain", "plain", "gpu"]),
        content=st.integers(0, 1),
        max_attempts=st.integers(1, 3),
        key=keys,
    )
    def submit(self, account: int, priority: int, need: str, content: int, max_attempts: int, key: str | None) -> Any:
        facts = {"priority": priority, "need": need, "input": content, "max_attempts": max_attempts}
        recipe = (GPU_RECIPES if need == "gpu" else RECIPES)[content]
        asked = order(
            self.accounts[account], recipe=recipe, priority=priority, max_attempts=max_attempts, queue=self.queue
        )
        return self._submitted(account, key, facts, None, lambda: lifecycle.submit(self.sessions, asked, key))

    @rule(target=jobs, job_id=jobs, key=keys)
    def retry(self, job_id: UUID, key: str | None) -> Any:
        job = self.model.jobs[job_id]
        if job.status not in model.ENDED:
            self._refused("Conflict", lambda: repeats.retry(self.sessions, self.accounts[job.account], job_id, key))
            return multiple()
        call = lambda: repeats.retry(self.sessions, self.accounts[job.account], job_id, key)  # noqa: E731
        return self._submitted(job.account, key, job.facts, job_id, call)

    @rule(target=jobs, job_id=jobs)
    def release(self, job_id: UUID) -> Any:
        job = self.model.jobs[job_id]
        if job.code != "quarantined":
            self._refused("Conflict", lambda: repeats.release(self.sessions, job_id))
            return multiple()
        self.model.marks.discard((job.account, job.facts["input"]))
        key = f"release {job_id}"
        return self._submitted(
            job.account, key, job.facts, job_id, lambda: repeats.release(self.sessions, job_id)
        )

    @rule(job_id=jobs)
    def cancel(self, job_id: UUID) -> None:
        job = self.model.jobs[job_id]
        told = lifecycle.cancel(self.sessions, self.accounts[job.account], job_id)
        assert told == self.model.cancel(job)

    # ---------------------------------------------------------------- the worker's side

    @rule(target=leases, worker=st.sampled_from(sorted(WORKERS)))
    def claim(self, worker: str) -> Any:
        needs, capabilities = WORKERS[worker]
        able = replace(ABLE, worker_id=worker, queues=[self.queue], capabilities=capabilities)
        claimed, expected = lifecycle.claim(self.sessions, able, LEASE_SECONDS), self.model.next(needs)
        assert (claimed and claimed.lease.job_id) == (expected and expected.id)
        if claimed is None or expected is None:
            return multiple()
        return self.model.claim(expected, claimed.lease.token)

    @rule(lease=leases)
    def heartbeat(self, lease: model.Lease) -> None:
        def beat() -> bool:
            return lifecycle.heartbeat(self.sessions, _lease(lease), LEASE_SECONDS).cancel_requested

        self._same(beat, lambda: self.model.heartbeat(lease))

    @rule(lease=leases, position=positions)
    def start_stage(self, lease: model.Lease, position: int) -> None:
        self._same(
            lambda: lifecycle.start_stage(self.sessions, _lease(lease), position),
            lambda: self.model.start(lease, position),
        )

    @rule(lease=leases, position=positions, status=st.sampled_from(["succeeded", "dropped", "cached"]))
    def finish_stage(self, lease: model.Lease, position: int, status: str) -> None:
        if lease.job.stages[position].status == "pending":
            status = "cached"  # what never ran
        self._same(
            lambda: lifecycle.finish_stage(self.sessions, _lease(lease), position, status, {}, []),
            lambda: self.model.finish(lease, position, status),
        )

    @rule(lease=leases, position=positions, content=st.sampled_from("ab"))
    def keep_checkpoint(self, lease: model.Lease, position: int, content: str) -> None:
        sha256, name = content * 64, f"{position}-epoch.checkpoint"
        kept = Stored(checkpoints.ROLE, name, "safetensors", f"{self.queue}/{uuid4()}", sha256, 1)
        self._same(
            lambda: checkpoints.keep(self.sessions, _lease(lease), position, kept),
            lambda: self.model.keep(lease, position, sha256),
        )

    @rule(lease=leases, status=st.sampled_from(model.ENDED))
    def settle(self, lease: model.Lease, status: Any) -> None:
        reason, report = (None, {"verdict": "met"}) if status == "succeeded" else (BROKE, None)
        self._same(
            lambda: lifecycle.settle(self.sessions, _lease(lease), status, reason, report),
            lambda: self.model.settle(lease, status, reason and reason.code),
        )

    @rule(lease=leases)
    def give_back(self, lease: model.Lease) -> None:
        self._same(
            lambda: lifecycle.requeue(self.sessions, _lease(lease), BROKE, cause="given_back"),
            lambda: self.model.requeue(lease, "given_back", BROKE.code, delayed=False),
        )

    @rule(
        lease=leases,
        cause=st.sampled_from(["lost", "storage", "disk_full", "device", "out_of_memory", "stalled", "crashed"]),
        delayed=st.booleans(),
    )
    def requeue(self, lease: model.Lease, cause: Any, delayed: bool) -> None:
        delay_seconds = LONG_SECONDS if delayed else 0
        self._same(
            lambda: lifecycle.requeue(
                self.sessions, _lease(lease), BROKE, cause=cause, delay_seconds=delay_seconds
            ),
            lambda: self.model.requeue(lease, cause, BROKE.code, delayed),
        )

    # ---------------------------------------------------------------- the sweeper's side, and time

    @rule(lease=leases)
    def lease_lapses(self, lease: model.Lease) -> None:
        job = lease.job
        if job.status == "running":
            lapse(self.sessions, job.id)
            job.lapsed = True

    @rule()
    def sweep(self) -> None:
        assert lifecycle.sweep_leases(self.sessions) == self.model.sweep()

    @precondition(lambda self: any(not job.due for job in self.model.jobs.values()))
    @rule()
    def delays_are_over(self) -> None:
        for job in self.model.jobs.values():
            if job.status == "queued" and not job.due:
                due(self.sessions, job.id)
                job.due = True

    # ---------------------------------------------------------------- what must be equal

    @invariant()
    def ledger_and_model_are_equal(self) -> None:
        self.steps.append(self.queue)
        with transaction(self.sessions) as session:
            rows = session.execute(ROWS, {"queue": self.queue}).mappings().all()
            marks = session.execute(MARKS, {"accounts": self.accounts}).all()
        assert {row["id"]: _seen(row) for row in rows} == {job.id: _expected(job) for job in self.model.jobs.values()}
        assert len(marks) == len(self.model.marks)
        assert {account_id for account_id, _ in marks} == {self.accounts[account] for account, _ in self.model.marks}

    def teardown(self) -> None:
        for job in self.model.jobs.values():  # what still runs is no later example's to sweep
            lifecycle.cancel(self.sessions, self.accounts[job.account], job.id)
            if job.lease is not None:
                lifecycle.settle(self.sessions, _lease(job.lease), "cancelled", BROKE)
        assert audit(self.sessions, quiet=True) == []

    # ---------------------------------------------------------------- how both are asked

    def _submitted(
        self,
        account: int,
        key: str | None,
        facts: dict[str, Any],
        retry_of: UUID | None,
        call: Callable[[], tuple[UUID, bool]],
    ) -> Any:
        try:
            known = self.model.known(account, key, {**facts, "retry_of": retry_of})
        except model.Refused as refused:
            self._refused(str(refused), call)
            return multiple()
        job_id, new = call()
        assert new == (known is None)
        if known is not None:
            assert job_id == known
            return multiple()
        self.model.submit(job_id, account, key, facts, retry_of)
        return job_id

    def _same(self, call: Callable[[], Any], expected: Callable[[], Any]) -> None:
        try:
            answer = expected()
        except model.Refused as refused:
            self._refused(str(refused), call)
            return
        assert call() == answer

    def _refused(self, name: str, call: Callable[[], Any]) -> None:
        with pytest.raises(ServiceError) as told:
            call()
        assert type(told.value).__name__ == name


def _lease(lease: model.Lease) -> Lease:
    return Lease(lease.job.id, lease.token)


def _seen(row: Any) -> dict[str, Any]:
    return {**row, "due": row["due"] or row["status"] != "queued"}


def _expected(job: model.Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": job.status,
        "code": job.code,
        "attempt": job.attempt,
        "max_attempts": job.max_attempts,
        "crashes": job.crashes,
        "retry_of": job.retry_of,
        "lease_token": job.lease.token if job.lease else None,
        "cancel_requested": job.cancel_requested,
        "due": job.due or job.status != "queued",
        "stages": [f"{stage.status} {'-' if stage.attempt is None else stage.attempt}" for stage in job.stages],
        "events": [f"{kind} {attempt}" for kind, attempt in job.events],
    }


@pytest.mark.fault(56, "Hypothesis state machine over the ledger against a pure model")
def test_the_ledger_does_what_its_model_does(sessions: Sessions, storage: Storage) -> None:
    steps: list[str] = []
    run_state_machine_as_test(
        lambda: LedgerMachine(sessions, steps),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert len(steps) >= LEAST
    while checkpoints.forget_stale(sessions, storage):
        pass
