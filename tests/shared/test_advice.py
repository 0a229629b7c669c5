"""Advice on a valid recipe: what an evaluation part can show, what is assumed, and what is likely a slip."""

from __future__ import annotations

from typing import Any

import pytest

from shared.advice import notes
from shared.evidence import samples_to_show, smallest_showable_drop
from shared.recipe import Goal, Recipe, Task
from tests.shared.reports import RECIPE

DIGITS = Task(kind="classification", classes=["zero", "one"])
LARGE = 100_000


def arrays(samples: int, *more: str) -> dict[str, Any]:
    names = ("evaluation.images", "evaluation.masks", "calibration.images", *more)
    return {"tensors": {name: {"dtype": "F32", "shape": [samples, 1, 8, 8]} for name in names}}


def said(
    samples: int = LARGE, *more: str, goals: list[Goal] | None = None, summary: Any = None, **changes: Any
) -> dict[str, str]:
    """The last note on each place, of a job with labelled calibration data unless `summary` says other."""
    recipe = RECIPE.model_copy(update={"goals": goals or [], **changes})
    summary = summary or arrays(samples, "calibration.masks", "calibration.labels", *more)
    format = "zip" if "parts" in summary else "safetensors"
    return {note.location: note.message for note in notes(recipe, summary, format)}


def drop(value: float, metric: str = "dice") -> list[Goal]:
    return [Goal(metric=metric, kind="max_drop", value=value)]


def test_a_recipe_with_goals_that_its_data_can_show_has_no_notes() -> None:
    assert said(goals=drop(0.01)) == {}
    assert said(goals=drop(0.01, "top1"), task=DIGITS) == {}


def test_assumed_goals_are_told() -> None:
    assert said()["recipe.goals"] == "No goal is named, so this one is assumed: max_drop of dice, at most 1 point."
    raw = said(task=Task(kind="raw"))["recipe.goals"]
    assert "engines are kept whose outputs are close to the source model's" in raw


@pytest.mark.parametrize(("task", "metric"), [(RECIPE.task, "dice"), (DIGITS, "top1")])
def test_a_loss_that_the_samples_cannot_show_is_told_with_how_many_could(task: Task, metric: str) -> None:
    goals = drop(0.01, metric)
    needed = samples_to_show(task, 0.01)
    assert needed is not None
    told = said(needed - 1, goals=goals, task=task)["recipe.goals.0"]
    assert told.startswith(f"{needed - 1} evaluation samples can show that at most 1 points of {metric} are lost, if ")
    assert told.endswith(
        f"to show a max_drop of 1 points it takes about {needed} samples. Expect the verdict not_shown."
    )
    assert said(needed, goals=goals, task=task) == {}


def test_what_can_be_shown_is_in_the_note_with_what_it_assumes() -> None:
    smallest = smallest_showable_drop(DIGITS, 60)
    assert smallest is not None
    told = said(60, goals=drop(0.01, "top1"), task=DIGITS)["recipe.goals.0"]
    assert f"at most {100 * smallest:.2g} points of top1 are lost, if no decision changes;" in told
    told = said(60, goals=drop(0.001))["recipe.goals.0"]
    assert "if losses spread by 2 points a sample, as is common;" in told


def test_an_assumed_goal_that_cannot_be_shown_is_told_too() -> None:
    assert "Expect the verdict not_shown." in said(25)["recipe.goals"]


def test_no_loss_at_all_is_said_to_be_beyond_any_number() -> None:
    assert "no number of samples shows that nothing at all is lost" in said(goals=drop(0))["recipe.goals.0"]


def test_a_drop_that_looks_like_a_percentage_is_questioned() -> None:
    assert said(goals=drop(0.2)) == {}
    assert said(goals=drop(0.5))["recipe.goals.0"].endswith("Goals are shares: 1 point is 0.01. Was 0.005 meant?")
    assert said(goals=drop(1.0))["recipe.goals.0"].startswith("A max_drop of 1 lets 100 points of dice be lost")
    assert said(goals=drop(5.0, "hd95")) == {}, "millimetres"


def test_a_very_small_evaluation_part_is_told() -> None:
    assert "only 19 samples" in said(19, goals=drop(0.2))["recipe.data.artifact"]
    assert said(20, goals=drop(0.2)) == {}
    raw = said(3, goals=[Goal(metric="rms_error", kind="threshold", value=0.1)], task=Task(kind="raw"))
    assert set(raw) == {"recipe.data.artifact"}


def test_groups_that_only_a_tensor_names_are_not_guessed() -> None:
    assert said(3, "evaluation.groups", goals=drop(0.001)) == {}


def test_calibration_without_labels_is_told_where_labels_would_help() -> None:
    bare = arrays(LARGE)
    told = said(goals=drop(0.01), summary=bare)["recipe.stages.0"]
    assert "With calibration.masks it is compared by dice too" in told
    other = Recipe.model_validate({**RECIPE.model_dump(), "stages": [{"kind": "quantize", "scheme": "fp16"}]}).stages
    assert said(goals=drop(0.01), summary=bare, stages=other) == {}
    raw = said(goals=[Goal(metric="agreement", kind="threshold", value=0.9)], summary=bare, task=Task(kind="raw"))
    assert raw == {}


def test_a_zips_samples_and_masks_are_counted() -> None:
    def parts(masks: int, **groups: int) -> dict[str, Any]:
        folder = {"images": LARGE, "masks": LARGE, "unmatched": []}
        return {"parts": {"evaluation": {**folder, **groups}, "calibration": {**folder, "masks": masks}}}

    assert said(goals=drop(0.01), summary=parts(LARGE)) == {}
    assert "With calibration/masks/ it" in said(goals=drop(0.01), summary=parts(0))["recipe.stages.0"]
    assert "only 5 samples" in said(goals=drop(0.2), summary=parts(LARGE, groups=5))["recipe.data.artifact"]
    classes = {"parts": {part: {"classes": {"zero": LARGE}} for part in ("evaluation", "calibration")}}
    assert said(goals=drop(0.01, "top1"), summary=classes, task=DIGITS) == {}
