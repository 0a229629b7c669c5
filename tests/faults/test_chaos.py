"""A minute of chaos, which its seed repeats."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.faults import chaos, chaos_plan
from tests.faults.chaos_outcome import Outcome
from tests.faults.chaos_plan import plan

SEED = 55


def test_a_seed_says_what_is_killed_when_and_in_which_order() -> None:
    planned = plan(SEED, seconds=600, num_jobs=500)
    assert planned == plan(SEED, seconds=600, num_jobs=500)
    assert planned.kills != plan(SEED + 1, seconds=600, num_jobs=500).kills
    assert planned.kills == plan(SEED, seconds=600, num_jobs=7).kills, "what is killed does not hang on the jobs"
    assert {kill.what for kill in planned.kills} == set(chaos_plan.KILLS_A_MINUTE)
    assert planned.calm_seconds <= planned.kills[0].at_seconds <= planned.kills[-1].at_seconds <= 600
    assert len({errand.idempotency_key for errand in planned.errands}) == 500


def test_a_broken_law_is_told_with_the_seed_that_broke_it() -> None:
    outcome = Outcome(plan(SEED, seconds=60, num_jobs=1), datetime.now(UTC), broken=["a job was lost"])
    page = outcome.page()
    assert f"seed {SEED}" in page
    assert "- a job was lost" in page
    assert "every law held" not in page


@pytest.mark.fault(55, "seeded chaos: kills of everything under load")
def test_whatever_is_killed_no_job_is_lost_doubled_or_wrong(tmp_path: Path) -> None:
    outcome = chaos.run(plan(SEED, seconds=60, num_jobs=50), tmp_path)
    assert outcome.broken == [], outcome.page()
    assert outcome.statuses.total() == 50
    assert set(outcome.killed) == set(chaos_plan.KILLS_A_MINUTE)
