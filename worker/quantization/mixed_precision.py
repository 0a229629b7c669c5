"""Which layers go back to float so that int8 loses no more than a level allows: by bisection, then trimmed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.quantization.quality import Level, Quality
from worker.quantization.sensitivity import Budget, Layers, Sensitivity

MAX_TRIMS = 6


@dataclass(frozen=True)
class Form:
    """One int8 form on disk: its layers in float and, where that was checked, what it lost."""

    name: str
    path: Path
    in_float: Layers = ()
    quality: Quality | None = None

    def reaches(self, level: Level) -> bool:
        """Whether it loses no more than that; what was not checked counts as good."""
        return self.quality is None or self.quality.reaches(level)


Attempt = Callable[[Layers, str], Form]


def search(
    ranking: Sequence[Sensitivity], levels: Sequence[Level], attempt: Attempt, cost: int, budget: Budget
) -> list[Form]:
    """A form for each level that is reached with at least one block in int8, each form once; the laxest level first.

    `attempt` makes the form with these layers in float and checks it, which takes `cost` passes of the budget.
    """
    tried: dict[frozenset[int], Form] = {}

    def with_float(blocks: frozenset[int], level: Level) -> bool | None:
        """Whether the form reaches the level; None where the budget is spent."""
        if blocks not in tried:
            if not budget.has(cost):
                return None
            budget.spend(cost)
            layers = tuple(name for index in sorted(blocks) for name in ranking[index].layers)
            tried[blocks] = attempt(layers, level.name)
        return tried[blocks].reaches(level)

    found: list[Form] = []
    fewest = 0  # blocks that are known to be too few
    for level in levels:
        blocks = _bisected(len(ranking), fewest, lambda chosen, its=level: with_float(chosen, its))  # type: ignore[misc]
        if blocks is None:
            break
        fewest = len(blocks) - 1
        blocks = _trimmed(blocks, lambda chosen, its=level: with_float(chosen, its))  # type: ignore[misc]
        if tried[blocks] not in found:
            found.append(tried[blocks])
    return found


def _bisected(num_blocks: int, fewest: int, reaches: Callable[[frozenset[int]], bool | None]) -> frozenset[int] | None:
    """The fewest of the worst blocks that reach the level; None where all but one do not, or the budget is spent."""
    low, high = fewest, num_blocks
    best: frozenset[int] | None = None
    while high - low > 1:
        # few are usually enough, so the first steps are short ones
        middle = min((low + high) // 2, 2 * low + 1) if best is None else (low + high) // 2
        chosen = frozenset(range(middle))
        reached = reaches(chosen)
        if reached is None:
            break
        if reached:
            high, best = middle, chosen
        else:
            low = middle
    return best


def _trimmed(blocks: frozenset[int], reaches: Callable[[frozenset[int]], bool | None]) -> frozenset[int]:
    """Without those blocks that the level can do without; those that lose least are tried first."""
    for index in sorted(blocks, reverse=True)[1 : 1 + MAX_TRIMS]:  # without the last one the level is not reached
        if len(blocks) > 1 and reaches(blocks - {index}):
            blocks -= {index}
    return blocks
