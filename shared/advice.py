"""Advice on a job before it runs: no errors, but what its report would otherwise say too late."""

from __future__ import annotations

from typing import Any

from shared.datasets import num_groups
from shared.evidence import evidence_note, smallest_showable_drop
from shared.figures import quantity, wanted
from shared.metrics import METRICS
from shared.recipe import Goal, Quantize, Recipe
from shared.schemas import Note

MUCH = 0.2  # a max_drop of more is more likely a percentage that was taken for a share
FEW_SAMPLES = 20


def notes(recipe: Recipe, summary: dict[str, Any], format: str) -> list[Note]:
    """Advice on a recipe and its data set, of which `summary` is what `inspect_file` says of its headers."""
    samples = num_groups(summary, format, "evaluation")
    found = [
        _assumed_goals(recipe),
        _few_samples(samples),
        *(note for place, goal in enumerate(recipe.goals) for note in _on_goal(recipe, place, goal, samples)),
        *([] if recipe.goals else _on_assumed(recipe, samples)),
        *(_on_calibration(recipe, place, summary, format) for place in range(len(recipe.stages))),
    ]
    return [note for note in found if note is not None]


def _assumed_goals(recipe: Recipe) -> Note | None:
    if recipe.goals:
        return None
    if not recipe.assumed_goals:
        message = (
            "No goal is named and there is no task: engines are kept whose outputs are close to the source model's. "
            "To say how close, name a goal such as {metric: rms_error, kind: threshold, value: 0.1}."
        )
    else:
        goal = recipe.assumed_goals[0]
        message = f"No goal is named, so this one is assumed: {goal.kind} of {goal.metric}, {wanted(goal)}."
    return Note(location="recipe.goals", message=message)


def _few_samples(samples: int | None) -> Note | None:
    if samples is None or samples >= FEW_SAMPLES:
        return None
    message = f"The evaluation part has only {samples} samples (or groups of them): its figures will be uncertain."
    return Note(location="recipe.data.artifact", message=message)


def _on_goal(recipe: Recipe, place: int, goal: Goal, samples: int | None) -> list[Note]:
    messages = [_much(goal), _cannot_be_shown(recipe, goal, samples)]
    return [Note(location=f"recipe.goals.{place}", message=message) for message in messages if message is not None]


def _on_assumed(recipe: Recipe, samples: int | None) -> list[Note]:
    messages = [_cannot_be_shown(recipe, goal, samples) for goal in recipe.assumed_goals]
    return [Note(location="recipe.goals", message=message) for message in messages if message is not None]


def _much(goal: Goal) -> str | None:
    if goal.kind != "max_drop" or METRICS[goal.metric].unit != "ratio" or goal.value <= MUCH:
        return None
    return (
        f"A max_drop of {goal.value:g} lets {quantity(goal, goal.value)} of {goal.metric} be lost. Goals are shares: "
        f"1 point is 0.01. Was {goal.value / 100:g} meant?"
    )


def _cannot_be_shown(recipe: Recipe, goal: Goal, samples: int | None) -> str | None:
    """That a max_drop of the leading metric is smaller than what so many samples can show at the best."""
    if goal.kind != "max_drop" or goal.metric != recipe.task.metrics[0] or samples is None:
        return None
    smallest = smallest_showable_drop(recipe.task, samples)
    if smallest is None or smallest <= goal.value:
        return None
    if goal.value == 0:
        return (
            "A max_drop of 0 is met only by outputs that equal the source model's but for rounding, or that are surely "
            "better: no number of samples shows that nothing at all is lost."
        )
    return f"{evidence_note(recipe.task, samples, goal.value)} Expect the verdict not_shown."


def _on_calibration(recipe: Recipe, place: int, summary: dict[str, Any], format: str) -> Note | None:
    """That int8 is checked by its outputs alone where calibration samples have no labels."""
    stage, target = recipe.stages[place], recipe.task.target
    if not isinstance(stage, Quantize) or stage.scheme != "int8_static" or target is None:
        return None
    if _has_labels(summary, format, target):
        return None
    where = "calibration/masks/" if format == "zip" else f"calibration.{target}"
    message = (
        f"The calibration part has no {target}, so int8 is compared with your model by its outputs until it is "
        f"evaluated. With {where} it is compared by {recipe.task.metrics[0]} too, and fewer layers may stay in float."
    )
    return Note(location=f"recipe.stages.{place}", message=message)


def _has_labels(summary: dict[str, Any], format: str, target: str) -> bool:
    if format != "zip":
        return f"calibration.{target}" in summary["tensors"]
    part = summary["parts"]["calibration"]
    return "classes" in part or part["masks"] > 0
