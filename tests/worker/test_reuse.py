"""The stage cache on the real road: what an earlier job made is this one's at once, and never what it should not be."""

from __future__ import annotations

import dataclasses
from typing import Any
from uuid import UUID

import pytest

from shared import retention
from shared.accounts import ensure_account
from shared.models import Job
from shared.report import Report, StageReport
from tests.audit import audit
from tests.faults.ground import Ground
from tests.worker import strangers
from tests.worker.workshop import Workshop
from worker import reuse, wire
from worker.custody import Custody

KINDS = ("export_onnx", "quantize", "build_engine")


def run(ground: Ground, script: str = "", *, use_cache: bool = True, threads: int = 1, **changes: Any) -> UUID:
    """A job run to its success."""
    recipe = ground.recipe(KINDS)
    job_id = ground.submit(script, recipe=recipe.model_copy(update=changes), use_cache=use_cache)
    assert ground.work(dataclasses.replace(ground.tools(), threads=threads)) == "succeeded", ground.reason(job_id)
    return job_id


def statuses(ground: Ground, job_id: UUID) -> list[str]:
    return [stage.status for stage in ground.stages(job_id)]


def origins(ground: Ground, job_id: UUID) -> list[str | None]:
    """Of which job each stage of a job is told to be."""
    told = Report.model_validate(ground.job(job_id).report).stages
    return [stage.details.get("cached_from", {}).get("job") for stage in told]


def key_of(ground: Ground, job_id: UUID, name: str) -> str:
    [key] = [key for key in ground.storage.list_keys() if str(job_id) in key and key.endswith(name)]
    return key


# ---------------------------------------------------------------- what is taken, and what is not


def test_what_was_made_once_is_taken_also_from_who_took_it_himself(ground: Ground) -> None:
    first = run(ground, use_cache=False)  # who takes nothing from the cache still leaves it something
    second = run(ground)
    ground.execute("DELETE FROM jobs WHERE id = :id", id=first)
    for key in list(retention.unknown(ground.sessions, list(ground.storage.list_keys()))):
        ground.storage.remove(key)
    third = run(ground)

    assert statuses(ground, second) == ["cached"] * 3
    assert statuses(ground, third) == ["cached"] * 3
    assert ground.result(third) == ground.result(second)
    assert origins(ground, third) == origins(ground, second)


def test_without_the_cache_all_is_computed(ground: Ground) -> None:
    first = run(ground)
    again = run(ground, use_cache=False)
    assert statuses(ground, again) == ["succeeded"] * 3
    assert ground.result(again) == ground.result(first)


def test_another_account_computes_for_itself(ground: Ground) -> None:
    run(ground)
    ground.execute("UPDATE artifacts SET name = name || '.hospital', key = key || '.hospital' WHERE role = 'upload'")
    for key in ("uploads/source.onnx", "uploads/data.zip"):
        ground.storage.copy(key, f"{key}.hospital")
    ground.account_id = ensure_account(ground.sessions, "another")
    ground.source, ground.data = ground.keep("source.onnx", b"a source model"), ground.keep("data.zip", b"a data set")
    assert statuses(ground, run(ground)) == ["succeeded"] * 3
    assert statuses(ground, run(ground)) == ["cached"] * 3


def test_what_changed_is_computed_from_there_on(ground: Ground) -> None:
    first = run(ground)
    stages = ground.recipe(KINDS).stages
    assert statuses(ground, run(ground, seed=1)) == ["succeeded"] * 3
    assert statuses(ground, run(ground, threads=2)) == ["succeeded"] * 3
    changed = run(ground, stages=[*stages[:1], stages[1].model_copy(update={"calibration_samples": 9}), stages[2]])
    assert statuses(ground, changed) == ["cached", "succeeded", "succeeded"]
    assert origins(ground, changed) == [str(first), None, None]
    ground.data = ground.keep("more.zip", b"more data")
    assert statuses(ground, run(ground)) == ["succeeded"] * 3


@pytest.mark.parametrize("damage", ["corrupted", "gone"])
def test_what_is_damaged_is_noticed_and_computed_again_from_there_on(ground: Ground, damage: str) -> None:
    first = run(ground)
    key = key_of(ground, first, "1-quantize.onnx")
    content = b"".join(ground.storage.chunks(key))
    if damage == "gone":
        ground.storage.remove(key)
    else:
        ground.storage.put_bytes(content[:-1] + bytes([content[-1] ^ 1]), key)

    again = run(ground)
    assert statuses(ground, again) == ["cached", "succeeded", "succeeded"]
    assert ground.result(again) == ground.result(first)
    later = run(ground)
    assert (statuses(ground, later), origins(ground, later)[1:]) == (["cached"] * 3, [str(again)] * 2)
    ground.storage.put_bytes(content, key)


def test_a_dropped_stage_is_dropped_again_without_being_made_again(ground: Ground) -> None:
    first = run(ground, "drop 1")
    again = run(ground)
    assert statuses(ground, first) == ["succeeded", "dropped", "succeeded"]
    assert statuses(ground, again) == ["cached", "dropped", "cached"]
    assert origins(ground, again) == [str(first)] * 3


def test_an_attempt_that_died_among_cached_stages_goes_on_among_them(ground: Ground) -> None:
    first = run(ground)
    job_id = ground.submit(recipe=ground.recipe(KINDS), use_cache=True)
    dying = ground.start_worker("stage.committed=kill@2")
    dying.wait(timeout=60)
    ground.execute("UPDATE jobs SET lease_expires_at = now() WHERE status = 'running'")
    ground.sweep()
    assert ground.work() == "succeeded"
    assert (statuses(ground, job_id), ground.job(job_id).attempt) == (["cached"] * 3, 2)
    assert ground.result(job_id) == ground.result(first)


# ---------------------------------------------------------------- what a child may say


def test_a_child_that_calls_something_else_cached_is_caught(ground: Ground) -> None:
    run(ground)
    ground.submit(recipe=ground.recipe(KINDS), use_cache=True)
    claim, directory = ground.claim(), ground.directory / "child"
    directory.mkdir()
    custody = Custody(claim, ground.storage, ground.sessions, directory)
    ticket = custody.fetch(1, lambda: False)
    assert ticket.cached is not None
    stage = ticket.cached.stages[1]
    [note] = stage.report.artifacts
    file = wire.File(role=note.role, name=note.name, format=note.format, path=stage.files[note.role])
    [kept] = custody.store(wire.StageFinished(report=stage.report, files=[file]))

    def is_honest(report: StageReport = stage.report, stored: Any = (kept,), **details: Any) -> bool:
        told = report.model_copy(update={"details": {**report.details, **details}})
        assert custody.reuse is not None
        return custody.reuse.is_honest(told, stored)

    origin = stage.report.details["cached_from"]
    assert is_honest()
    assert is_honest(cached_from={**origin, "measured_again": True})
    assert not is_honest(cached_from={**origin, "job": str(UUID(int=1))})
    assert not is_honest(stage.report.model_copy(update={"position": 0}))
    assert not is_honest(stage.report.model_copy(update={"position": 9}))
    assert not is_honest(stage.report.model_copy(update={"status": "succeeded"}))
    assert not is_honest(stage.report.model_copy(update={"details": {}}))
    assert not is_honest(stored=(dataclasses.replace(kept, sha256="0" * 64),))
    assert not is_honest(stored=())
    assert not is_honest(cached_from=3)
    ground.execute("UPDATE jobs SET lease_expires_at = now(), max_attempts = 1 WHERE status = 'running'")
    ground.sweep()


def test_what_makes_a_stage_is_told_by_the_number_of_threads_too() -> None:
    assert reuse.made_by(1) != reuse.made_by(2)
    assert reuse.made_by(1) == reuse.made_by(1)


# ---------------------------------------------------------------- real models, and their figures

REAL: list[dict[str, Any]] = [
    {"kind": "quantize", "scheme": "fp16"},
    {"kind": "build_engine", "targets": ["onnxruntime"]},
]
# Memory is held against the baseline's, which no two measurements find the same.
GOALS = [{"metric": "memory", "kind": "max_ratio", "value": 9.0}, {"metric": "dice", "kind": "max_drop", "value": 0.5}]


def _elsewhere(workshop: Workshop, job_id: UUID) -> None:
    """Have a job's baseline be of another machine of the same kind, behind the ledger's back."""
    baseline = dict(workshop.job(job_id).baseline or {})
    baseline["environment"] = {**baseline["environment"], "machine": "another"}
    with workshop.sessions() as session:
        session.connection().exec_driver_sql("SET LOCAL session_replication_role = replica")  # for this transaction
        session.get_one(Job, job_id).baseline = baseline
        session.commit()


def _network(workshop: Workshop) -> UUID:
    """A small network for the workshop's slices, uploaded."""
    ends = [strangers.floats(name, "batch", channels, 32, 32) for name, channels in (("image", 1), ("logits", 3))]
    nodes, path = strangers.convolutions("image", "logits"), workshop.directory / "net.onnx"
    return workshop.keep(strangers.network(path, nodes, ends[:1], ends[1:], strangers.filters()), "onnx")


def test_figures_are_taken_where_they_hold_and_taken_anew_on_another_machine(workshop: Workshop) -> None:
    source = _network(workshop)

    def whole(**changes: Any) -> tuple[UUID, Report]:
        job_id = workshop.submit(source={"onnx": str(source)}, stages=REAL, goals=GOALS, **changes)
        assert workshop.work() == "succeeded", workshop.job(job_id).state_reason
        report = Report.model_validate(workshop.job(job_id).report)
        assert [stage.status for stage in report.stages] == [stage.status for stage in workshop.stages(job_id)]
        return job_id, report

    first, before = whole()
    again, same = whole(use_cache=True)
    assert [stage.status for stage in before.stages] == ["succeeded"] * 2
    assert [stage.status for stage in same.stages] == ["cached"] * 2
    told = (before.baseline, before.goals, before.final, before.verdict, before.reason)
    assert (same.baseline, same.goals, same.final, same.verdict, same.reason) == told
    for stage, original in zip(same.stages, before.stages, strict=True):
        assert (stage.measurement, stage.agreement, stage.targets) == (
            *(original.measurement, original.agreement, original.targets),
        )
        assert stage.artifacts == original.artifacts
        finished_at = str(stage.details["cached_from"].pop("finished_at"))
        assert finished_at < workshop.job(again).created_at.isoformat()
        assert stage.details["cached_from"] == {
            **{"job": str(first), "attempt": 1, "seconds": original.seconds, "measured_again": False},
        }

    for job_id in (first, again):
        _elsewhere(workshop, job_id)
    _third, here = whole(use_cache=True)
    assert [stage.status for stage in here.stages] == ["cached"] * 2
    assert here.baseline != before.baseline
    for stage, original in zip(here.stages, before.stages, strict=True):
        assert stage.measurement != original.measurement
        assert stage.artifacts == original.artifacts
        assert stage.details["cached_from"]["measured_again"]
    assert audit(workshop.sessions, workshop.storage, quiet=True) == []


def test_a_loosened_goal_and_another_number_of_runs_are_answered_from_the_cache(workshop: Workshop) -> None:
    source = _network(workshop)
    tight, loose = (
        [{"metric": "size", "kind": "max_ratio", "value": 9.0}, {"metric": "dice", "kind": "max_drop", "value": value}]
        for value in (0.5, 0.9)
    )

    def report(**changes: Any) -> Report:
        job_id = workshop.submit(source={"onnx": str(source)}, stages=REAL, use_cache=True, **changes)
        assert workshop.work() == "succeeded", workshop.job(job_id).state_reason
        return Report.model_validate(workshop.job(job_id).report)

    before = report(goals=tight)
    after = report(goals=loose, benchmark={"runs": 30, "warm_up": 2, "batches": [1]})
    assert [stage.status for stage in before.stages] == ["succeeded"] * 2
    assert [stage.status for stage in after.stages] == ["cached"] * 2
    assert [result.goal.value for result in after.goals] == [9.0, 0.9]
    assert [stage.gate[0].goal.value for stage in after.stages[:1]] == [0.9]
    assert after.stages[1].measurement == before.stages[1].measurement  # taken with as many runs as it says
    elsewhere = report(goals=loose, benchmark={"runs": 30, "warm_up": 2, "batches": [2]})
    assert [stage.status for stage in elsewhere.stages] == ["succeeded"] * 2  # another batch is another speed
