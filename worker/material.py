"""The train part of the data set in two: what is learnt from, and the tail that is kept out to judge by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from shared.errors import StageFailed
from shared.recipe import Task
from worker.data import Samples

KEPT_BYTES = 2**30  # of inputs that are read once and then kept in memory

Network = Callable[[torch.Tensor], torch.Tensor]


class Material:
    """Some samples of a part, as tensors by position; small ones are read once."""

    def __init__(self, samples: Samples, positions: Sequence[int]) -> None:
        self._samples, self.positions = samples, positions
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        if len(positions) and samples.take([positions[0]]).nbytes * len(positions) <= KEPT_BYTES:
            self._kept = self._read(positions)

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (n, C, H, W), or as the layout says, and targets (n,) or (n, H, W). Raises what Samples raises."""
        if self._kept is not None:
            chosen = torch.as_tensor(indices)
            return self._kept[0][chosen], self._kept[1][chosen]
        return self._read([self.positions[index] for index in indices])

    def _read(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        read_target = self._samples.read_target
        if read_target is None:
            raise StageFailed("The train part has no labels.", code="data_mismatch")
        targets = np.stack([read_target(position) for position in positions])
        return torch.from_numpy(self._samples.take(positions)), torch.from_numpy(targets)


def split(samples: Samples, validation_ratio: float) -> tuple[Material, Material]:
    """What is learnt from, and the last samples, kept out: at least one if any are asked for.

    Of labelled images the last of every class are kept out, since data sets come sorted by class; of images with masks
    the last of all, since neighbours look alike. Raises StageFailed: too_few_samples.
    """
    everything = range(len(samples))
    kept_out = _tail(everything, validation_ratio) if validation_ratio else []
    if validation_ratio and samples.read_target is not None and samples.read_target(0).ndim == 0:
        labels = np.array([int(samples.read_target(position)) for position in everything])
        classes = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
        # a class of a single sample is learnt from
        kept_out = sorted(position for own in classes if len(own) > 1 for position in _tail(own, validation_ratio))
    learnt = sorted(set(everything) - set(kept_out))
    if not learnt or (validation_ratio and not kept_out):
        raise StageFailed(
            f"The train part has {len(samples)} samples: too few to learn from some and keep others out.",
            hint="Give more samples, or validation_ratio: 0.",
            code="too_few_samples",
        )
    return Material(samples, learnt), Material(samples, kept_out)


def _tail(positions: Sequence[int], ratio: float) -> list[int]:
    return list(positions[-max(1, round(ratio * len(positions))) :])


@torch.no_grad()
def validate(network: Network, kept_out: Material, task: Task, batch: int, device: torch.device) -> float | None:
    """The task's leading metric (top1, or mean Dice without the background), as `evaluate` defines it.

    None where nothing is kept out. NaN where the network puts out something else than finite numbers.
    """
    scores = []
    for start in range(0, len(kept_out), batch):
        inputs, targets = kept_out.take(range(start, min(start + batch, len(kept_out))))
        outputs = network(inputs.to(device)).float()  # (n, classes, ...)
        if not bool(torch.isfinite(outputs).all()):
            return float("nan")
        found, truth = outputs.argmax(dim=1), targets.to(device)  # (n, ...)
        scores.append(_dice(found, truth, task) if task.kind == "segmentation" else (found == truth).double()[:, None])
    if not scores:
        return None
    mean = torch.cat(scores).nanmean(dim=0).nanmean()  # over the samples of each class, then over the classes
    return float(mean.nan_to_num(0.0))


def _dice(found: torch.Tensor, truth: torch.Tensor, task: Task) -> torch.Tensor:
    """Dice (n, classes) without the background; NaN where the truth lacks the class."""
    columns = []
    for index in range(len(task.classes)):
        if index == task.background:
            continue
        predicted, wanted = (found == index).flatten(1), (truth == index).flatten(1)  # (n, pixels)
        dice = 2 * (predicted & wanted).sum(dim=1).double() / (predicted.sum(dim=1) + wanted.sum(dim=1))
        columns.append(dice.masked_fill(~wanted.any(dim=1), float("nan")))
    return torch.stack(columns, dim=1)
