"""Quarantine: a crashing input is stopped after two crashes, at once the next time, until it is released or works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select

from shared import checkpoints, lifecycle, repeats
from shared.db import Sessions, transaction
from shared.errors import Conflict, NotFound
from shared.ledger import Reason, input_digest
from shared.models import Quarantine
from tests.shared.ledger_desk import CRASHED, RECIPE, account, claim, events, execute, job, order, stored, submit

pytestmark = pytest.mark.usefixtures("ledger_in_order")

CHECKPOINT = replace(stored("0-epoch.checkpoint"), role=checkpoints.ROLE)
OTHER = RECIPE.model_copy(update={"seed": RECIPE.seed + 1})


def _crash(sessions: Sessions, job_id: UUID, cause: Any = "crashed") -> str:
    lease = claim(sessions).lease
    assert lease.job_id == job_id
    return lifecycle.requeue(sessions, lease, CRASHED, cause=cause)


def _quarantined(sessions: Sessions, owner: UUID, **changes: Any) -> UUID:
    job_id = submit(sessions, owner, **changes)
    assert [_crash(sessions, job_id) for _ in range(2)] == ["queued", "failed"]
    return job_id


def _code(sessions: Sessions, job_id: UUID) -> str | None:
    return (job(sessions, job_id).state_reason or {}).get("code")


def _marks(sessions: Sessions) -> list[tuple[UUID, UUID]]:
    with transaction(sessions) as session:
        return [tuple(row) for row in session.execute(select(Quarantine.account_id, Quarantine.job_id))]


def test_the_same_input_is_quarantined_at_its_first_crash(sessions: Sessions) -> None:
    owner = account(sessions)
    first = _quarantined(sessions, owner)
    assert _marks(sessions) == [(owner, first)]
    second = submit(sessions, owner, name="again", timeout_seconds=9.0, tags=["other"])
    assert _crash(sessions, second) == "failed"
    assert _code(sessions, second) == "quarantined"
    assert str(first) in (job(sessions, second).state_reason or {})["message"]
    assert _marks(sessions) == [(owner, first)]


def test_an_input_in_quarantine_still_has_its_one_try(sessions: Sessions) -> None:
    """A newer or larger worker may do it; then the input is out of quarantine, for it has shown that it can be done."""
    owner = account(sessions)
    _quarantined(sessions, owner)
    submit(sessions, owner)
    lifecycle.settle(sessions, claim(sessions).lease, "succeeded", None, {"verdict": "met"})
    assert _marks(sessions) == []
    assert _crash(sessions, submit(sessions, owner)) == "queued"


@pytest.mark.parametrize("cause", ["lost", "storage", "disk_full", "open_files", "device"])
def test_what_is_no_fault_of_the_inputs_is_not_held_against_it(sessions: Sessions, cause: Any) -> None:
    owner = account(sessions)
    _quarantined(sessions, owner)
    assert _crash(sessions, submit(sessions, owner), cause) == "queued"


def test_another_recipe_or_another_account_is_another_input(sessions: Sessions) -> None:
    owner, stranger = account(sessions), account(sessions, "stranger")
    _quarantined(sessions, owner)
    assert _crash(sessions, submit(sessions, owner, recipe=OTHER)) == "queued"
    lifecycle.settle(sessions, claim(sessions).lease, "failed", CRASHED)
    assert _crash(sessions, submit(sessions, stranger)) == "queued"


def test_two_device_errors_end_a_job_and_leave_its_input_alone(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    assert [_crash(sessions, job_id, "device") for _ in range(2)] == ["queued", "failed"]
    assert (_code(sessions, job_id), _marks(sessions)) == ("child_crashed", [])


def test_a_finished_stage_and_a_new_checkpoint_are_progress(sessions: Sessions) -> None:
    job_id = submit(sessions, max_attempts=9)
    for bytes_kept in ("1", "2"):
        assert _crash(sessions, job_id) == "queued"
        lease = claim(sessions).lease
        lifecycle.start_stage(sessions, lease, 0)
        checkpoints.keep(sessions, lease, 0, replace(CHECKPOINT, key=bytes_kept, sha256=bytes_kept * 64))
        assert job(sessions, job_id).crashes == 0
        assert lifecycle.requeue(sessions, lease, CRASHED, cause="lost") == "queued"
    assert _crash(sessions, job_id) == "queued"
    lease = claim(sessions).lease
    lifecycle.start_stage(sessions, lease, 0)
    lifecycle.finish_stage(sessions, lease, 0, "succeeded", {}, [])
    assert lifecycle.requeue(sessions, lease, CRASHED, cause="crashed") == "queued"


def test_the_same_checkpoint_again_is_no_progress(sessions: Sessions) -> None:
    """A stage that cannot go on from its checkpoint, and dies after the same epoch each time."""
    job_id = submit(sessions, max_attempts=9)
    for status in ("queued", "failed"):
        lease = claim(sessions).lease
        lifecycle.start_stage(sessions, lease, 0)
        checkpoints.keep(sessions, lease, 0, replace(CHECKPOINT, key=f"after {status}"))
        assert lifecycle.requeue(sessions, lease, CRASHED, cause="crashed") == status
    assert _code(sessions, job_id) == "quarantined"


def test_what_an_older_release_submitted_has_no_digest_and_is_not_marked(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner)
    execute(sessions, "UPDATE jobs SET input_sha256 = NULL")
    assert [_crash(sessions, job_id) for _ in range(2)] == ["queued", "failed"]
    assert (_code(sessions, job_id), _marks(sessions)) == ("quarantined", [])


# ---------------------------------------------------------------- release


def test_a_release_runs_the_job_again_with_all_its_crashes_forgotten(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = _quarantined(sessions, owner, tags=["mri"], priority=4)
    before, told = job(sessions, job_id).__dict__, events(sessions, job_id)
    new_id, new = repeats.release(sessions, job_id)
    again = job(sessions, new_id)
    assert new
    assert (again.status, again.crashes, again.retry_of) == ("queued", 0, job_id)
    assert (again.tags, again.priority) == (["mri"], 4)
    assert again.input_sha256 == before["input_sha256"]
    assert _marks(sessions) == []
    assert _crash(sessions, new_id) == "queued"
    # What its owner was told stays true.
    after = job(sessions, job_id)
    assert (after.status, after.state_reason, events(sessions, job_id)) == ("failed", before["state_reason"], told)


def test_a_second_release_gives_the_same_job(sessions: Sessions) -> None:
    job_id = _quarantined(sessions, account(sessions))
    first = repeats.release(sessions, job_id)
    assert repeats.release(sessions, job_id) == (first[0], False)


def test_a_job_that_was_stopped_for_anothers_crashes_can_be_released_too(sessions: Sessions) -> None:
    owner = account(sessions)
    _quarantined(sessions, owner)
    victim = submit(sessions, owner)
    _crash(sessions, victim)
    new_id, _new = repeats.release(sessions, victim)
    assert _crash(sessions, new_id) == "queued"


def test_only_a_quarantined_job_is_released(sessions: Sessions) -> None:
    job_id = submit(sessions)
    with pytest.raises(Conflict, match="is queued and was not quarantined"):
        repeats.release(sessions, job_id)
    lifecycle.settle(sessions, claim(sessions).lease, "failed", CRASHED)
    with pytest.raises(Conflict, match="is failed and was not quarantined"):
        repeats.release(sessions, job_id)
    with pytest.raises(NotFound):
        repeats.release(sessions, uuid4())


# ---------------------------------------------------------------- what the same input is


def test_the_same_bytes_under_other_names_are_the_same_input() -> None:
    source, data = RECIPE.source, RECIPE.data
    renamed = RECIPE.model_copy(
        update={
            "source": source.model_copy(update={"onnx": uuid4()}),
            "data": data.model_copy(update={"artifact": uuid4()}),
        }
    )
    assert input_digest(RECIPE, "a" * 64, "b" * 64) == input_digest(renamed, "a" * 64, "b" * 64)
    assert input_digest(RECIPE) != input_digest(renamed)


def test_other_bytes_and_other_words_are_another_input() -> None:
    digests = {
        input_digest(RECIPE, "a" * 64, "b" * 64),
        input_digest(RECIPE, "b" * 64, "a" * 64),
        input_digest(RECIPE, "a" * 64, "c" * 64),
        input_digest(OTHER, "a" * 64, "b" * 64),
        input_digest(RECIPE),
    }
    assert len(digests) == 5


def test_an_orders_digest_comes_with_its_job_and_with_its_retry(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id, _new = lifecycle.submit(sessions, order(owner, input_sha256="d" * 64))
    lifecycle.cancel(sessions, owner, job_id)
    again, _new = repeats.retry(sessions, owner, job_id)
    assert {job(sessions, job_id).input_sha256, job(sessions, again).input_sha256} == {"d" * 64}


def test_a_retry_has_the_attempts_that_were_asked_for_however_often_the_job_was_given_back(sessions: Sessions) -> None:
    owner = account(sessions)
    job_id = submit(sessions, owner, max_attempts=2)
    for cause in ("given_back", "given_back", "lost"):
        lifecycle.requeue(sessions, claim(sessions).lease, Reason("stopped", "It stopped."), cause=cause)
    lifecycle.cancel(sessions, owner, job_id)
    again, _new = repeats.retry(sessions, owner, job_id)
    assert (job(sessions, job_id).max_attempts, job(sessions, again).max_attempts) == (4, 2)
