"""What a number of samples can show is said before a job, and how many would settle a verdict after it."""

from __future__ import annotations

import pytest

from shared.evidence import evidence_note, groups_needed, samples_to_show, smallest_showable_drop, unseen_share
from shared.recipe import Task

DIGITS = Task(kind="classification", classes=["zero", "one"])
TISSUES = Task(kind="segmentation", classes=["air", "tissue"], background=0)
RAW = Task(kind="raw")


def test_a_point_of_top1_takes_about_three_hundred_images() -> None:
    assert samples_to_show(DIGITS, 0.01) == 299
    assert smallest_showable_drop(DIGITS, 299) == pytest.approx(0.01, abs=5e-5)
    assert smallest_showable_drop(DIGITS, 150) == pytest.approx(0.0198, abs=1e-4)


def test_a_point_of_dice_takes_about_sixty_cases() -> None:
    needed = samples_to_show(TISSUES, 0.01)
    assert needed is not None
    assert 50 < needed < 70
    few, many = (smallest_showable_drop(TISSUES, count) for count in (15, 1000))
    assert few is not None
    assert many is not None
    assert few > 0.03
    assert many < 0.002


def test_more_samples_never_show_less() -> None:
    for task in (DIGITS, TISSUES):
        drops = [smallest_showable_drop(task, count) or 0 for count in range(1, 400)]
        assert drops == sorted(drops, reverse=True)


def test_a_raw_task_and_an_empty_part_show_nothing() -> None:
    assert smallest_showable_drop(RAW, 100) is None
    assert smallest_showable_drop(DIGITS, 0) is None
    assert evidence_note(RAW, 100) is None
    assert samples_to_show(DIGITS, 0) is None


def test_the_note_says_what_can_be_shown_and_what_it_would_take() -> None:
    assert evidence_note(DIGITS, 1000, 0.01) == (
        "1000 evaluation samples can show that at most 0.3 points of top1 are lost, if no decision changes."
    )
    note = evidence_note(TISSUES, 15, 0.01)
    assert note is not None
    assert "if losses spread by 2 points a sample" in note
    assert "to show a max_drop of 1 points it takes about" in note
    assert "no number of samples can" in (evidence_note(DIGITS, 15, 0) or "")


def test_what_a_spread_hides_takes_the_square_of_the_samples() -> None:
    assert groups_needed(0.0, 0.02, 0.01, 200, "dice") == 800
    assert groups_needed(0.0, 2.0, 1.0, 50, "hd95") == 200
    assert groups_needed(0.82, 0.78, 0.8, 100, "dice") == 400


def test_what_was_only_not_seen_takes_as_many_times_the_samples() -> None:
    assert groups_needed(0.0, unseen_share(150), 0.01, 150, "top1") == 299
    needed = groups_needed(0.0, 0.2 * unseen_share(30), 0.01, 30, "dice")
    assert 55 < needed < 62


def test_differing_decisions_take_more_samples() -> None:
    assert 1000 < groups_needed(0.0, 0.0234, 0.01, 300, "top1") < 2500


def test_a_value_on_the_goal_is_never_settled() -> None:
    assert groups_needed(0.01, 0.02, 0.01, 100, "dice") == 1_000_000
