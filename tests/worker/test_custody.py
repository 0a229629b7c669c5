"""What custody makes of a stored job that it does not understand."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from shared.db import transaction
from tests.faults.ground import Ground

WRITTEN = {
    "a stage that there is no more": (
        """UPDATE jobs SET recipe = jsonb_set(recipe, '{stages,0,kind}', '"fold"')""",
        "The job's recipe was written by another version of Burnish: stages.0: ",
    ),
    "a word that there is no more": (
        "UPDATE jobs SET recipe = jsonb_set(recipe, '{shuffle}', 'true')",
        "The job's recipe was written by another version of Burnish: shuffle: ",
    ),
    "a baseline that was measured otherwise": (
        """UPDATE jobs SET baseline = '{"source": {}}'""",
        "The job's baseline was written by another version of Burnish: source.",
    ),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_a_job_that_another_version_wrote_fails_and_says_so(ground: Ground, written: str) -> None:
    change, told = WRITTEN[written]
    job_id = ground.submit()
    ground.execute(change.replace(":", "\\:"))
    assert ground.work() == "failed"
    reason = ground.reason(job_id)
    assert (reason["code"], reason["fault"]) == ("written_by_another_version", "platform")
    assert reason["message"].startswith(told)
    assert reason["hint"] == "Submit the job again, with a recipe of this version."
    forget(ground)


def test_a_stage_that_another_version_wrote_is_told_too(ground: Ground, tmp_path: Any) -> None:
    job_id = ground.submit(f"once 1 {tmp_path / 'here'}")
    assert ground.work() == "queued"
    ground.execute("ALTER TABLE stage_runs DISABLE TRIGGER USER")  # an ended stage is never changed
    ground.execute("UPDATE stage_runs SET report = report - 'seconds' WHERE position = 0")
    ground.execute("ALTER TABLE stage_runs ENABLE TRIGGER USER")
    assert ground.work() == "failed"
    reason = ground.reason(job_id)
    assert reason["code"] == "written_by_another_version"
    assert reason["message"].startswith("The report of stage 0 was written by another version of Burnish: seconds: ")


def forget(ground: Ground) -> None:
    """The job, which no version reads."""
    with transaction(ground.sessions) as session:
        session.execute(text("DELETE FROM jobs"))
