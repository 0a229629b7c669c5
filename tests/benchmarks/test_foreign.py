"""How foreign networks are judged: nearness to the source, ratios of speeds, and the bars of the page."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.foreign.closeness import Decision, Goal, mean_dice, scores_of
from benchmarks.foreign.page import bars
from benchmarks.foreign.pictures import FACES, FONTS, PAGES, PARTS, PHOTOGRAPHS, WORDS
from benchmarks.foreign.rows import Measured, Row
from benchmarks.foreign.timing import Ratio, median_of, ratio


def _measured(name: str, ms: float, *, size: int = 100, meets_goal: bool = True, source_ms: float = 4.0) -> Measured:
    speedup = source_ms / ms
    return Measured(
        name=name,
        kind=name,
        size_bytes=size,
        latency_ms=ms,
        speedup=Ratio(value=speedup, low=0.99 * speedup, high=1.01 * speedup),
        scores={"rms_error": 0.01},
        meets_goal=meets_goal,
    )


def _row(delivered: Measured | None, against: float | None) -> Row:
    by_hand = [
        _measured("onnxruntime fp32", 4.0, size=400),
        _measured("openvino int8", 1.0, meets_goal=False),
        _measured("openvino bf16", 2.0, size=200),
    ]
    return Row(
        network="net",
        title="net",
        origin="somewhere",
        remark="",
        goal="rms_error ≤ 0.1",
        batch=1,
        num_unseen=8,
        source_scores={"rms_error": 0.0},
        engines=by_hand,
        failures={},
        delivered=delivered,
        against_rival=None if against is None else Ratio(value=against, low=against, high=against),
        refusal=None if delivered else "no",
        verdict="met" if delivered else None,
        reason=None,
    )


def _missed(row: Row) -> list[int]:
    return [position for position, figure in enumerate(bars([row], ["net"])) if not figure.kept]


def test_the_rival_is_the_fastest_by_hand_that_meets_the_goal() -> None:
    assert _row(None, None).rival.name == "openvino bf16"


def test_every_bar_is_kept_by_an_engine_that_is_right_small_and_faster() -> None:
    assert _missed(_row(_measured("delivered", 1.8, size=200), 1.11)) == []


def test_each_bar_is_missed_by_what_it_is_there_for() -> None:
    assert 0 in _missed(_row(None, None))
    assert _missed(_row(_measured("delivered", 1.8, size=200, meets_goal=False), 1.11)) == [1]
    assert _missed(_row(_measured("delivered", 2.2, size=200), 0.91)) == [2, 3]
    assert _missed(_row(_measured("delivered", 1.8, size=205), 1.11)) == [4]
    assert _missed(_row(_measured("delivered", 5.0, size=200), 0.4)) == [2, 3, 5]


def test_the_error_is_relative_to_the_spread_of_the_output() -> None:
    random = np.random.default_rng(0)
    source = [[random.normal(100, 2, (1, 50)).astype(np.float32)] for _ in range(4)]
    moved = [[outputs[0] + 1] for outputs in source]
    assert scores_of(moved, source, Decision(), None, None)["rms_error"] == pytest.approx(0.5, rel=0.15)


def test_decisions_are_compared_run_by_run_and_with_labels() -> None:
    source = [[np.array([[0.1, 0.9]], np.float32)], [np.array([[0.8, 0.2]], np.float32)]]
    flipped = [source[0], [np.array([[0.4, 0.6]], np.float32)]]
    scores = scores_of(flipped, source, Decision(axis=1), np.array([1, 0]), None)
    assert (scores["agreement"], scores["top1"]) == (0.5, 0.5)
    assert not Goal("agreement", "threshold", 0.99).is_met(scores, scores)
    assert not Goal("top1", "max_drop", 0.01).is_met(scores, {"top1": 1.0})


def test_empty_masks_count_in_the_dice_of_samples() -> None:
    truth = np.zeros((2, 3, 4), dtype=np.int64)
    truth[0, 0] = 1
    found = truth.copy()
    found[1, 0, 0] = 1  # invented
    assert mean_dice(truth, truth, Decision(axis=1), 0) == 1
    assert mean_dice(found, truth, Decision(axis=1), 0) == 0.5


def test_a_ratio_of_engines_timed_in_the_same_rounds_ignores_what_slows_both() -> None:
    slow_rounds = [1.0] * 10 + [3.0] * 9
    before, after = ([[base * slow] * 5 for slow in slow_rounds] for base in (2.0, 1.0))
    found = ratio(before, after)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    assert median_of(after) == 1.0


def test_no_picture_word_or_font_is_in_two_parts() -> None:
    for of_part in (PHOTOGRAPHS, {part: WORDS[part].split() for part in PARTS}):
        all_of_them = [one for part in PARTS for one in of_part[part]]
        assert len(set(all_of_them)) == len(all_of_them)
    assert len({*FONTS.values()}) == len({*PAGES.values()}) == len(PARTS)
    assert all(any(name in FACES for name in PHOTOGRAPHS[part]) for part in PARTS)
