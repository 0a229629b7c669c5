"""The table of metrics: which task has which, which way is better, and how they are shown."""

from __future__ import annotations

import pytest

from shared.metrics import AGREEMENT, ALL, METRICS, higher_is_better, loss_of, of_task, shown


def test_a_loss_is_positive_where_it_got_worse() -> None:
    assert loss_of("dice", 0.9, 0.8) == pytest.approx(0.1)
    assert loss_of("hd95", 3.0, 4.0) == pytest.approx(1.0)
    assert loss_of("ece", 0.02, 0.05) == pytest.approx(0.03)
    assert loss_of("top1", 0.8, 0.9) == pytest.approx(-0.1)


def test_ratios_are_shown_in_points_and_distances_as_they_are() -> None:
    assert shown("dice", 0.912) == pytest.approx(91.2)
    assert shown("rms_error", 0.05) == pytest.approx(5)
    assert shown("hd95", 3.5) == 3.5


def test_every_name_is_one_metrics_and_closeness_belongs_to_no_task() -> None:
    assert len(ALL) == len(METRICS) + len(AGREEMENT)
    assert all(name == metric.name for name, metric in ALL.items())
    assert all(metric.tasks for metric in METRICS.values())
    assert not any(metric.tasks for metric in AGREEMENT.values())
    assert of_task(None) == ()


def test_only_errors_and_distances_are_better_when_lower() -> None:
    assert {name for name in ALL if not higher_is_better(name)} == {"hd95", "ece", "rms_error"}


def test_what_costs_much_is_computed_on_request_only() -> None:
    assert {name for name, metric in ALL.items() if metric.on_request} == {"hd95", "nsd"}
