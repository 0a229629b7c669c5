"""The stage cache's keys and its look-up: the same makes the same, and nothing of it is another account's."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from shared import cache, lifecycle
from shared.db import Sessions
from shared.ledger import Capacity, Claim, Order, Reason
from shared.recipe import Recipe
from tests.shared.ledger_desk import account, claim, due, execute, job, order, submit

SOURCE, DATA, MAKER = "5" * 64, "d" * 64, "m" * 64
TORCH: dict[str, Any] = {
    "source": {
        "architecture": {"library": "monai", "name": "BasicUNet"},
        "weights": "01990000-0000-7000-8000-000000000001",
    },
    "task": {"kind": "segmentation", "classes": ["other", "lesion"], "background": 0},
    "data": {"artifact": "01990000-0000-7000-8000-000000000002"},
    "stages": [{"kind": "prune"}, {"kind": "export_onnx"}, {"kind": "quantize"}, {"kind": "build_engine"}],
}
BASELINE: dict[str, Any] = {
    "source": {
        "parameters": 1,
        "macs": 1,
        "size_bytes": 1,
        "latency_ms": {"p50": 1.0, "p90": 1.0},
        "throughput_per_second": {"1": 1.0},
        "peak_memory_bytes": 1,
        "metrics": {},
        "method": {
            "engine": "none",
            "precision": "fp32",
            "device": "cpu",
            "threads": 1,
            "batch": 1,
            "warm_up": 1,
            "runs": 1,
            "samples": 1,
            "versions": {},
        },
    },
    "onnxruntime": None,
    "environment": {
        "machine": "m",
        "cpu": "c",
        "cores": 1,
        "memory_bytes": 1,
        "gpu": None,
        "python": "3",
        "packages": {},
    },
}


def taken(sessions: Sessions, account_id: UUID | None = None, **changes: Any) -> Claim:
    """A job on this recipe, claimed."""
    recipe = Recipe.model_validate({**TORCH, **changes})
    submit(sessions, account_id, recipe=recipe)
    return claim(sessions, capacity_for(recipe))


def capacity_for(recipe: Recipe) -> Capacity:
    return Capacity("worker-1", ["default"], recipe.requirements(), 2**40)


def keys(of: Claim, made_by: str = MAKER, source: str = SOURCE, data: str = DATA, **finished: Any) -> list[str]:
    known = {int(name.removeprefix("at")): key for name, key in finished.items()}
    return list(cache.keys(of, source, data, made_by, known).values())


def work(sessions: Sessions, of: Claim, upto: int = 4, baseline: dict[str, Any] = BASELINE) -> list[str]:
    """Finish a job's first stages; returns the keys of all."""
    found = keys(of)
    lifecycle.record_baseline(sessions, of.lease, baseline)
    for position in range(upto):
        lifecycle.start_stage(sessions, of.lease, position)
        lifecycle.finish_stage(sessions, of.lease, position, "succeeded", {"reason": None}, [], found[position])
    return found


# ---------------------------------------------------------------- keys


def test_the_same_job_of_the_same_account_has_the_same_keys(sessions: Sessions) -> None:
    first = keys(taken(sessions))
    assert keys(taken(sessions)) == first
    assert len(set(first)) == 4


OTHER = {
    "another seed": {"seed": 1},
    "another task": {"task": {"kind": "segmentation", "classes": ["a", "b"], "background": 0}},
    "other preprocessing": {"data": {**TORCH["data"], "preprocessing": {"scale": 0.5}}},
    "other threads": {"benchmark": {"threads": 2}},
    "other batches": {"benchmark": {"batches": [4]}},
    "another architecture": {
        "source": {**TORCH["source"], "architecture": {"library": "monai", "name": "UNet"}}
    },
    "another first stage": {"stages": [{"kind": "prune", "pruning_ratio": 0.25}, *TORCH["stages"][1:]]},
}


@pytest.mark.parametrize("change", OTHER)
def test_what_decides_every_stage_changes_every_key(sessions: Sessions, change: str) -> None:
    before, after = keys(taken(sessions)), keys(taken(sessions, **OTHER[change]))
    assert not set(before) & set(after)


SAME = {
    "another goal": {"goals": [{"metric": "latency", "kind": "min_speedup", "value": 2.0}]},
    "a loosened goal": {"goals": [{"metric": "dice", "kind": "max_drop", "value": 0.1}]},
    "what the source should reach": {"expect": {"dice": 0.9}},
    "more runs": {"benchmark": {"runs": 11, "warm_up": 9}},
    "what follows a missed goal": {"stages": [{**stage, "on_miss": "continue"} for stage in TORCH["stages"]]},
    "another tolerance": {
        "stages": [TORCH["stages"][0], {"kind": "export_onnx", "tolerance": 0.05}, *TORCH["stages"][2:]]
    },
}


@pytest.mark.parametrize("change", SAME)
def test_what_only_judges_or_measures_changes_no_key(sessions: Sessions, change: str) -> None:
    assert keys(taken(sessions)) == keys(taken(sessions, **SAME[change]))


def test_other_bytes_other_makers_and_other_accounts_change_every_key(sessions: Sessions) -> None:
    one = taken(sessions)
    before = set(keys(one))
    assert not before & set(keys(one, source="6" * 64))
    assert not before & set(keys(one, data="e" * 64))
    assert not before & set(keys(one, made_by="n" * 64))
    assert not before & set(keys(taken(sessions, account(sessions, "another"))))


def test_the_same_bytes_under_another_id_are_the_same(sessions: Sessions) -> None:
    again = {"artifact": "01990000-0000-7000-8000-00000000000f"}
    assert keys(taken(sessions)) == keys(taken(sessions, data=again))


@pytest.mark.parametrize(
    ("position", "change", "num_same"),
    [
        (1, {"kind": "export_onnx", "opset": 20}, 1),
        (2, {"kind": "quantize", "calibration_samples": 7}, 2),
        # what is built later decides for which runtimes is quantized
        (3, {"kind": "build_engine", "targets": ["openvino"]}, 2),
    ],
)
def test_a_changed_stage_changes_the_keys_from_there_on(
    sessions: Sessions, position: int, change: dict[str, Any], num_same: int
) -> None:
    stages: list[dict[str, Any]] = list(TORCH["stages"])
    stages[position] = change
    pairs = zip(keys(taken(sessions)), keys(taken(sessions, stages=stages)), strict=True)
    assert [before == after for before, after in pairs] == [True] * num_same + [False] * (4 - num_same)


def test_what_follows_another_makers_stage_is_not_what_this_maker_would_have_made(sessions: Sessions) -> None:
    one = taken(sessions)
    own = keys(one)
    [other, *_] = keys(one, made_by="n" * 64)
    mixed = keys(one, at0=other)
    assert mixed[0] == other
    assert not set(own) & set(mixed)
    assert keys(one, at0=own[0]) == own


def test_behind_a_finished_stage_without_a_key_nothing_has_one(sessions: Sessions) -> None:
    assert keys(taken(sessions), at0=None) == []


# ---------------------------------------------------------------- what is found


def test_the_furthest_finished_of_the_accounts_jobs_is_found(sessions: Sessions) -> None:
    whole, partly = taken(sessions), taken(sessions)
    sought = work(sessions, whole)
    work(sessions, partly, upto=2)
    found = cache.find(sessions, taken(sessions), sought)
    assert found is not None
    assert (found.job_id, found.last) == (whole.lease.job_id, 3)
    assert found.baseline is not None
    short = cache.find(sessions, taken(sessions), sought[:2])
    assert short is not None
    assert (short.job_id, short.last) == (partly.lease.job_id, 1)  # the newest of those that have as much


def test_a_job_that_failed_later_gives_what_it_finished(sessions: Sessions) -> None:
    one = taken(sessions)
    sought = work(sessions, one, upto=2)
    lifecycle.settle(sessions, one.lease, "failed", Reason("bug", "No."))
    found = cache.find(sessions, taken(sessions), sought)
    assert found is not None
    assert found.last == 1


def test_another_accounts_stages_are_never_found_even_by_their_keys(sessions: Sessions) -> None:
    sought = work(sessions, taken(sessions))
    assert cache.find(sessions, taken(sessions, account(sessions, "another")), sought) is None


def test_a_jobs_own_stages_and_unfinished_ones_are_not_found(sessions: Sessions) -> None:
    one = taken(sessions)
    sought = work(sessions, one, upto=2)
    assert cache.find(sessions, one, sought) is None
    assert cache.find(sessions, taken(sessions), sought[2:]) is None


def test_figures_of_before_the_baseline_was_measured_anew_are_not_found(sessions: Sessions) -> None:
    one = taken(sessions)
    sought = work(sessions, one, upto=1)
    lifecycle.requeue(sessions, one.lease, Reason("worker_lost", "Gone."), cause="lost")
    due(sessions, one.lease.job_id)
    again = claim(sessions, capacity_for(Recipe.model_validate(TORCH)))
    assert again.lease.job_id == one.lease.job_id
    lifecycle.record_baseline(sessions, again.lease, BASELINE)
    assert cache.find(sessions, taken(sessions), sought) is None


def test_a_baseline_that_was_exported_by_other_words_is_not_handed_on(sessions: Sessions) -> None:
    stages = [TORCH["stages"][0], {"kind": "export_onnx", "opset": 20}]
    sought = work(sessions, taken(sessions))
    found = cache.find(sessions, taken(sessions, stages=stages), sought[:1])
    assert found is not None
    assert found.baseline is None


def test_an_order_that_does_without_the_cache_says_so_to_its_worker_and_to_its_retry(sessions: Sessions) -> None:
    without = order(account(sessions), use_cache=False)
    assert without.digest() != order(account(sessions)).digest()
    lifecycle.submit(sessions, without)
    held = claim(sessions)
    assert not held.use_cache
    assert not Order.again(job(sessions, held.lease.job_id)).use_cache
    assert taken(sessions).use_cache


def test_a_forgotten_job_leaves_nothing_to_find(sessions: Sessions) -> None:
    one = taken(sessions)
    sought = work(sessions, one)
    execute(sessions, "DELETE FROM jobs WHERE id = :id", id=one.lease.job_id)
    assert cache.find(sessions, taken(sessions), sought) is None
