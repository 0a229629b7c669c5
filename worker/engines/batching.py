"""Running any batch on a model whose batch is fixed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from worker.feed import Floats, Inputs, padded


def in_fixed_batches(run: Callable[[Inputs], list[Floats]], inputs: Inputs, batch: int) -> list[Floats]:
    """Every output of `inputs` (n, ...), run `batch` at a time; the last stretch is padded with its last sample."""
    found = []
    for start in range(0, len(inputs), batch):
        stretch = inputs[start : start + batch]
        found.append([output[: len(stretch)] for output in run(padded(stretch, batch))])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]
