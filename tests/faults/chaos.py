"""Seeded chaos: jobs come in over HTTP while everything is killed; at the end none is lost, doubled, or wrong.

`make chaos` runs it for ten minutes, `python -m tests.faults.chaos --seed N` with the kills of an earlier run in their
order. It ends with exit code 1 if a law is broken, and then leaves the service's logs where they are.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import click
from sqlalchemy import func, select

from burnish import Client
from burnish.local.waiting import wait_until
from shared.accounts import create_key, ensure_account
from shared.db import Sessions, transaction
from shared.errors import DatabaseUnavailable
from shared.models import JOB_TERMINAL, Artifact, Job
from tests.faults.chaos_customers import Customer, faultless_result
from tests.faults.chaos_outcome import Outcome, costs
from tests.faults.chaos_plan import ACCOUNTS, Plan, plan
from tests.faults.chaos_site import Site, standing

SUBMIT_SECONDS = 60.0  # from the run's end, for the last job to be acknowledged
QUIET_SECONDS = 60.0  # from then, and from each job's end, for the next one to end


@click.command()
@click.option("--seed", type=int, default=None, help="Of an earlier run.  [default: a new one]")
@click.option("--seconds", type=click.FloatRange(min=15), default=600.0, show_default=True)
@click.option("--jobs", "num_jobs", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where to keep the page that is printed.")
def main(seed: int | None, seconds: float, num_jobs: int, out: Path | None) -> None:
    """Kill everything again and again, and tell what it cost."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    directory = Path(tempfile.mkdtemp(prefix="burnish-chaos-"))
    print(f"seed {seed}, {seconds:g} s, {num_jobs} jobs, in {directory}", flush=True)
    outcome = run(plan(seed, seconds, num_jobs), directory, say=lambda told: print(told, flush=True))
    print(outcome.page())
    if out is not None:
        out.write_text(outcome.page(), encoding="utf-8")
    if outcome.broken:
        sys.exit(1)
    shutil.rmtree(directory)


def run(planned: Plan, directory: Path, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Carry a plan out on a service of its own, wait until all is quiet, and look at everything."""
    outcome = Outcome(planned, began_at=datetime.now(UTC))
    with standing(directory / "site") as site, _customers(site, planned, directory) as customers:
        started_at = time.monotonic()
        for customer in customers:
            customer.start(lambda: time.monotonic() - started_at)
        _kill_all(site, planned, outcome, started_at, say)
        for customer in customers:
            customer.join(started_at + planned.seconds + SUBMIT_SECONDS - time.monotonic())
        say("waiting until all is quiet")
        _wait_for_quiet(site.sessions)
        site.wait_whole()
        outcome.broken += _unkept(site.sessions, customers, outcome)
        outcome.broken += site.close_apps()
        outcome.broken += site.audit()
        outcome.costs = costs(site.sessions, outcome.chaos_began_at)
    outcome.seconds = (datetime.now(UTC) - outcome.began_at).total_seconds()
    outcome.load_average, _, _ = os.getloadavg()
    return outcome


@contextmanager
def _customers(site: Site, planned: Plan, directory: Path) -> Iterator[list[Customer]]:
    """One for each account, with a key and a client of its own."""
    customers = []
    for name in ACCOUNTS:
        key = create_key(site.sessions, ensure_account(site.sessions, name), "chaos")
        (directory / name).mkdir()
        errands = [errand for errand in planned.errands if errand.account == name]
        customers.append(Customer(Client(site.url, key, timeout_seconds=15), directory / name, errands))
    try:
        yield customers
    finally:
        for customer in customers:
            customer.close()


def _kill_all(site: Site, planned: Plan, outcome: Outcome, started_at: float, say: Callable[[str], None]) -> None:
    """Each kill at its moment, one after the other: whoever is not there is waited for."""
    for kill in planned.kills:
        threading.Event().wait(started_at + kill.at_seconds - time.monotonic())
        outcome.chaos_began_at = outcome.chaos_began_at or datetime.now(UTC)
        who = site.kill(kill)
        outcome.killed.append(kill.what)
        say(f"{time.monotonic() - started_at:6.1f} s  {kill.what:<10}  {who}")


def _wait_for_quiet(sessions: Sessions) -> None:
    """Wait until every job has ended, or none has for long."""
    seen = [sys.maxsize]

    def fewer() -> bool:
        found = _num_unended(sessions)
        if found is None or found >= seen[-1]:
            return False
        seen.append(found)
        return True

    while seen[-1] and wait_until(fewer, QUIET_SECONDS):
        pass


def _num_unended(sessions: Sessions) -> int | None:
    try:
        with transaction(sessions) as session:
            return session.scalar(select(func.count()).where(Job.status.not_in(JOB_TERMINAL)))
    except DatabaseUnavailable:
        return None


def _unkept(sessions: Sessions, customers: Sequence[Customer], outcome: Outcome) -> list[str]:
    """What was promised to a customer and is not so."""
    results, told = _results(sessions), []
    for customer in customers:
        told += customer.complaints
        outcome.refusals += customer.refusals
        jobs = customer.jobs()
        doubled = set(jobs) - set(customer.acknowledged.values())
        told += [f"job {job_id} is there, and no answer named it" for job_id in doubled]
        for errand, job_id in customer.acknowledged.items():
            job = jobs.get(job_id)
            if job is None:
                told.append(f"job {job_id} was acknowledged and is lost")
                continue
            outcome.statuses[job.status] += 1
            why = job.state_reason.message if job.state_reason else ""
            if job.status not in JOB_TERMINAL or job.status == "failed":  # nothing that was done to a job is its fault
                told.append(f"job {job_id} is {job.status}: {why}")
            if job.status == "cancelled" and errand.cancel_after_seconds is None:
                told.append(f"job {job_id} was cancelled by nobody")
            if job.status == "succeeded" and results[job_id] != faultless_result(errand):
                told.append(f"job {job_id} made other bytes than it would have undisturbed: {results[job_id]}")
    return told


def _results(sessions: Sessions) -> dict[UUID, dict[str, str]]:
    """The bytes that jobs deliver: sha256 by name, of their stages' files."""
    results: dict[UUID, dict[str, str]] = defaultdict(dict)
    files = select(Artifact.job_id, Artifact.name, Artifact.sha256).where(Artifact.stage_position.is_not(None))
    with transaction(sessions) as session:
        for row in session.execute(files.where(Artifact.role != "checkpoint")):
            results[row.job_id][row.name] = row.sha256
    return results


if __name__ == "__main__":
    main()
