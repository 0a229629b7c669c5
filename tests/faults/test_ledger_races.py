"""30, 31, 45: many claimers and sweepers at one ledger, and two who write the same job at the same moment."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text

from shared import lifecycle
from shared.db import Sessions, make_sessions, ping, transaction
from shared.errors import LeaseLost
from shared.ledger import Claim, Lease
from shared.settings import Settings
from tests.shared.ledger_desk import ABLE, account, execute, job, lapse, order, submit

NUM_STAGES, NUM_RACES = 10_000, 1_000
STAGES = 20  # of a job
MAX_HANDICAP = 4  # round trips
MET = {"verdict": "met"}


@pytest.fixture
def crowd(settings: Settings) -> Iterator[Sessions]:
    """Sessions for 16 threads at once."""
    made = make_sessions(settings, pool_size=16)
    yield made
    made.kw["bind"].dispose()


# ---------------------------------------------------------------- 30


class Crowd:
    """Claimers that finish stages, now and then fall silent in the midst of them, and sweepers, until all is done."""

    def __init__(self, sessions: Sessions, num_jobs: int) -> None:
        self.sessions, self.num_jobs = sessions, num_jobs
        self.settled: list[UUID] = []
        self.claims: list[tuple[UUID, UUID, int]] = []
        self.finished: list[tuple[UUID, int]] = []
        self.silent: list[UUID] = []
        self.swept: list[int] = []
        self.done = threading.Event()

    def claimer(self, number: int) -> None:
        able, chance = replace(ABLE, worker_id=f"worker-{number}"), random.Random(number)
        while not self.done.is_set():
            taken = lifecycle.claim(self.sessions, able, 60)
            if taken is None:
                self.done.wait(0.01)
                continue
            self.claims.append((taken.account_id, taken.lease.job_id, taken.attempt))
            try:
                self.work(taken, chance)
            except LeaseLost:
                continue

    def work(self, taken: Claim, chance: random.Random) -> None:
        falls_silent_at = chance.randrange(STAGES) if taken.attempt == 1 and chance.random() < 0.1 else None
        for position in self.open_stages(taken.lease.job_id):
            if position == falls_silent_at:
                self.silent.append(taken.lease.job_id)
                lifecycle.heartbeat(self.sessions, taken.lease, -1)
            lifecycle.finish_stage(self.sessions, taken.lease, position, "cached", {}, [])
            self.finished.append((taken.lease.job_id, position))
        lifecycle.settle(self.sessions, taken.lease, "succeeded", None, MET)
        self.settled.append(taken.lease.job_id)
        if len(self.settled) == self.num_jobs:
            self.done.set()

    def open_stages(self, job_id: UUID) -> list[int]:
        pending = "SELECT position FROM stage_runs WHERE job_id = :id AND status = 'pending' ORDER BY position"
        with transaction(self.sessions) as session:
            return list(session.scalars(text(pending), {"id": job_id}))

    def sweeper(self) -> None:
        while not self.done.wait(0.05):
            self.swept.append(lifecycle.sweep_leases(self.sessions))


def _of_many_stages(sessions: Sessions, owner: UUID, num_jobs: int) -> None:
    """Jobs of STAGES stages each that wait."""
    stages = [{"kind": "quantize"}] * (STAGES - 1) + [{"kind": "build_engine"}]
    _write(sessions, owner, num_jobs, stages, "queued")


def _running(sessions: Sessions, owner: UUID, num_jobs: int) -> list[Lease]:
    """Jobs that run."""
    _write(sessions, owner, num_jobs, [{"kind": "quantize"}, {"kind": "build_engine"}], "running")
    with transaction(sessions) as session:
        rows = session.execute(text("SELECT id, lease_token FROM jobs WHERE status = 'running' ORDER BY id")).all()
    return [Lease(*row) for row in rows]


def _write(sessions: Sessions, owner: UUID, num_jobs: int, stages: list[dict[str, str]], status: str) -> None:
    """Jobs as submits and claims would have written them, but all in one statement."""
    written = """
        WITH made AS (
            INSERT INTO jobs (id, account_id, name, recipe, requires, timeout_seconds, max_attempts, last_sequence,
                              status, attempt, started_at, lease_token, lease_expires_at, worker_id)
            SELECT uuidv7(), CAST(:owner AS uuid), 'n', CAST(:recipe AS jsonb), CAST(:requires AS text[]), 60, 9,
                   1 + :claims, :status, :claims, CASE WHEN :claims = 1 THEN now() END,
                   CASE WHEN :claims = 1 THEN gen_random_uuid() END,
                   CASE WHEN :claims = 1 THEN now() + interval '10 minutes' END,
                   CASE WHEN :claims = 1 THEN 'worker' END
            FROM generate_series(1, :num_jobs) RETURNING id, lease_token
        ), submitted AS (
            INSERT INTO job_events (job_id, sequence, attempt, kind) SELECT id, 1, 0, 'submitted' FROM made
        ), claimed AS (
            INSERT INTO job_events (job_id, sequence, attempt, kind, lease_token)
            SELECT id, 2, 1, 'claimed', lease_token FROM made WHERE lease_token IS NOT NULL
        )
        INSERT INTO stage_runs (job_id, position, kind)
        SELECT id, number - 1, stage ->> 'kind'
        FROM made, jsonb_array_elements(CAST(:recipe AS jsonb) -> 'stages') WITH ORDINALITY AS s (stage, number)
    """
    recipe = json.dumps({**order(owner).recipe.model_dump(mode="json"), "stages": stages})
    facts = {"recipe": recipe, "requires": list(ABLE.capabilities), "num_jobs": num_jobs}
    execute(sessions, written, owner=owner, status=status, claims=int(status == "running"), **facts)


def _told(sessions: Sessions) -> dict[UUID, str]:
    """The kinds of every job's events after its claim, in their order."""
    asked = """
        SELECT job_id, string_agg(kind, ' ' ORDER BY sequence) AS told FROM job_events
        WHERE kind NOT IN ('submitted', 'claimed') GROUP BY job_id
    """
    with transaction(sessions) as session:
        return {row.job_id: row.told for row in session.execute(text(asked))}


@pytest.mark.fault(30, "8 sweepers, 8 claimers, 10,000 stages")
def test_a_crowd_claims_no_job_twice_and_starves_nobody(sessions: Sessions, crowd: Sessions) -> None:
    many, few = account(sessions, "many"), account(sessions, "few")
    num_jobs = NUM_STAGES // STAGES
    _of_many_stages(sessions, many, num_jobs - 20)
    _of_many_stages(sessions, few, 20)
    made = Crowd(crowd, num_jobs)
    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(made.claimer, number) for number in range(8)]
        running += [pool.submit(made.sweeper) for _ in range(8)]
        wait(running, return_when=FIRST_EXCEPTION)
        made.done.set()
    assert [future.exception() for future in running] == [None] * 16
    assert len(set(made.claims)) == len(made.claims)
    assert Counter(made.finished) == Counter(set(made.finished))
    assert len(made.finished) == NUM_STAGES
    assert made.silent
    assert sum(made.swept) > 0
    assert len(made.claims) == num_jobs + sum(made.swept)
    turns = [owner for owner, _job_id, attempt in made.claims if attempt == 1]
    assert few not in turns[100:], "the small account waited for the large one"
    with transaction(sessions) as session:
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert session.scalar(text(deadlocks)) == 0


# ---------------------------------------------------------------- 31, 45


def _race(
    rounds: int, *runners: Callable[[int], Any], before: Callable[[int], None] = lambda _number: None
) -> list[list[Any]]:
    """Each runner's answers or errors, round by round; a round begins at once for all of them, after its `before`."""
    numbers = itertools.count()
    barrier = threading.Barrier(len(runners), action=lambda: before(next(numbers)))

    def run(runner: Callable[[int], Any]) -> list[Any]:
        answers: list[Any] = []
        for number in range(rounds):
            barrier.wait(timeout=60)
            try:
                answers.append(runner(number))
            except LeaseLost as error:
                answers.append(error)
        return answers

    with ThreadPoolExecutor(len(runners)) as pool:
        return [future.result() for future in [pool.submit(run, runner) for runner in runners]]


def _handicapped(sessions: Sessions, seed: int, run: Callable[[int], Any]) -> Callable[[int], Any]:
    """The runner, who first asks the database for a sign of life, as often as chance wants."""
    chance = random.Random(seed)

    def late(number: int) -> Any:
        for _ in range(chance.randrange(MAX_HANDICAP)):
            ping(sessions)
        return run(number)

    return late


@pytest.mark.fault(31, "sweeper against settle, 1,000 times")
def test_sweeper_against_settle_has_exactly_one_winner(sessions: Sessions) -> None:
    owner = account(sessions)
    leases = _running(sessions, owner, NUM_RACES)
    swept, settled = _race(
        NUM_RACES,
        _handicapped(sessions, 1, lambda _number: lifecycle.sweep_leases(sessions, limit=1)),
        _handicapped(sessions, 2, lambda number: lifecycle.settle(sessions, leases[number], "succeeded", None, MET)),
        before=lambda number: lapse(sessions, leases[number].job_id),  # this round's alone
    )
    told = _told(sessions)
    won = Counter(told.values())
    assert won.total() == won["requeued"] + won["succeeded"] == NUM_RACES
    assert min(won["requeued"], won["succeeded"]) > NUM_RACES / 20, won
    for lease, num_swept, answer in zip(leases, swept, settled, strict=True):
        assert num_swept == isinstance(answer, LeaseLost) == (told[lease.job_id] == "requeued")


@pytest.mark.fault(45, "cancel against completion, 1,000 times; cancel three times")
def test_cancel_against_completion_tells_one_truth(sessions: Sessions) -> None:
    owner = account(sessions)
    leases = _running(sessions, owner, NUM_RACES)
    told, settled = _race(
        NUM_RACES,
        lambda number: lifecycle.cancel(sessions, owner, leases[number].job_id),
        lambda number: lifecycle.settle(sessions, leases[number], "succeeded", None, MET),
    )
    assert settled == [None] * NUM_RACES
    written = _told(sessions)
    for lease, answer in zip(leases, told, strict=True):
        assert written[lease.job_id] == {"running": "cancel_requested succeeded", "succeeded": "succeeded"}[answer]


@pytest.mark.fault(45, "cancel against completion, 1,000 times; cancel three times")
def test_three_cancels_at_once_are_one(sessions: Sessions) -> None:
    owner = account(sessions)
    leases = _running(sessions, owner, 30)
    waiting = [submit(sessions, owner) for _ in range(30)]
    jobs = [*(lease.job_id for lease in leases), *waiting]
    told = _race(60, *[lambda number: lifecycle.cancel(sessions, owner, jobs[number])] * 3)
    written = _told(sessions)
    for number, job_id in enumerate(jobs):
        running = number < len(leases)
        assert {answers[number] for answers in told} == {"running" if running else "cancelled"}
        assert written[job_id] == ("cancel_requested" if running else "cancelled")
    for lease in leases:
        lifecycle.settle(sessions, lease, "cancelled")
        assert job(sessions, lease.job_id).status == "cancelled"
