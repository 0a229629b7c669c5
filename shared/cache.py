"""The stage cache: what an account's earlier jobs made where a stage would make the same again.

A stage's key is the digest of all that its files depend on. It begins with the account, the source model's bytes, the
data's, and the recipe's words beside its stages (task, preprocessing, seed, and the batch and threads that speed is
measured with), and grows by one stage after the other: the stage's own words, and what makes it, which is the code, its
libraries and the kind of machine. A stage that looks ahead also has the stages after it in its key. So equal keys mean
that everything before was equal too, and a job is taken from as far as its keys go on to be equal.

Goals, tolerances, on_miss and the number of timed runs decide what is said of a file and not what is in it: the child
judges a cached stage anew, and makes it again where another choice would have been made (worker/rejudging.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import text

from shared.db import Sessions, reads
from shared.ledger import Claim
from shared.models import STAGE_DONE
from shared.recipe import Recipe
from shared.report import Baseline

NOT_IN_FILES: dict[str, Any] = {
    "source": {"weights", "onnx"},  # their bytes' digests count
    "data": {"artifact"},
    "stages": True,  # each has its own place in the chain
    "goals": True,
    "expect": True,
    "benchmark": {"runs", "warm_up"},
}
JUDGING = {"on_miss", "tolerance"}  # of a stage's words


@dataclass(frozen=True)
class Found:
    """A job that has what is sought up to a stage's position, and its baseline if that is the seeker's too."""

    job_id: UUID
    last: int
    baseline: Baseline | None


def keys(
    claim: Claim, source_sha256: str, data_sha256: str, made_by: str, finished: Mapping[int, str | None]
) -> dict[int, str]:
    """The key of each stage of a job, by position; of `finished` ones as they were kept.

    `made_by` is the digest of what will make the others. None is known behind a finished stage that has none.
    """
    recipe = Recipe.model_validate(claim.recipe)
    words = recipe.model_dump(mode="json", exclude=NOT_IN_FILES)
    stages = [stage.model_dump(mode="json", exclude=JUDGING) for stage in recipe.stages]
    key: str | None = _digest(str(claim.account_id), source_sha256, data_sha256, words)
    known = dict[int, str]()
    for position, stage in enumerate(recipe.stages):
        ahead = stages[position + 1 :] if stage.looks_ahead else []
        key = finished[position] if position in finished else _digest(key, made_by, stages[position], ahead)
        if key is None:
            break
        known[position] = key
    return known


# The newest of the jobs that have most. Figures belong to the baseline that was measured with them: a job whose
# baseline was measured anew after a stage, on another machine, is passed over.
FIND = text(f"""
    WITH same AS (
        SELECT s.job_id, s.position, s.finished_at FROM stage_runs s JOIN jobs j ON j.id = s.job_id
        WHERE s.cache_key = ANY(:keys) AND s.status IN {STAGE_DONE} AND s.report IS NOT NULL
          AND j.account_id = :account_id AND j.id <> :job_id AND j.baseline IS NOT NULL
        ORDER BY s.position DESC, s.finished_at DESC LIMIT 20
    )
    SELECT same.job_id, same.position, j.baseline, j.recipe FROM same JOIN jobs j ON j.id = same.job_id
    WHERE NOT EXISTS (
        SELECT FROM stage_runs earlier JOIN job_events measured USING (job_id)
        WHERE earlier.job_id = same.job_id AND earlier.position <= same.position
          AND measured.kind = 'baseline_measured' AND earlier.attempt < measured.attempt
    )
    ORDER BY same.position DESC, same.finished_at DESC LIMIT 1
""")


def find(sessions: Sessions, claim: Claim, sought: Collection[str]) -> Found | None:
    """The account's job that has finished the furthest of the stages with these keys, if one has."""
    asked = {"keys": list(sought), "account_id": claim.account_id, "job_id": claim.lease.job_id}
    with reads(sessions) as connection:
        row = connection.execute(FIND, asked).one_or_none()
    if row is None:
        return None
    same_baseline = _baseline_export(row.recipe) == _baseline_export(claim.recipe)
    return Found(row.job_id, row.position, Baseline.model_validate(row.baseline) if same_baseline else None)


def _baseline_export(recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The stage by whose words a job's baseline was exported to be measured as ONNX."""
    return next((stage for stage in recipe["stages"] if stage["kind"] == "export_onnx"), None)


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
