"""That the database finds what the ledger asks for by its indexes: the plans of the very statements that are sent."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, event, text

from shared import browse, checkpoints, lifecycle, uploads, workers
from shared.db import Sessions
from shared.ledger import Reason
from shared.storage import Storage
from tests.shared.ledger_desk import ABLE, RECIPE, account, claim, execute, submit
from tests.shared.test_workers import CPU

Planned = Callable[[Callable[[], Any]], str]

# Of 8,000 jobs of an account the oldest have ended, as in life, and `queued` of them wait.
FILL = """
    INSERT INTO jobs (id, account_id, name, recipe, requires, timeout_seconds, status, attempt, lease_token,
                      lease_expires_at, worker_id, started_at, last_sequence)
    SELECT uuidv7(), CAST(:owner AS uuid), 'n', CAST(:recipe AS jsonb), CAST(:requires AS text[]), 60,
           CASE WHEN n > 8000 - :queued THEN 'queued' WHEN n % 200 = 1 THEN 'running' ELSE 'succeeded' END, 1,
           CASE WHEN n <= 8000 - :queued AND n % 200 = 1 THEN gen_random_uuid() END,
           CASE WHEN n <= 8000 - :queued AND n % 200 = 1 THEN now() + interval '1 hour' END,
           CASE WHEN n <= 8000 - :queued AND n % 200 = 1 THEN 'w' END,
           CASE WHEN n <= 8000 - :queued THEN now() END, 0
    FROM generate_series(1, 8000) n
"""


def _fill(sessions: Sessions, owner: UUID, queued: int, requires: list[str] | None = None) -> None:
    facts = {"recipe": RECIPE.model_dump_json(), "requires": requires or RECIPE.requirements()}
    execute(sessions, FILL, owner=owner, queued=queued, **facts)
    execute(sessions, "ANALYZE jobs")


@pytest.fixture(params=[40, 7000], ids=["a short queue", "a long queue"])
def owner(sessions: Sessions, request: pytest.FixtureRequest) -> UUID:
    """An account with thousands of jobs, and a worker that can do them."""
    made = account(sessions)
    _fill(sessions, made, request.param)
    workers.register(sessions, CPU)
    return made


@pytest.fixture
def planned(sessions: Sessions) -> Planned:
    """Carries out a call, and gives the plans of the statements that it sent."""
    engine = sessions.kw["bind"]
    assert isinstance(engine, Engine)
    sent: list[tuple[str, Any]] = []

    def keep(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    def plans(call: Callable[[], Any]) -> str:
        sent.clear()
        event.listen(engine, "before_cursor_execute", keep)
        call()
        event.remove(engine, "before_cursor_execute", keep)
        asked = [entry for entry in sent if re.match(r"\s*(WITH|SELECT|UPDATE)", entry[0])]
        lines = []
        with engine.connect() as connection:
            for statement, parameters in asked:
                explained = connection.exec_driver_sql(f"EXPLAIN (COSTS off) {statement}", parameters)
                lines += list(explained.scalars())
        return "\n".join(lines)

    return plans


def _touches_only_by(plan: str, *indexes: str) -> None:
    for index in indexes:
        assert index in plan, plan
    assert not re.search(r"Seq Scan on (jobs|artifacts|stage_runs|job_events)\b", plan), plan


def test_the_claim_finds_its_job_by_indexes_alone(sessions: Sessions, owner: UUID, planned: Planned) -> None:
    plan = planned(lambda: lifecycle.claim(sessions, ABLE, 30))
    _touches_only_by(plan, "ix_jobs_next", "ix_jobs_served")
    assert re.search(r"ix_jobs_running|ix_jobs_lease", plan), plan


def _pages_of_a_claim(sessions: Sessions) -> int:
    parameters = {"queues": ["default"], "capabilities": list(ABLE.capabilities), "memory_bytes": 2**40}
    holder = {"worker_id": "w", "token": uuid4(), "lease_seconds": 30}
    with sessions() as session:  # rolled back: ANALYZE carries the statement out
        explain = text(f"EXPLAIN (ANALYZE, BUFFERS, TIMING off) {lifecycle.CLAIM.text}")
        plan = "\n".join(session.scalars(explain, {**parameters, **holder}).all())
    return max(int(count) for count in re.findall(r"shared hit=(\d+)", plan))


def test_a_claim_reads_as_few_pages_from_a_long_queue_as_from_a_short_one(sessions: Sessions) -> None:
    submit(sessions, account(sessions, "small"))
    execute(sessions, "ANALYZE jobs")
    short = _pages_of_a_claim(sessions)
    _fill(sessions, account(sessions, "large"), queued=7000)
    assert _pages_of_a_claim(sessions) < short + 60


def test_accounts_that_have_nothing_queued_cost_a_claim_nothing(sessions: Sessions) -> None:
    submit(sessions)
    before = _pages_of_a_claim(sessions)
    execute(sessions, "INSERT INTO accounts (id, name) SELECT uuidv7(), 'idle-' || n FROM generate_series(1, 2000) n")
    execute(sessions, "ANALYZE accounts")
    assert _pages_of_a_claim(sessions) <= before + 5


def test_jobs_that_a_worker_cannot_do_cost_its_claim_next_to_nothing(sessions: Sessions) -> None:
    submit(sessions)
    execute(sessions, "ANALYZE jobs")
    before = _pages_of_a_claim(sessions)
    _fill(sessions, account(sessions, "other"), queued=7000, requires=["engine:tensorrt"])
    assert _pages_of_a_claim(sessions) < before + 60


@pytest.mark.parametrize("lapsed", [False, True], ids=["nothing lapsed", "one lapsed"])
def test_the_sweep_of_leases_looks_at_running_jobs_alone(
    sessions: Sessions, owner: UUID, planned: Planned, lapsed: bool
) -> None:
    if lapsed:
        lifecycle.heartbeat(sessions, claim(sessions).lease, -1)
    plan = planned(lambda: lifecycle.sweep_leases(sessions))
    _touches_only_by(plan, "ix_jobs_lease")


@pytest.mark.parametrize("stuck", [False, True], ids=["a worker can", "no worker can"])
def test_reasons_for_waiting_are_found_by_an_index(
    sessions: Sessions, owner: UUID, planned: Planned, stuck: bool
) -> None:
    if stuck:
        workers.retire(sessions, CPU.id)
    plan = planned(lambda: workers.explain_waiting(sessions, limit=2))
    _touches_only_by(plan, "ix_jobs_waiting")


def test_queues_with_work_are_found_by_an_index(sessions: Sessions, owner: UUID, planned: Planned) -> None:
    plan = planned(lambda: workers.queues_with_work(sessions))
    _touches_only_by(plan)
    assert re.search(r"ix_jobs_(claim|waiting)", plan), plan


def test_what_is_to_be_removed_is_found_by_an_index(
    sessions: Sessions, storage: Storage, owner: UUID, planned: Planned
) -> None:
    uploaded = """
        INSERT INTO artifacts (id, account_id, role, name, format, key, sha256, size_bytes, status)
        SELECT uuidv7(), CAST(:owner AS uuid), 'upload', 'n', 'onnx', 'k' || n, 's', 1, 'ready'
        FROM generate_series(1, 5000) n
    """
    execute(sessions, uploaded, owner=owner)
    execute(sessions, "ANALYZE artifacts")
    _touches_only_by(planned(lambda: uploads.forget_expired(sessions, storage)), "ix_artifacts_expiry")
    _touches_only_by(planned(lambda: checkpoints.forget_stale(sessions, storage)), "ix_artifacts_checkpoints")


def test_a_page_of_the_list_begins_where_the_one_before_ended(
    sessions: Sessions, owner: UUID, planned: Planned
) -> None:
    page = browse.jobs(sessions, owner, limit=20)
    plan = planned(lambda: browse.jobs(sessions, owner, before=page[-1]["id"], limit=20))
    _touches_only_by(plan)
    assert re.search(r"Index Cond: .*id < ", plan), plan
    assert "Sort" not in plan.split("SubPlan")[0], plan


@pytest.mark.parametrize("statuses", [["failed"], ["queued", "succeeded"]])
def test_a_page_of_some_statuses_passes_over_no_others(
    sessions: Sessions, owner: UUID, planned: Planned, statuses: list[str]
) -> None:
    plan = planned(lambda: browse.jobs(sessions, owner, statuses=statuses, limit=20))
    _touches_only_by(plan, "ix_jobs_list_by_status")


def test_jobs_with_a_tag_are_found_by_an_index(sessions: Sessions, owner: UUID, planned: Planned) -> None:
    plan = planned(lambda: browse.jobs(sessions, owner, tags=["mri"], limit=20))
    _touches_only_by(plan, "ix_jobs_tags")


def test_a_requeue_reads_its_own_rows_alone(sessions: Sessions, owner: UUID, planned: Planned) -> None:
    lease = claim(sessions).lease
    crashed = Reason("child_crashed", "It died.")
    _touches_only_by(planned(lambda: lifecycle.requeue(sessions, lease, crashed, cause="crashed")), "pk_jobs")
