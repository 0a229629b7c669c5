"""The search for layers that go back to float: few are found, none too many, and within its budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from worker.quantization.mixed_precision import Form, search
from worker.quantization.quality import CLOSE, GOOD, Quality
from worker.quantization.sensitivity import Budget, Layers, Sensitivity, in_blocks, rank

MANY = Budget(10_000)


def ranking(count: int) -> list[Sensitivity]:
    return [Sensitivity((f"layer {index}",), 1 / (1 + index)) for index in range(count)]


class Attempts:
    """Forms whose error is `spoilt` while a layer that they need is in int8, .05 without `finest`, and .01 with it."""

    def __init__(self, needed: set[str], finest: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.needed, self.finest = needed, finest
        self.tried: list[Layers] = []

    def __call__(self, layers: Layers, name: str) -> Form:
        self.tried.append(layers)
        error = 0.9 if self.needed - set(layers) else 0.05 if self.finest - set(layers) else 0.01
        return Form(name, Path(f"{len(self.tried)}.onnx"), layers, Quality((error,)))


def layers(*indices: int) -> set[str]:
    return {f"layer {index}" for index in indices}


@pytest.mark.parametrize("worst", [1, 2, 5, 11, 23])
def test_the_fewest_of_the_worst_layers_are_found_by_bisection(worst: int) -> None:
    attempt = Attempts(layers(*range(worst)))
    (found,) = search(ranking(24), [GOOD], attempt, 1, Budget(100))
    assert set(found.in_float) == layers(*range(worst))
    assert len(attempt.tried) <= 9 + 6  # bisecting, then trimming


def test_layers_that_the_level_can_do_without_go_back_to_int8() -> None:
    attempt = Attempts(layers(0, 3))
    (found,) = search(ranking(12), [GOOD], attempt, 1, Budget(100))
    assert set(found.in_float) == layers(0, 3)


def test_each_level_has_a_form_and_the_same_form_stands_once() -> None:
    good, close = search(ranking(12), [GOOD, CLOSE], Attempts(layers(0), layers(4)), 1, Budget(100))
    assert (good.name, close.name) == ("good", "close")
    assert set(good.in_float) == layers(0)
    assert layers(0, 4) <= set(close.in_float)
    assert len(search(ranking(12), [GOOD, CLOSE], Attempts(layers(0)), 1, Budget(100))) == 1


def test_nothing_is_tried_twice() -> None:
    attempt = Attempts(layers(0, 2), layers(4))
    search(ranking(12), [GOOD, CLOSE], attempt, 1, Budget(100))
    assert len(set(map(frozenset, attempt.tried))) == len(attempt.tried)


def test_one_block_at_least_stays_in_int8() -> None:
    attempt = Attempts(layers(*range(6)))
    assert search(ranking(6), [GOOD], attempt, 1, Budget(100)) == []
    assert max(map(len, attempt.tried)) == 5
    assert search(ranking(1), [GOOD], Attempts(layers(0)), 1, Budget(100)) == []


def test_the_search_ends_when_its_budget_is_spent() -> None:
    attempt = Attempts(layers(*range(20)))
    assert search(ranking(24), [GOOD], attempt, 30, Budget(100)) == []
    assert len(attempt.tried) == 3


# ---------------------------------------------------------------- the ranking


def errors_of(values: dict[str, float], seen: list[tuple[Layers, int]]) -> Callable[[Layers, int], float]:
    def error_of(block: Layers, num_samples: int) -> float:
        seen.append((block, num_samples))
        return max(values[name] for name in block)

    return error_of


def test_blocks_are_ranked_by_the_error_that_each_makes_alone() -> None:
    values = {"low": 0.01, "high": 1.0, "middle": 0.1, "also low": 0.01}
    seen: list[tuple[Layers, int]] = []
    progress: list[float] = []
    budget = Budget(1000)
    found = rank([(name,) for name in values], errors_of(values, seen), 16, budget, progress.append)
    assert [one.layers for one in found] == [("high",), ("middle",), ("also low",), ("low",)]
    assert progress == [0, 0.25, 0.5, 0.75]
    assert budget.passes == 1000 - 4 * 8


def test_many_layers_are_ranked_in_blocks_within_half_of_the_budget() -> None:
    values = {f"layer {index}": index / 100 for index in range(100)}
    seen: list[tuple[Layers, int]] = []
    budget = Budget(320)
    found = rank([(name,) for name in values], errors_of(values, seen), 16, budget, lambda share: None)
    assert len(found) == 20
    assert budget.passes >= 160
    assert sorted(name for one in found for name in one.layers) == sorted(values)
    assert found[0].layers[-1] == "layer 99"


def test_neighbours_are_joined_in_order() -> None:
    assert in_blocks([("a",), ("b",), ("c",), ("d",), ("e",)], 2) == [("a", "b"), ("c", "d", "e")]
    assert in_blocks([("a",), ("b",)], 5) == [("a",), ("b",)]
    assert in_blocks([], 5) == []


def test_the_budget_is_a_share_of_calibration_with_a_limit() -> None:
    assert Budget.of(128).passes == 2 * Budget.of(64).passes
    assert Budget.of(100_000).passes == Budget.MOST
    assert MANY.has(10_000)
    assert not MANY.has(10_001)
