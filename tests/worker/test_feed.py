"""A batch of several inputs is sliced, padded and kept like one of a single array."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from worker import feed
from worker.engines.batching import in_fixed_batches
from worker.feed import Feed, Floats, Inputs, by_name, padded

IMAGES = np.arange(10, dtype=np.float32).reshape(5, 2)
AGES = np.arange(5, dtype=np.int64)[:, None]
BOTH = Feed(IMAGES, {"age": AGES, "file": AGES * 2})


def test_a_slice_takes_the_same_samples_of_every_input() -> None:
    found = BOTH[1:3]
    assert (len(found), found.shape) == (2, (2, 2))
    np.testing.assert_array_equal(found.images, IMAGES[1:3])
    np.testing.assert_array_equal(found.others["age"], AGES[1:3])


def test_the_images_go_to_the_first_input_by_its_name() -> None:
    assert list(by_name(IMAGES, "pixels")) == ["pixels"]
    assert list(by_name(BOTH, "pixels")) == ["pixels", "age", "file"]


@pytest.mark.parametrize("inputs", [IMAGES, BOTH], ids=["one", "several"])
def test_padding_repeats_the_last_sample(inputs: Inputs) -> None:
    found = by_name(padded(inputs[3:5], 4), "images")
    np.testing.assert_array_equal(found["images"], IMAGES[[3, 4, 4, 4]])
    assert {len(array) for array in found.values()} == {4}
    np.testing.assert_array_equal(by_name(padded(inputs, 5), "images")["images"], IMAGES)


@pytest.mark.parametrize("inputs", [IMAGES, BOTH], ids=["one", "several"])
def test_what_is_kept_is_loaded_whatever_the_names(inputs: Inputs, tmp_path: Path) -> None:
    found = feed.load(feed.save(inputs, tmp_path))
    assert type(found) is type(inputs)
    for name, array in by_name(inputs, "images").items():
        np.testing.assert_array_equal(by_name(found, "images")[name], array)


def test_every_output_of_a_fixed_batch_has_as_many_samples_as_went_in() -> None:
    def run(inputs: Inputs) -> list[Floats]:
        assert len(inputs) == 2
        named = by_name(inputs, "images")
        return [named["images"] * 2, named["age"].astype(np.float32)]

    first, second = in_fixed_batches(run, BOTH, 2)
    np.testing.assert_array_equal(first, IMAGES * 2)
    np.testing.assert_array_equal(second, AGES)
