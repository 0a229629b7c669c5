"""What becomes of a job whose attempt has ended unfinished: pure decisions, which shared/lifecycle.py writes down."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal
from uuid import UUID

from shared.ledger import Reason

Cause = Literal[
    "given_back", "lost", "storage", "disk_full", "open_files", "device", "out_of_memory", "stalled", "crashed"
]
QUARANTINED = "quarantined"
MAX_CRASHES = 2  # without progress between them: a finished stage or a new checkpoint
MAX_DOUBLINGS = 6


@dataclass(frozen=True)
class Retry:
    """How another attempt follows one that ended for a certain cause.

    `patience` is its delay before the second attempt, in units of the service's retry delay; it doubles with each
    further one. What blames the input puts that input into quarantine once the job has crashed too often.
    """

    patience: float
    is_crash: bool = False
    blames_input: bool = False


RETRIES: dict[Cause, Retry] = {
    "given_back": Retry(0),  # the worker stops
    "lost": Retry(1),  # the worker died, or nobody heard of it any more
    "storage": Retry(5),
    "disk_full": Retry(15),
    "open_files": Retry(15),
    "device": Retry(5, is_crash=True),  # a broken accelerator breaks every job: no fault of the input
    "out_of_memory": Retry(5, is_crash=True, blames_input=True),
    "stalled": Retry(1, is_crash=True, blames_input=True),
    "crashed": Retry(1, is_crash=True, blames_input=True),
}


@dataclass(frozen=True)
class Attempt:
    """An unfinished attempt, as far as it decides what follows. `marked_by` put the job's input into quarantine."""

    number: int
    max_attempts: int
    crashes: int
    cancel_requested: bool
    marked_by: UUID | None = None


@dataclass(frozen=True)
class Outcome:
    """What is to be written: the job's next status and why, and whether its input is put into quarantine."""

    status: Literal["queued", "failed", "cancelled"]
    reason: Reason
    crashes: int
    max_attempts: int
    delay_seconds: float = 0.0
    quarantines: bool = False


def judge(attempt: Attempt, cause: Cause, reason: Reason, delay_seconds: float) -> Outcome:
    """What follows an attempt that ended for `cause`; `delay_seconds` is the service's retry delay.

    An input in quarantine costs a job one crash and not two: a try is left to it, because a newer or a larger worker
    may be able to do what an older one could not.
    """
    retry, crashes = RETRIES[cause], attempt.crashes + RETRIES[cause].is_crash

    def ended(status: Literal["failed", "cancelled"], why: Reason, quarantines: bool = False) -> Outcome:
        return Outcome(status, why, crashes, attempt.max_attempts, quarantines=quarantines)

    if attempt.cancel_requested:
        return ended("cancelled", Reason("cancelled", "Cancelled while it ran.", fault="user"))
    if retry.blames_input and attempt.marked_by is not None:
        known = f"The job crashed, as job {attempt.marked_by} did before it with the same model, data and recipe."
        return ended("failed", reason.after(known, QUARANTINED))
    if retry.is_crash and crashes >= MAX_CRASHES:
        enough = reason.after(f"The job crashed {crashes} times without progress.")
        return ended("failed", replace(enough, code=QUARANTINED) if retry.blames_input else enough, retry.blames_input)
    if cause == "given_back":
        # Attempt numbers name artifacts and are never reused, so an attempt that must not count moves the maximum.
        return Outcome("queued", reason, crashes, attempt.max_attempts + 1)
    if attempt.number >= attempt.max_attempts:
        return ended("failed", reason.after(f"All {attempt.max_attempts} attempts are used up."))
    doublings = min(attempt.number - 1, MAX_DOUBLINGS)
    return Outcome("queued", reason, crashes, attempt.max_attempts, delay_seconds * retry.patience * 2**doublings)
