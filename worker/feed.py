"""What a network is run on: one batch of images, and beside it what its other inputs take, if it has any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Feed:
    """A batch for a network of several inputs: `images` for the first, `others` (n, ...) by the inputs' names.

    It has a length and is sliced like an array, sample by sample.
    """

    images: Floats
    others: Mapping[str, Array] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, span: slice) -> Feed:
        return Feed(self.images[span], {name: found[span] for name, found in self.others.items()})


Inputs = Floats | Feed


def by_name(inputs: Inputs, first: str) -> dict[str, Array]:
    """The arrays by the names of the inputs that take them; `first` takes the images."""
    if isinstance(inputs, Feed):
        return {first: inputs.images, **inputs.others}
    return {first: inputs}


def padded(inputs: Inputs, batch: int) -> Inputs:
    """The inputs, with the last sample over again up to `batch` samples."""
    if isinstance(inputs, Feed):
        return Feed(_padded(inputs.images, batch), {name: _padded(it, batch) for name, it in inputs.others.items()})
    return _padded(inputs, batch)


def _padded(found: Array, batch: int) -> Array:
    missing = batch - len(found)
    return np.concatenate([found, np.repeat(found[-1:], missing, axis=0)]) if missing else found


def save(inputs: Inputs, directory: Path) -> Path:
    """Write the inputs down, for another process to `load`."""
    path = directory / "inputs.npz"
    named = by_name(inputs, "")
    np.savez(path, np.array(list(named)), *named.values())
    return path


def load(path: Path) -> Inputs:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as found:
        names, images, *others = (found[key] for key in found.files)
    return Feed(images, dict(zip(names[1:].tolist(), others, strict=True))) if others else images
