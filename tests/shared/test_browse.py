"""What an account may read of its jobs, and that a stranger reads nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event

from shared import accounts, browse, lifecycle
from shared.db import Sessions
from shared.errors import NotFound, ReportNotReady
from shared.ledger import Capacity, Claim, Order, Progress, Reason, Stored
from shared.models import Artifact
from shared.recipe import Recipe
from shared.schemas import Job

RECIPE = Recipe.model_validate(
    {
        "source": {"onnx": str(uuid4())},
        "task": {"kind": "classification", "classes": ["a", "b"]},
        "data": {"artifact": str(uuid4())},
        "stages": [{"kind": "quantize"}, {"kind": "build_engine"}],
    }
)
ABLE = Capacity("w1", ["default"], RECIPE.requirements(), 2**40)


@pytest.fixture
def account_id(sessions: Sessions) -> UUID:
    return accounts.ensure_account(sessions, "ours")


def test_a_job_is_read_whole_in_one_round_trip(sessions: Sessions, account_id: UUID) -> None:
    job_id = _submit(sessions, account_id, tags=["x"])
    statements: list[str] = []
    event.listen(sessions.kw["bind"], "before_cursor_execute", lambda *facts: statements.append(facts[2]))
    found = browse.job(sessions, account_id, job_id)
    assert len(statements) == 1
    job = Job.model_validate({**found, "url": "u"})
    assert (job.status, job.tags, job.last_sequence, job.recipe) == ("queued", ["x"], 1, RECIPE)
    assert [(stage.position, stage.kind, stage.status) for stage in job.stages] == [
        (0, "quantize", "pending"),
        (1, "build_engine", "pending"),
    ]


def test_a_job_shows_how_far_its_stages_are(sessions: Sessions, account_id: UUID) -> None:
    job_id = _submit(sessions, account_id)
    claim = _claim(sessions)
    lifecycle.start_stage(sessions, claim.lease, 0)
    lifecycle.heartbeat(sessions, claim.lease, 60, Progress(0, 0.25, "calibrating"))
    job = Job.model_validate({**browse.job(sessions, account_id, job_id), "url": "u"})
    stage = job.stages[0]
    assert (stage.status, stage.attempt, stage.progress, stage.message) == ("running", 1, 0.25, "calibrating")
    assert stage.started_at is not None
    assert job.started_at is not None


def test_jobs_are_listed_newest_first_before_a_given_one(sessions: Sessions, account_id: UUID) -> None:
    ids = [_submit(sessions, account_id) for _ in range(4)]
    found = browse.jobs(sessions, account_id, limit=10)
    assert [job["id"] for job in found] == ids[::-1]
    assert [job["id"] for job in browse.jobs(sessions, account_id, before=ids[2], limit=1)] == [ids[1]]
    lifecycle.cancel(sessions, account_id, ids[2])
    ended_or_not = ["queued", "cancelled", "queued"]
    found = browse.jobs(sessions, account_id, statuses=ended_or_not, before=ids[3], limit=2)
    assert [job["id"] for job in found] == [ids[2], ids[1]]


def test_jobs_are_chosen_by_status_and_tags(sessions: Sessions, account_id: UUID) -> None:
    queued, cancelled = _submit(sessions, account_id, tags=["a", "b"]), _submit(sessions, account_id, tags=["a"])
    lifecycle.cancel(sessions, account_id, cancelled)
    for filters, expected in (
        ({}, {queued, cancelled}),
        ({"tags": ["a"]}, {queued, cancelled}),
        ({"tags": ["a", "b"]}, {queued}),
        ({"statuses": ["cancelled"]}, {cancelled}),
        ({"statuses": ["cancelled", "queued"]}, {queued, cancelled}),
        ({"statuses": ["cancelled"], "tags": ["b"]}, set()),
        ({"statuses": ["cancelled", "cancelled"]}, {cancelled}),
        ({"statuses": ["running"]}, set()),
    ):
        found = browse.jobs(sessions, account_id, limit=10, **filters)  # type: ignore[arg-type]
        assert {job["id"] for job in found} == expected, filters


def test_a_standing_tells_the_sequence_and_the_end(sessions: Sessions, account_id: UUID) -> None:
    job_id = _submit(sessions, account_id)
    assert browse.standing(sessions, account_id, job_id) == browse.Standing(1, False)
    lifecycle.cancel(sessions, account_id, job_id)
    assert browse.standing(sessions, account_id, job_id) == browse.Standing(2, True)


def test_events_come_in_order_and_in_pages(sessions: Sessions, account_id: UUID) -> None:
    job_id = _submit(sessions, account_id)
    claim = _claim(sessions)
    for number in range(5):
        lifecycle.heartbeat(sessions, claim.lease, 60, Progress(None, number / 5, "m"))
    assert [e.sequence for e in browse.events(sessions, job_id, after=0, limit=100)] == list(range(1, 8))
    page = browse.events(sessions, job_id, after=2, limit=2)
    assert [(e.sequence, e.kind, e.attempt) for e in page] == [(3, "progress", 1), (4, "progress", 1)]
    assert page[1].data["fraction"] == 0.2


def test_files_are_listed_and_found_by_name(sessions: Sessions, account_id: UUID) -> None:
    job_id = _submit(sessions, account_id)
    assert browse.artifacts(sessions, account_id, job_id) == []
    lifecycle.settle(sessions, _claim(sessions).lease, "failed", Reason("x", "y"), None, [_stored("engine", "e.zip")])
    assert [file.name for file in browse.artifacts(sessions, account_id, job_id)] == ["e.zip"]
    assert browse.artifact(sessions, account_id, job_id, "e.zip").role == "engine"
    with pytest.raises(NotFound, match=r"no file named 'f\.zip'"):
        browse.artifact(sessions, account_id, job_id, "f.zip")


def test_the_log_is_the_newest_attempts(sessions: Sessions, account_id: UUID) -> None:
    job_id = _submit(sessions, account_id)
    with pytest.raises(NotFound, match="no log yet"):
        browse.log(sessions, account_id, job_id)
    first = _claim(sessions)
    lifecycle.heartbeat(sessions, first.lease, 60, log="one ")
    lifecycle.heartbeat(sessions, first.lease, 60, log="two")
    assert browse.log(sessions, account_id, job_id) == "one two"
    kept = [_stored("log", "attempt-1.log")]
    lifecycle.requeue(sessions, first.lease, Reason("x", "y"), cause="lost", stored=kept)
    found = browse.log(sessions, account_id, job_id)
    assert isinstance(found, Artifact)
    assert found.name == "attempt-1.log"

    lifecycle.heartbeat(sessions, _claim(sessions).lease, 60, log="three")
    assert browse.log(sessions, account_id, job_id) == "three"
    assert isinstance(browse.log(sessions, account_id, job_id, attempt=1), Artifact)
    with pytest.raises(NotFound, match="no log of attempt 9"):
        browse.log(sessions, account_id, job_id, attempt=9)


def test_a_log_whose_worker_was_lost_is_what_it_told(sessions: Sessions, account_id: UUID) -> None:
    job_id = _submit(sessions, account_id)
    first = _claim(sessions)
    lifecycle.heartbeat(sessions, first.lease, 60, log="last words")
    lifecycle.requeue(sessions, first.lease, Reason("x", "y"), cause="lost")
    assert browse.log(sessions, account_id, job_id) == "last words"
    assert browse.log(sessions, account_id, job_id, attempt=1) == "last words"


def test_a_report_that_is_not_there_says_why(sessions: Sessions, account_id: UUID) -> None:
    job_id = _submit(sessions, account_id)
    with pytest.raises(ReportNotReady, match="the job is queued"):
        browse.report(sessions, account_id, job_id)
    lifecycle.cancel(sessions, account_id, job_id)
    with pytest.raises(ReportNotReady, match="the job is cancelled and left no report"):
        browse.report(sessions, account_id, job_id)


READS: list[Callable[[Sessions, UUID, UUID], Any]] = [
    browse.job,
    browse.standing,
    browse.report,
    browse.artifacts,
    browse.log,
    lambda sessions, account_id, job_id: browse.artifact(sessions, account_id, job_id, "e.zip"),
]


@pytest.mark.parametrize("read", READS)
def test_another_accounts_job_reads_as_missing(
    sessions: Sessions, account_id: UUID, read: Callable[[Sessions, UUID, UUID], Any]
) -> None:
    job_id = _submit(sessions, account_id)
    stored = [_stored("engine", "e.zip"), _stored("log", "attempt-1.log")]
    lifecycle.settle(sessions, _claim(sessions).lease, "failed", Reason("x", "y"), None, stored)
    stranger = accounts.ensure_account(sessions, "stranger")
    for account, job in ((stranger, job_id), (account_id, uuid4())):
        with pytest.raises(NotFound, match=f"there is no job {job}"):
            read(sessions, account, job)
    assert browse.jobs(sessions, stranger, limit=10) == []


def _submit(sessions: Sessions, account_id: UUID, tags: list[str] | None = None) -> UUID:
    return lifecycle.submit(sessions, Order(account_id, "n", RECIPE, 60.0, tags=tags or []))[0]


def _claim(sessions: Sessions) -> Claim:
    claimed = lifecycle.claim(sessions, ABLE, 60)
    assert claimed is not None
    return claimed


def _stored(role: str, name: str) -> Stored:
    return Stored(role, name, name.rpartition(".")[2], uuid4().hex, "0" * 64, 1)
