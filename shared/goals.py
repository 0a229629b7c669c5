"""What the result of a job must reach: quality, speed, size."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.metrics import AGREEMENT, METRICS
from shared.subject import Words

RESOURCES = ("size", "latency", "parameters", "macs", "memory")
RESOURCE_GOALS: dict[str, tuple[str, ...]] = {
    "min_speedup": ("latency",),
    "max_ratio": RESOURCES,
    "at_most": ("latency", "size", "memory"),
    "at_least": ("throughput",),
}
ASSUMED_DROP = 0.01


class Goal(Words):
    """What the result must reach, in the metric's own unit: one point of Dice is 0.01.

    threshold: the metric itself; max_drop: what may be lost against the baseline (both are quality goals, and gate
    every stage). agreement, fidelity_dice and rms_error compare with the source model's outputs and need no labels.
    min_speedup: baseline's median latency over the result's; max_ratio: the result over the baseline; at_most: median
    latency in milliseconds, size or memory in megabytes (10^6 bytes); at_least: throughput in samples a second (these
    four are checked on what the job delivers).
    """

    metric: str = Field(examples=["dice", "latency", "size"])
    kind: Literal["threshold", "max_drop", "min_speedup", "max_ratio", "at_most", "at_least"]
    value: float = Field(ge=0)

    @model_validator(mode="after")
    def _metric_fits_kind(self) -> Self:
        if self.value == 0 and self.kind != "max_drop":
            raise ValueError(f"{self.kind} must be greater than 0")
        if self.kind in RESOURCE_GOALS and self.metric not in RESOURCE_GOALS[self.kind]:
            raise ValueError(
                f"{self.kind} is a goal of {', '.join(RESOURCE_GOALS[self.kind])}, not of {self.metric!r}"
            )
        if self.kind == "threshold" and self.metric not in (*METRICS, *AGREEMENT):
            raise ValueError(f"threshold is a goal of {', '.join((*METRICS, *AGREEMENT))}, not of {self.metric!r}")
        if self.kind == "max_drop" and self.metric not in METRICS:
            raise ValueError(f"max_drop is a goal of {', '.join(METRICS)}, not of {self.metric!r}")
        if self.is_quality and self.value > 1 and self.metric in METRICS and METRICS[self.metric].high is not None:
            raise ValueError(f"{self.metric} lies between 0 and 1, so {self.value} is never reached: 1 point is 0.01")
        return self

    @property
    def is_quality(self) -> bool:
        return self.kind in ("threshold", "max_drop")

    @property
    def of_agreement(self) -> bool:
        return self.metric in AGREEMENT

    @property
    def higher_is_better(self) -> bool:
        """Whether what the goal speaks of must be at least its value; at most otherwise."""
        if self.kind == "threshold":
            return {**METRICS, **AGREEMENT}[self.metric].higher_is_better
        return self.kind in ("min_speedup", "at_least")
