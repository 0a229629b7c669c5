"""What follows an unfinished attempt, cause by cause: another one and when, or the end and why."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args
from uuid import uuid4

import pytest

from shared.attempts import MAX_DOUBLINGS, RETRIES, Attempt, Cause, judge
from shared.ledger import Reason

FIRST = Attempt(number=1, max_attempts=3, crashes=0, cancel_requested=False)
WHY = Reason("why", "It broke.", "Look.", stage=1)
CRASHES = ("device", "out_of_memory", "stalled", "crashed")


def test_every_cause_has_its_rule() -> None:
    assert tuple(RETRIES) == get_args(Cause)
    assert tuple(cause for cause, retry in RETRIES.items() if retry.is_crash) == CRASHES


@pytest.mark.parametrize("cause", RETRIES)
def test_a_first_failure_is_followed_by_another_attempt(cause: Cause) -> None:
    outcome = judge(FIRST, cause, WHY, delay_seconds=2)
    assert (outcome.status, outcome.reason, outcome.quarantines) == ("queued", WHY, False)
    assert outcome.crashes == (cause in CRASHES)
    assert outcome.delay_seconds == 2 * RETRIES[cause].patience


@pytest.mark.parametrize("cause", [cause for cause in RETRIES if cause != "given_back"])
def test_the_last_attempts_failure_is_the_end(cause: Cause) -> None:
    outcome = judge(replace(FIRST, number=3), cause, WHY, delay_seconds=2)
    assert (outcome.status, outcome.reason.code) == ("failed", "why")
    assert outcome.reason.message == "All 3 attempts are used up. Last: It broke."
    assert (outcome.reason.hint, outcome.reason.stage) == ("Look.", 1)


def test_a_job_given_back_has_as_many_attempts_left_as_before() -> None:
    outcome = judge(replace(FIRST, number=3), "given_back", WHY, delay_seconds=2)
    assert (outcome.status, outcome.max_attempts, outcome.delay_seconds) == ("queued", 4, 0)


@pytest.mark.parametrize("cause", RETRIES)
def test_a_cancel_wins_over_everything(cause: Cause) -> None:
    asked = replace(FIRST, number=3, crashes=1, cancel_requested=True, marked_by=uuid4())
    outcome = judge(asked, cause, WHY, delay_seconds=2)
    assert (outcome.status, outcome.reason.code, outcome.quarantines) == ("cancelled", "cancelled", False)


@pytest.mark.parametrize("cause", CRASHES)
def test_a_second_crash_is_the_end_also_of_many_attempts(cause: Cause) -> None:
    outcome = judge(replace(FIRST, number=2, max_attempts=99, crashes=1), cause, WHY, delay_seconds=2)
    assert outcome.status == "failed"
    assert outcome.reason.message == "The job crashed 2 times without progress. Last: It broke."
    blamed = cause != "device"  # a broken accelerator is no fault of the input
    assert (outcome.reason.code, outcome.quarantines) == ("quarantined" if blamed else "why", blamed)


@pytest.mark.parametrize("cause", ["out_of_memory", "stalled", "crashed"])
def test_an_input_in_quarantine_costs_a_job_one_crash(cause: Cause) -> None:
    earlier = uuid4()
    outcome = judge(replace(FIRST, marked_by=earlier), cause, WHY, delay_seconds=2)
    assert (outcome.status, outcome.reason.code) == ("failed", "quarantined")
    assert str(earlier) in outcome.reason.message
    assert not outcome.quarantines  # it is there already


@pytest.mark.parametrize("cause", ["lost", "storage", "disk_full", "open_files", "device", "given_back"])
def test_what_is_no_crash_of_the_inputs_costs_it_nothing(cause: Cause) -> None:
    assert judge(replace(FIRST, marked_by=uuid4()), cause, WHY, delay_seconds=2).status == "queued"


def test_delays_double_up_to_a_limit() -> None:
    delays = [
        judge(replace(FIRST, number=number, max_attempts=99), "storage", WHY, delay_seconds=2).delay_seconds
        for number in range(1, 12)
    ]
    assert delays == [10.0 * 2 ** min(number, MAX_DOUBLINGS) for number in range(11)]


def test_the_platforms_own_troubles_are_given_more_time_than_a_lost_worker() -> None:
    patience = {cause: retry.patience for cause, retry in RETRIES.items()}
    assert patience["disk_full"] > patience["storage"] > patience["lost"] > patience["given_back"] == 0
