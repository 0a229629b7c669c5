"""What is kept out of a training: spread over classes, blocks with gaps, or whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from shared.errors import StageFailed
from worker.data import Samples
from worker.material import split


def samples(count: int, targets: Sequence[Any] | None = None, shape: tuple[int, ...] = (1, 4, 4)) -> Samples:
    return Samples(
        "train",
        count,
        read_input=lambda index: np.full(shape, index, dtype=np.float32),
        read_target=None if targets is None else lambda index: np.asarray(targets[index]),
    )


def slices(count: int) -> Samples:
    return samples(count, [np.zeros((4, 4), dtype=np.int64)] * count)


def test_of_slices_several_blocks_are_kept_out_with_a_gap_on_each_side() -> None:
    learnt, kept_out = split(slices(100), 0.2)
    blocks = np.split(kept_out.positions, np.flatnonzero(np.diff(kept_out.positions) > 1) + 1)
    assert [len(block) for block in blocks] == [4] * 5
    nearest = np.abs(np.subtract.outer(learnt.positions, kept_out.positions)).min()
    assert nearest == 3  # two slices lie between
    assert len(learnt) == 100 - 20 - 5 * 2 * 2
    # neither the head nor the tail of the part alone
    assert 0 in learnt.positions
    assert 99 in learnt.positions
    assert [int(block.mean()) // 20 for block in blocks] == [0, 1, 2, 3, 4]


def test_no_ratio_keeps_nothing_out() -> None:
    learnt, kept_out = split(slices(10), 0.0)
    assert (len(learnt), len(kept_out)) == (10, 0)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12, 23])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_few_slices_are_still_learnt_from(count: int, ratio: float) -> None:
    learnt, kept_out = split(slices(count), ratio)
    assert len(kept_out) == max(1, round(ratio * count))
    assert len(learnt) >= 1
    assert not set(learnt.positions) & set(kept_out.positions)


def test_whole_groups_are_kept_out_where_the_data_names_them() -> None:
    found = slices(12)
    object.__setattr__(found, "groups", np.array([7, 7, 3, 3, 3, 9, 9, 9, 9, 1, 1, 1]))
    learnt, kept_out = split(found, 0.25)
    assert list(kept_out.positions) == [5, 6, 7, 8]
    assert list(learnt.positions) == [0, 1, 2, 3, 4, 9, 10, 11]  # no gap: groups do not look alike
    assert len(split(found, 0.5)[1]) >= 6


def test_of_labelled_images_samples_of_every_class_are_kept_out_spread_over_it() -> None:
    labels = np.repeat([0, 1, 2], [8, 4, 1])  # as a zip of image folders has them
    learnt, kept_out = split(samples(13, labels), 0.25)
    assert list(kept_out.positions) == [2, 6, 10]
    assert list(learnt.positions) == [0, 1, 3, 4, 5, 7, 8, 9, 11, 12]  # the class of one sample is learnt from
    inputs, targets = kept_out.take([2])
    assert targets is not None
    assert (float(inputs.mean()), int(targets)) == (10.0, 1)


def test_of_images_with_several_labels_and_of_volumes_samples_are_spread_without_gaps() -> None:
    for found in (samples(20, np.zeros((20, 3), dtype=np.int64)), samples(20, None, shape=(1, 2, 4, 4))):
        learnt, kept_out = split(found, 0.2)
        assert list(kept_out.positions) == [2, 7, 12, 17]
        assert len(learnt) == 16


def test_images_without_labels_have_no_targets() -> None:
    learnt, kept_out = split(samples(30), 0.2)
    assert not learnt.has_targets
    assert learnt.take([0])[1] is None
    assert len(kept_out) == 6


def test_a_single_sample_cannot_be_learnt_from_and_kept_out() -> None:
    with pytest.raises(StageFailed, match="too few to learn from some and keep others out") as caught:
        split(slices(1), 0.1)
    assert caught.value.code == "too_few_samples"
