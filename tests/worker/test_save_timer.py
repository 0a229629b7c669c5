"""When a training is due to be saved, by a clock that the test moves."""

from __future__ import annotations

from worker.save_timer import SaveTimer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def saves(num_epochs: int, epoch_seconds: float, interval_seconds: float = 60.0) -> list[float]:
    """When a training is saved whose epochs all take as long."""
    clock, times = Clock(), []
    timer = SaveTimer(num_epochs, interval_seconds, clock)
    for _ in range(num_epochs):
        clock.now += epoch_seconds
        if timer.epoch_ended():
            timer.saved()
            times.append(clock.now)
    return times


def test_epochs_of_a_second_are_saved_every_twentieth_of_them() -> None:
    assert saves(200, 1.0) == [10.0 * save for save in range(1, 21)]


def test_epochs_that_take_no_time_are_not_saved() -> None:
    assert saves(100, 0.01) == []


def test_of_a_long_training_a_minute_is_lost_at_most() -> None:
    assert saves(10_000, 7.0)[:3] == [63.0, 126.0, 189.0]


def test_an_epoch_longer_than_a_minute_is_saved_at_once() -> None:
    assert saves(3, 100.0) == [100.0, 200.0, 300.0]


def test_an_interval_of_zero_saves_after_every_epoch() -> None:
    assert len(saves(7, 0.0, interval_seconds=0.0)) == 7
