"""The words of training: their defaults, and what is no sense."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

from shared.recipe import Augmentation, Distill, Recipe, SoftTargets, Training


def recipe(**training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "source": {"architecture": {"library": "torchvision", "name": "resnet18"}, "weights": str(uuid4())},
            "task": {"kind": "classification", "classes": ["no", "yes"]},
            "data": {"artifact": str(uuid4())},
            "stages": [{"kind": "distill", "width": 0.5, "training": training}],
        }
    )


def test_defaults_train_without_augmentation_and_keep_a_tenth_out() -> None:
    training = Training()
    assert (training.augmentation, training.validation_ratio) == (Augmentation(), 0.1)
    assert (training.schedule, training.patience, training.class_weights) == ("one_cycle", None, None)


@pytest.mark.parametrize(
    "words",
    [
        {"epochs": 0},
        {"batch": 0},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"ema_decay": 1.0},
        {"label_smoothing": 1.0},
        {"validation_ratio": 0.9},
        {"schedule": "step"},
        {"patience": 0},
        {"augmentation": {"flips": ["diagonal"]}},
        {"augmentation": {"shift_ratio": 2}},
        {"optimizer": "sgd"},
    ],
)
def test_words_that_make_no_sense_are_refused(words: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Training.model_validate(words)


def test_a_flip_is_named_once() -> None:
    with pytest.raises(ValidationError, match="named twice"):
        Augmentation(flips=["horizontal", "horizontal"])


def test_patience_needs_kept_out_samples() -> None:
    with pytest.raises(ValidationError, match="patience needs samples that are kept out"):
        Training(patience=3, validation_ratio=0)


def test_class_weights_are_not_all_zero() -> None:
    with pytest.raises(ValidationError, match="all zero"):
        Training(class_weights=[0.0, 0.0])


def test_class_weights_are_one_a_class() -> None:
    assert recipe(class_weights=[1, 2]).stages[0].kind == "distill"
    with pytest.raises(ValidationError, match=r"stage 0 \(distill\) has 3 class_weights, the task 2 classes"):
        recipe(class_weights=[1, 2, 3])


@pytest.mark.parametrize("words", [{"temperature": 0}, {"alpha": 1.5}, {"alpha": -0.1}])
def test_soft_targets_have_a_temperature_and_a_share(words: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SoftTargets.model_validate(words)


def test_a_distillation_has_one_student() -> None:
    with pytest.raises(ValidationError, match="give either student"):
        Distill()
    assert Distill(width=0.5).parts() == {"train"}
