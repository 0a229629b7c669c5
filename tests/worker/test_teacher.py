"""When a trial speaks for the teacher, and what is said where it does not."""

from __future__ import annotations

import pytest

from shared.recipe import SoftTargets, Training
from worker.teacher import Trial, trial_of, warning_of

GOOD = [0.9, 0.9, 0.9, 0.9]
TRAINING = Training(epochs=40)


def test_the_gain_is_the_mean_of_the_differences_and_has_a_standard_error() -> None:
    trial = Trial(6, [0.5, 0.6, 0.7, 0.8], [0.6, 0.6, 0.9, 0.9], GOOD)
    assert trial.gain == pytest.approx(0.1)
    assert trial.standard_error == pytest.approx(0.0816497 / 2, abs=1e-5)
    assert trial.teacher_is_better


def test_a_gain_within_chance_is_none() -> None:
    assert not Trial(6, [0.5, 0.6, 0.7, 0.8], [0.8, 0.5, 0.9, 0.6], GOOD).teacher_is_better
    assert not Trial(6, GOOD, GOOD, GOOD).teacher_is_better


def test_a_teacher_that_knows_less_than_the_student_is_not_listened_to() -> None:
    alone, taught = [0.5, 0.5, 0.5, 0.5], [0.6, 0.6, 0.6, 0.6]
    assert Trial(6, alone, taught, GOOD).teacher_is_better
    assert not Trial(6, alone, taught, [0.4, 0.5, 0.5, 0.5]).teacher_is_better


def test_a_trial_takes_a_bounded_share_of_the_epochs_and_keeps_samples_out() -> None:
    short = trial_of(TRAINING)
    assert (short.epochs, short.validation_ratio, short.patience) == (6, 0.2, None)
    assert trial_of(TRAINING.model_copy(update={"validation_ratio": 0.1})).validation_ratio == 0.1


def test_the_warning_says_what_the_trial_found() -> None:
    better = Trial(6, [0.5, 0.5], [0.6, 0.6], [0.9, 0.9])
    worse = Trial(6, [0.6, 0.5], [0.5, 0.5], [0.9, 0.9])
    assert warning_of(better, SoftTargets(), TRAINING) is None
    assert warning_of(worse, SoftTargets(), TRAINING) == (
        "The teacher is no better than the labels alone, so it was not used: after 6 epochs -5.00 points on 2 samples, "
        "with a standard error of 5.00; the teacher itself reaches 90.00 there."
    )
    assert "7 epochs are too few" in (warning_of(None, SoftTargets(), Training(epochs=7)) or "")
    for untried in (SoftTargets(teacher="always"), SoftTargets(alpha=1)):
        assert warning_of(None, untried, TRAINING) is None
