"""When a training is saved: often enough that little is lost, seldom enough that no training waits for its uploads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

INTERVAL_VARIABLE = "BURNISH_CHECKPOINT_SECONDS"
INTERVAL_SECONDS = 60.0  # work that may be lost
SHARE = 0.05  # of all epochs: after so many a shorter time is enough,
SHORTENED = 1 / 6  # this part of the interval


class SaveTimer:
    """Says when a training is due to be saved: every minute, and of a short training every twentieth of its epochs.

    A save waits for an upload, so it is never due after every epoch of a second; and what an interruption costs is an
    epoch, or a minute where an epoch is shorter. An interval of 0 saves after every epoch.
    """

    def __init__(
        self, num_epochs: int, interval_seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if interval_seconds is None:
            interval_seconds = float(os.environ.get(INTERVAL_VARIABLE, INTERVAL_SECONDS))
        self._num_epochs, self._interval_seconds, self._clock = num_epochs, interval_seconds, clock
        self._epochs_since, self._saved_at = 0, clock()

    def epoch_ended(self) -> bool:
        """Count an epoch; whether the training is due to be saved now."""
        self._epochs_since += 1
        elapsed_seconds = self._clock() - self._saved_at
        many_epochs = self._epochs_since >= SHARE * self._num_epochs
        return elapsed_seconds >= self._interval_seconds * (SHORTENED if many_epochs else 1)

    def saved(self) -> None:
        self._epochs_since, self._saved_at = 0, self._clock()
