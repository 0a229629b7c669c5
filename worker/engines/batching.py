"""Running any batch on a model whose batch is fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shared.errors import StageFailed
from worker.feed import Floats, Inputs, padded


def in_fixed_batches(run: Callable[[Inputs], list[Floats]], inputs: Inputs, batch: int) -> list[Floats]:
    """Every output of `inputs` (n, ...), run `batch` at a time; the last stretch is padded with its last sample.

    Raises StageFailed (output_mismatch) where the samples are not an output's first axis.
    """
    found = []
    for start in range(0, len(inputs), batch):
        stretch = inputs[start : start + batch]
        outputs = run(padded(stretch, batch))
        refuse_other_axes(outputs, batch)
        found.append([output[: len(stretch)] for output in outputs])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def refuse_other_axes(outputs: Sequence[Floats], count: int) -> None:
    """Raises StageFailed (output_mismatch) where the first axis of an output is not that of `count` samples."""
    for index, output in enumerate(outputs):
        if output.ndim == 0 or len(output) != count:
            raise StageFailed(
                f"For {count} samples output {index} of the network has the shape {list(output.shape)}: its samples do "
                "not lie along the first axis.",
                hint="Transpose the output before you export the network, or give its axes names in the ONNX file: one "
                "that has the name of the input's first axis is put first.",
                code="output_mismatch",
            )
