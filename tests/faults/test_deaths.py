"""4: whoever writes is killed at each line of the product at which that could matter, three times at each."""

from __future__ import annotations

import ast
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import select

from shared.db import transaction
from shared.models import Job
from tests.audit import audit
from tests.faults.ground import HERE, Ground, changed_results
from tests.faults.test_workers import attempts, take_back

ROOT = HERE.parents[1]
AT = "kill -9 at each fault point, 3 times"


def points() -> list[str]:
    """Every fault point, as the source names it."""
    found = set()
    for path in [*(ROOT / "worker").glob("*.py"), *(ROOT / "shared").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "reach":
                assert isinstance(node.args[0], ast.Constant), path
                found.add(str(node.args[0].value))
    return sorted(found)


@pytest.mark.fault(4, AT)
def test_a_job_whose_workers_die_at_every_point_three_times_is_done_right(ground: Ground, tmp_path: Path) -> None:
    """Jobs of five stages; each worker that takes one dies at the line that is next in the order of a job's life."""
    assert {*DEATHS, "event.written", *SUBMITS} == set(points()), "a point that nobody dies at"
    recipe = ground.recipe(("prune", "prune", "export_onnx", "quantize", "build_engine"))
    with attempts(ground) as carry_out:
        for deaths in (DEATHS, ONCE, ONCE):
            tally = tmp_path / "tally"
            job_id = ground.submit(f"epochs 3 3; tally 3 {tally}", recipe=recipe, max_attempts=60)
            for point in deaths:
                die(ground, carry_out, f"{point}=kill")
                take_back(ground, job_id)
            job = ground.job(job_id)
            assert (job.status, job.crashes, job.attempt) == ("succeeded", 0, len(deaths)), job.state_reason
            # Only an epoch whose checkpoint no row points to is done again.
            first = ["3 1"] * (1 + deaths.count("checkpoint.stored"))
            assert tally.read_text(encoding="utf-8").splitlines() == [*first, "3 2", "3 3"]
            tally.unlink()


# What is committed at a line is never done again, so a process can die of that only once for each there is of it.
ONCE = ("baseline.committed", "ending.committed")
DEATHS = (
    *("claim.committed", "inputs.fetched", "child.spawned") * 3,
    *("baseline.committed", *("stage.started",) * 3),
    *(*("stage.stored",) * 3, *("stage.committed",) * 3),
    *(*("checkpoint.stored",) * 3, *("checkpoint.committed",) * 3),
    *(*("ending.stored",) * 3, "ending.committed"),
)


def die(ground: Ground, carry_out: Callable[[str], int], faults: str) -> None:
    """An attempt dies of its faults, and the laws hold in that moment."""
    assert carry_out(faults) == -signal.SIGKILL, faults
    assert audit(ground.sessions, ground.storage) + changed_results(ground.sessions, ground.storage) == [], faults


@pytest.mark.fault(4, AT)
def test_what_a_worker_did_not_commit_before_it_died_was_never_written(ground: Ground, tmp_path: Path) -> None:
    """Each time it has written an event and what belongs to it, and dies before the commit."""
    # so rare that no heartbeat tells anything: its events would be counted too
    ground.settings = ground.settings.model_copy(update={"heartbeat_seconds": 10.0})
    crashed = tmp_path / "crashed"
    job_id = ground.submit(f"once 1 {crashed}", max_attempts=60)
    with attempts(ground) as carry_out:
        for event, statuses in UNCOMMITTED.items():
            for _ in range(3):
                if event == "requeued":
                    crashed.unlink(missing_ok=True)
                die(ground, carry_out, "event.written=kill")
                job = ground.job(job_id)
                told = [found.kind for found in ground.events(job_id) if found.attempt == job.attempt]
                assert event not in told
                assert (job.status, job.crashes, job.report, job.state_reason) == ("running", 0, None, None)
                assert [stage.status for stage in ground.stages(job_id)] == statuses
                assert len(ground.result(job_id)) == statuses.count("succeeded")
                assert ground.logs(job_id) == ""
                take_back(ground, job_id)
        assert carry_out("") == 0
    assert (ground.job(job_id).status, ground.job(job_id).attempt) == ("succeeded", 3 * len(UNCOMMITTED) + 1)


# By the event that is written, how the stages stand as long as it is not committed.
UNCOMMITTED = {"requeued": ["succeeded", "running"], "succeeded": ["succeeded", "succeeded"]}


@pytest.mark.fault(4, AT)
@pytest.mark.parametrize(("point", "num_written"), [("submit.begun", 0), ("submit.committed", 3)])
def test_a_submit_whose_process_dies_is_written_or_not(ground: Ground, point: str, num_written: int) -> None:
    keys = ["one", "two", "three"]
    told = [str(ground.account_id), ground.recipe().model_dump_json(), *keys]
    submitting = ground.start([sys.executable, "-c", SUBMIT, *told], f"{point}=kill")
    assert submitting.wait(timeout=60) == len(keys), ground.log()
    assert audit(ground.sessions, ground.storage) == []
    assert len(jobs(ground)) == num_written
    ids = {ground.submit(idempotency_key=key) for key in keys}
    assert jobs(ground) == ids
    assert len(ids) == len(keys)
    for _ in keys:
        assert ground.work() == "succeeded"


SUBMITS = ("submit.begun", "submit.committed")
# Ends with how many of those were killed of which each submits under one key.
SUBMIT = """
import os, signal, sys, uuid
from shared import lifecycle
from shared.db import make_sessions
from shared.ledger import Order
from shared.recipe import Recipe
from shared.settings import get_settings

account_id, recipe, *keys = sys.argv[1:]
order = Order(uuid.UUID(account_id), "nothing", Recipe.model_validate_json(recipe), 600.0, use_cache=False)
for key in keys:
    if os.fork() == 0:
        lifecycle.submit(make_sessions(get_settings()), order, key)
        os._exit(0)
sys.exit(sum(os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL for _ in keys))
"""


def jobs(ground: Ground) -> set[UUID]:
    with transaction(ground.sessions) as session:
        return set(session.scalars(select(Job.id)))
