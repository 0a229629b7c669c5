"""The words of training: their defaults, and what is no sense."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

from shared.recipe import Augmentation, Distill, Quantize, Recipe, SoftTargets, Training


def recipe(**training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "source": {"architecture": {"library": "torchvision", "name": "resnet18"}, "weights": str(uuid4())},
            "task": {"kind": "classification", "classes": ["no", "yes"]},
            "data": {"artifact": str(uuid4())},
            "stages": [{"kind": "distill", "width": 0.5, "training": training}],
        }
    )


def test_by_default_every_sample_is_learnt_from_with_a_cosine_and_weight_decay() -> None:
    training = Training()
    assert (training.validation_ratio, training.weight_decay, training.schedule) == (0.0, 1e-2, "cosine")
    assert (training.patience, training.class_weights) == (None, None)


def test_by_default_no_sample_is_changed() -> None:
    augmentation = Training().augmentation
    assert (augmentation.flips, augmentation.shift_ratio) == ([], 0.0)
    assert (augmentation.intensity, augmentation.noise) == (0.0, 0.0)


def test_by_default_a_teacher_has_to_prove_that_it_helps() -> None:
    assert SoftTargets().teacher == Distill(width=0.5).soft_targets.teacher == "auto"
    assert Quantize().soft_targets == SoftTargets(teacher="always")


def raw(*stages: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "source": {"architecture": {"library": "torchvision", "name": "resnet18"}, "weights": str(uuid4())},
            "data": {"artifact": str(uuid4())},
            "stages": list(stages),
        }
    )


def test_without_labels_a_stage_learns_from_the_source_model_alone() -> None:
    alone = {"alpha": 1}
    assert raw({"kind": "distill", "width": 0.5, "soft_targets": alone}).parts() == {"train", "evaluation"}
    assert raw({"kind": "prune", "soft_targets": alone}).parts() == {"train", "evaluation"}
    for stage in (
        {"kind": "distill", "width": 0.5},
        {"kind": "prune", "soft_targets": None},
        {"kind": "prune", "soft_targets": alone, "importance": "taylor"},
    ):
        with pytest.raises(ValidationError, match=r"which need a task; without labels .* soft_targets: \{alpha: 1\}"):
            raw(stage)


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
        {"augmentation": {"noise": -0.1}},
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
        Training(patience=3)


def test_class_weights_are_not_all_zero() -> None:
    with pytest.raises(ValidationError, match="all zero"):
        Training(class_weights=[0.0, 0.0])


def test_class_weights_are_one_a_class() -> None:
    assert recipe(class_weights=[1, 2]).stages[0].kind == "distill"
    with pytest.raises(ValidationError, match=r"stage 0 \(distill\) has 3 class_weights, the task 2 classes"):
        recipe(class_weights=[1, 2, 3])


@pytest.mark.parametrize("words", [{"temperature": 0}, {"alpha": 1.5}, {"alpha": -0.1}, {"teacher": "never"}])
def test_soft_targets_have_a_temperature_and_a_share(words: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SoftTargets.model_validate(words)


def test_a_distillation_has_one_student() -> None:
    with pytest.raises(ValidationError, match="give either student"):
        Distill()
    assert Distill(width=0.5).parts() == {"train"}
