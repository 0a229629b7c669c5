"""The train part of the data set in two: what is learnt from, and what is kept out to validate on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shared.errors import StageFailed
from worker.data import Samples

KEPT_BYTES = 2**30  # of inputs that are read once and then kept in memory
MAX_BLOCKS, LEAST_IN_BLOCK = 5, 3
GAP_RATIO = 0.02  # of the part, on each side of a block


class Material:
    """Some samples of a part, as tensors by position; small ones are read once. Without labels there are no targets."""

    def __init__(self, samples: Samples, positions: Sequence[int]) -> None:
        self._samples, self.positions = samples, positions
        self.has_targets = samples.read_target is not None
        self._kept: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if len(positions) and samples.take([positions[0]]).nbytes * len(positions) <= KEPT_BYTES:
            self._kept = self._read(positions)

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Inputs (n, C, H, W), or as the layout says, and targets (n, ...). Raises what Samples raises."""
        if self._kept is not None:
            inputs, targets = self._kept
            chosen = torch.as_tensor(indices)
            return inputs[chosen], None if targets is None else targets[chosen]
        return self._read([self.positions[index] for index in indices])

    def _read(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs, read_target = torch.from_numpy(self._samples.take(positions)), self._samples.read_target
        if read_target is None:
            return inputs, None
        return inputs, torch.from_numpy(np.stack([read_target(position) for position in positions]))


def split(samples: Samples, validation_ratio: float) -> tuple[Material, Material]:
    """What is learnt from, and what is kept out: at least one sample if any are asked for.

    Whole groups are kept out where the data names them. Else, of labelled images samples spread over every class; of
    volumes samples spread over the part; and of slices, whose neighbours look alike, several blocks, with a gap on
    each side that is in neither part. Raises StageFailed: too_few_samples.
    """
    everything = range(len(samples))
    kept_out, gap = _kept_out(samples, validation_ratio) if validation_ratio else ([], [])
    learnt = sorted(set(everything) - set(kept_out) - set(gap))
    if not learnt or (validation_ratio and not kept_out):
        raise StageFailed(
            f"The train part has {len(samples)} samples: too few to learn from some and keep others out.",
            hint="Give more samples, or validation_ratio: 0.",
            code="too_few_samples",
        )
    return Material(samples, learnt), Material(samples, kept_out)


def _kept_out(samples: Samples, ratio: float) -> tuple[list[int], list[int]]:
    """Positions that are kept out, and those in the gaps around them."""
    everything = list(range(len(samples)))
    groups = getattr(samples, "groups", None)
    if groups is not None and len(np.unique(np.asarray(groups))) > 1:
        return _whole_groups(np.asarray(groups).tolist(), ratio), []
    target = None if samples.read_target is None or not len(samples) else samples.read_target(0)
    if target is not None and target.ndim == 0:
        assert samples.read_target is not None
        labels = np.array([int(samples.read_target(position)) for position in everything])
        classes = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
        # a class of a single sample is learnt from
        return sorted(position for own in classes if len(own) > 1 for position in _spread(own, ratio)), []
    if (target is not None and target.ndim == 1) or (len(samples) and samples.take([0])[0].ndim == 4):
        return _spread(everything, ratio), []
    return _blocks(len(samples), ratio)


def _count(num_samples: int, ratio: float) -> int:
    return max(1, round(ratio * num_samples))


def _spread(positions: Sequence[int], ratio: float) -> list[int]:
    """A share of the positions, evenly spaced, none of them at the ends."""
    count = _count(len(positions), ratio)
    return [positions[int((index + 0.5) * len(positions) / count)] for index in range(count)]


def _whole_groups(groups: Sequence[int], ratio: float) -> list[int]:
    """Positions of evenly spaced groups: the fewest with which the share is reached, and never all groups."""
    members = {group: [at for at, own in enumerate(groups) if own == group] for group in dict.fromkeys(groups)}
    names, wanted = list(members), _count(len(groups), ratio)
    for count in range(1, len(names)):
        chosen = [names[int((index + 0.5) * len(names) / count)] for index in range(count)]
        kept_out = sorted(position for name in chosen for position in members[name])
        if len(kept_out) >= wanted:
            break
    return kept_out


def _blocks(num_samples: int, ratio: float) -> tuple[list[int], list[int]]:
    """Evenly spaced blocks, and the gaps on their sides; no gaps where nothing else would be left."""
    count = _count(num_samples, ratio)
    num_blocks = max(1, min(MAX_BLOCKS, count // LEAST_IN_BLOCK))
    gap = max(1, round(GAP_RATIO * num_samples))
    kept_out: set[int] = set()
    around: set[int] = set()
    for block in range(num_blocks):
        length = count * (block + 1) // num_blocks - count * block // num_blocks
        first = int((block + 0.5) * num_samples / num_blocks - length / 2)
        kept_out |= set(range(first, first + length))
        around |= set(range(first - gap, first + length + gap))
    around &= set(range(num_samples))
    return sorted(kept_out), sorted(around - kept_out) if len(around) < num_samples else []
