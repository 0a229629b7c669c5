"""Which layers lose most in int8: blocks of them, each in int8 alone, by the error that it makes in the outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RANKED_SAMPLES = 8
MAX_BLOCKS = 48

Layers = tuple[str, ...]


@dataclass
class Budget:
    """Forward passes that a search may still take: a share of what full calibration takes, up to a fixed number."""

    passes: int

    PASSES_PER_SAMPLE = 16  # int8 takes a fraction of the time of a pass whose every tensor is watched
    MOST = 6144

    @classmethod
    def of(cls, calibration_samples: int) -> Budget:
        return cls(min(cls.PASSES_PER_SAMPLE * max(calibration_samples, 16), cls.MOST))

    def spend(self, passes: int) -> None:
        self.passes -= passes

    def has(self, passes: int) -> bool:
        return self.passes >= passes


@dataclass(frozen=True)
class Sensitivity:
    """A block of layers, and the error of the network's outputs when it alone is in int8."""

    layers: Layers
    error: float


def in_blocks(segments: Sequence[Layers], num_blocks: int) -> list[Layers]:
    """Neighbours joined until there are no more blocks than that."""
    count = min(num_blocks, len(segments))
    bounds = [index * len(segments) // count for index in range(count + 1)] if count else []
    return [
        tuple(name for segment in segments[low:high] for name in segment) for low, high in itertools.pairwise(bounds)
    ]


def rank(
    segments: Sequence[Layers],
    error_of: Callable[[Layers, int], float],
    num_compared: int,
    budget: Budget,
    on_progress: Callable[[float], None],
) -> list[Sensitivity]:
    """Every block, the worst one first; `error_of` is the error of so many samples with that block alone in int8.

    `num_compared` samples are there to be compared. Half of the budget at most is spent: where there are many layers,
    they are ranked in blocks.
    """
    num_samples = min(RANKED_SAMPLES, num_compared)
    affordable = max(1, budget.passes // 2 // num_samples)
    blocks = in_blocks(segments, min(MAX_BLOCKS, affordable))
    found = []
    for position, layers in enumerate(blocks):
        on_progress(position / len(blocks))
        budget.spend(num_samples)
        found.append(Sensitivity(layers, error_of(layers, num_samples)))
    return sorted(found, key=lambda one: (-one.error, one.layers))
