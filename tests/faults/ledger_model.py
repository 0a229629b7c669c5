"""The ledger as it should be, in memory: the rules of shared/lifecycle.py once more, in the plainest words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

CRASHES = ("device", "out_of_memory", "stalled", "crashed")
BLAMES_INPUT = ("out_of_memory", "stalled", "crashed")
ENDED = ("succeeded", "failed", "cancelled")
DONE = ("succeeded", "dropped", "cached", "skipped", "failed")


@dataclass
class Stage:
    status: str = "pending"
    attempt: int | None = None


@dataclass
class Lease:
    """A claim's lease: what its worker did last under it, and how that worker left the job."""

    job: Job
    token: UUID
    deed: tuple[Any, ...] = ("claimed",)
    left_as: str | None = None


@dataclass
class Job:
    """A job as it should be."""

    id: UUID
    account: int
    facts: dict[str, Any]  # what was asked: priority, need, input, max_attempts
    max_attempts: int
    retry_of: UUID | None = None
    status: str = "queued"
    code: str | None = None
    attempt: int = 0
    crashes: int = 0
    due: bool = True
    lapsed: bool = False
    cancel_requested: bool = False
    lease: Lease | None = None
    stages: list[Stage] = field(default_factory=lambda: [Stage(), Stage()])
    checkpoints: dict[str, str] = field(default_factory=dict)  # sha256 by name
    events: list[tuple[str, int]] = field(default_factory=lambda: [("submitted", 0)])

    def tell(self, kind: str) -> None:
        self.events.append((kind, self.attempt))


class Refused(Exception):
    """What the ledger should answer instead; its argument is the error's name."""


class Ledger:
    """All jobs of one example, in the order in which they came."""

    def __init__(self) -> None:
        self.jobs: dict[UUID, Job] = {}
        self.keys: dict[tuple[int, str], tuple[dict[str, Any], UUID]] = {}
        self.marks: set[tuple[int, int]] = set()  # account and input in quarantine
        self.served: dict[int, int] = {}  # when an account's job was last started for the first time
        self._clock = 0

    # ---------------------------------------------------------------- the owner's side

    def known(self, account: int, key: str | None, asked: dict[str, Any]) -> UUID | None:
        """The job that was made with the key."""
        if key is None or (account, key) not in self.keys:
            return None
        before, job_id = self.keys[account, key]
        if before != asked:
            raise Refused("IdempotencyConflict")
        return job_id

    def submit(
        self, job_id: UUID, account: int, key: str | None, facts: dict[str, Any], retry_of: UUID | None = None
    ) -> None:
        if key is not None:
            self.keys[account, key] = ({**facts, "retry_of": retry_of}, job_id)
        self.jobs[job_id] = Job(job_id, account, facts, facts["max_attempts"], retry_of)

    def cancel(self, job: Job) -> str:
        if job.status == "queued":
            self._end(job, "cancelled", "cancelled")
        elif job.status == "running" and not job.cancel_requested:
            job.cancel_requested = True
            job.tell("cancel_requested")
        return job.status

    # ---------------------------------------------------------------- the worker's side

    def next(self, needs: tuple[str, ...]) -> Job | None:
        """Fewest running, then served the longest ago; within an account, and between equals, priority, then age."""
        waiting = [job for job in self.jobs.values() if job.status == "queued" and job.facts["need"] in needs]
        running = [job.account for job in self.jobs.values() if job.status == "running"]

        def best(jobs: list[Job]) -> Job:
            return min(jobs, key=lambda job: (-job.facts["priority"], job.id))

        def turn(account: int) -> tuple[Any, ...]:
            head = best([job for job in waiting if job.account == account])
            return running.count(account), self.served.get(account, -1), -head.facts["priority"], head.id

        for account in sorted({job.account for job in waiting}, key=turn):
            due = [job for job in waiting if job.account == account and job.due]
            if due:
                return best(due)
        return None

    def claim(self, job: Job, token: UUID) -> Lease:
        self._clock += 1
        if job.attempt == 0:
            self.served[job.account] = self._clock
        job.status, job.code, job.attempt, job.lapsed = "running", None, job.attempt + 1, False
        job.lease = Lease(job, token)
        job.tell("claimed")
        return job.lease

    def held(self, lease: Lease) -> Job:
        if lease.job.lease is not lease:
            raise Refused("LeaseLost")
        return lease.job

    def heartbeat(self, lease: Lease) -> bool:
        job = self.held(lease)
        job.lapsed = False
        return job.cancel_requested

    def start(self, lease: Lease, position: int) -> None:
        job = self.held(lease)
        if lease.deed == ("start", position):
            return
        if job.stages[position].status in DONE:
            raise Refused("Conflict")
        job.stages[position] = Stage("running", job.attempt)
        lease.deed = ("start", position)
        job.tell("stage_started")

    def finish(self, lease: Lease, position: int, status: str) -> None:
        job = self.held(lease)
        if lease.deed == ("finish", position, status):
            return
        if job.stages[position].status in DONE:
            raise Refused("Conflict")
        job.stages[position], job.crashes = Stage(status, job.attempt), 0
        lease.deed = ("finish", position, status)
        job.tell("stage_finished")

    def keep(self, lease: Lease, position: int, sha256: str) -> None:
        job = self.held(lease)
        if job.stages[position].status != "running":
            raise Refused("Conflict")
        if job.checkpoints.get(str(position)) != sha256:
            job.crashes = 0
        job.checkpoints[str(position)] = sha256

    def settle(self, lease: Lease, status: str, code: str | None) -> None:
        if lease.left_as == status:
            return
        job = self.held(lease)
        lease.left_as = status
        self._end(job, status, code)
        if status == "succeeded":
            self.marks.discard((job.account, job.facts["input"]))

    def requeue(self, lease: Lease, cause: str, code: str, delayed: bool) -> str:
        if lease.left_as in ("queued", "failed", "cancelled"):
            return lease.left_as
        job = self.held(lease)
        lease.left_as = self._requeue(job, cause, code, delayed)
        return job.status

    # ---------------------------------------------------------------- the sweeper's side

    def sweep(self) -> int:
        lapsed = [job for job in self.jobs.values() if job.status == "running" and job.lapsed]
        for job in lapsed:
            self._requeue(job, "lost", "worker_lost", delayed=False)
        return len(lapsed)

    # ---------------------------------------------------------------- how a job changes

    def _requeue(self, job: Job, cause: str, code: str, delayed: bool) -> str:
        mark = (job.account, job.facts["input"])
        crashes = job.crashes + (cause in CRASHES)
        if job.cancel_requested:
            self._end(job, "cancelled", "cancelled")
        elif cause in BLAMES_INPUT and (mark in self.marks or crashes == 2):
            self._end(job, "failed", "quarantined")
            self.marks.add(mark)
        elif (cause in CRASHES and crashes == 2) or (cause != "given_back" and job.attempt == job.max_attempts):
            self._end(job, "failed", code)
        else:
            job.status, job.code, job.crashes, job.lease = "queued", code, crashes, None
            job.due = not delayed or cause == "given_back"
            job.max_attempts += cause == "given_back"
            for position, stage in enumerate(job.stages):
                if stage.status == "running":
                    job.stages[position] = Stage("pending", stage.attempt)
            job.tell("requeued")
        return job.status

    def _end(self, job: Job, status: str, code: str | None) -> None:
        job.status, job.code, job.lease = status, code, None
        for position, stage in enumerate(job.stages):
            if stage.status not in DONE:
                job.stages[position] = Stage("skipped", stage.attempt)
        job.tell(status)
