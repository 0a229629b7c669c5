"""Any batch runs on a model of a fixed batch, and an output that is not by sample is refused."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import StageFailed
from worker.engines.batching import in_fixed_batches
from worker.feed import Floats, Inputs

IMAGES = np.arange(7 * 2, dtype=np.float32).reshape(7, 2)


def test_the_last_stretch_is_padded_and_what_that_gave_is_left_out() -> None:
    sizes = list[int]()

    def run(inputs: Inputs) -> list[Floats]:
        assert isinstance(inputs, np.ndarray)
        sizes.append(len(inputs))
        return [inputs * 2, inputs.sum(axis=1)]

    doubled, sums = in_fixed_batches(run, IMAGES, 3)
    assert sizes == [3, 3, 3]
    assert np.array_equal(doubled, IMAGES * 2)
    assert np.array_equal(sums, IMAGES.sum(axis=1))


def test_samples_along_another_axis_are_refused_in_a_sentence() -> None:
    def run(inputs: Inputs) -> list[Floats]:
        assert isinstance(inputs, np.ndarray)
        return [inputs, inputs.T]

    with pytest.raises(StageFailed, match=r"For 3 samples output 1 .* shape \[2, 3\]: .* first axis") as refused:
        in_fixed_batches(run, IMAGES, 3)
    assert refused.value.code == "output_mismatch"
