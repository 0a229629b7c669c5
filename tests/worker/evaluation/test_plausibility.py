"""A source model that decides by chance is questioned; one that is worse than its owner says stops the job."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import StageFailed
from shared.recipe import Recipe, Task
from tests.shared.reports import RECIPE, measured
from worker.evaluation.metrics import Evaluation
from worker.evaluation.plausibility import check_expectations, doubts

DIGITS = Task(kind="classification", classes=["zero", "one", "two"])
LESION = Task(kind="segmentation", classes=["healthy", "lesion"], background=0)
FINDINGS = Task(kind="multilabel", classes=["nodule", "effusion"])


def expecting(**expected: float) -> Recipe:
    return Recipe.model_validate({**RECIPE.model_dump(), "expect": expected})


@pytest.mark.parametrize(("reached", "expected"), [(0.90, 0.90), (0.86, 0.90), (0.95, 0.90)])
def test_a_source_that_reaches_about_what_was_expected_goes_on(reached: float, expected: float) -> None:
    check_expectations(expecting(dice=expected), measured(dice=reached))


def test_a_source_that_reaches_clearly_less_stops_the_job_and_names_what_to_check() -> None:
    with pytest.raises(StageFailed, match=r"reaches 12\.0 points of dice .* 90\.0 were expected") as refused:
        check_expectations(expecting(dice=0.9), measured(dice=0.12))
    assert refused.value.code == "source_below_expectation"
    assert "preprocessing" in (refused.value.hint or "")


def test_distances_are_expected_within_a_twentieth() -> None:
    check_expectations(expecting(hd95=4.0), measured(hd95=4.1))
    with pytest.raises(StageFailed, match=r"reaches 9\.0 mm or pixels of hd95"):
        check_expectations(expecting(hd95=4.0), measured(hd95=9.0))


def recalls(**by_class: float) -> Evaluation:
    means = {"balanced_accuracy": float(np.mean(list(by_class.values())))}
    return Evaluation(means, {name: {"sensitivity": value} for name, value in by_class.items()})


def test_a_classifier_that_always_says_the_same_is_questioned() -> None:
    (doubt,) = doubts(recalls(zero=1.0, one=0.0, two=0.0), DIGITS)
    assert doubt.startswith("The source model takes every sample for 'zero'.")


def test_a_classifier_that_guesses_is_questioned() -> None:
    (doubt,) = doubts(recalls(zero=0.4, one=0.3, two=0.35), DIGITS)
    assert "nearly by chance: balanced accuracy 35.0 points, 33.3 by guessing" in doubt


def test_a_good_classifier_is_not_questioned() -> None:
    assert doubts(recalls(zero=0.9, one=0.95, two=0.8), DIGITS) == []


@pytest.mark.parametrize(("dice", "questioned"), [(0.02, True), (0.6, False)])
def test_a_segmentation_that_finds_hardly_anything_is_questioned(dice: float, questioned: bool) -> None:
    found = Evaluation({"dice": dice}, {"healthy": {"dice": 0.99}, "lesion": {"dice": dice}})
    assert [text.startswith("The source model finds hardly anything of lesion") for text in doubts(found, LESION)] == (
        [True] if questioned else []
    )


@pytest.mark.parametrize(("auroc", "questioned"), [(0.48, True), (0.8, False)])
def test_labels_that_are_told_by_chance_are_questioned(auroc: float, questioned: bool) -> None:
    assert bool(doubts(Evaluation({"auroc": auroc}), FINDINGS)) == questioned


def test_nothing_is_known_of_a_raw_task() -> None:
    assert doubts(Evaluation(), Task(kind="raw")) == []
