"""Running any batch on a model whose batch is fixed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def in_fixed_batches(run: Callable[[Floats], Floats], inputs: Floats, batch: int) -> Floats:
    """Outputs of `inputs` (n, ...), run `batch` at a time; the last stretch is padded with its last sample."""
    found = []
    for start in range(0, len(inputs), batch):
        stretch = inputs[start : start + batch]
        missing = batch - len(stretch)
        padded = np.concatenate([stretch, np.repeat(stretch[-1:], missing, axis=0)]) if missing else stretch
        found.append(run(padded)[: len(stretch)])
    return np.concatenate(found)
