"""Augmentation: what is named changes, masks go along, and the seed decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.recipe import Augmentation
from worker.augment import Layout, augment, changes

NOTHING = Augmentation(intensity=0, noise=0)
BOTH = Augmentation(flips=["horizontal", "vertical"], intensity=0, noise=0)
ALL = Augmentation(flips=["horizontal", "vertical"], shift_ratio=0.25, intensity=0.2, noise=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(*space: int, samples: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose every pixel has its own number, and the same numbers as masks."""
    masks = torch.arange(samples * int(torch.tensor(space).prod())).reshape(samples, *space)
    return masks[:, None].float(), masks


def test_nothing_named_nothing_changed() -> None:
    inputs, masks = numbered(8, 8)
    assert not changes(NOTHING)
    found = augment(inputs, masks, NOTHING, generator())
    assert found[0] is inputs
    assert found[1] is masks


@pytest.mark.parametrize("augmentation", [BOTH, NOTHING.model_copy(update={"shift_ratio": 0.4})])
@pytest.mark.parametrize("space", [(8, 6), (4, 8, 6)])
def test_masks_move_with_their_images(augmentation: Augmentation, space: tuple[int, ...]) -> None:
    inputs, masks = numbered(*space)
    moved, moved_masks = augment(inputs, masks, augmentation, generator())
    assert changes(augmentation)
    assert not torch.equal(moved, inputs)
    assert moved_masks is not None
    assert torch.equal(moved[:, 0], moved_masks.float())
    assert moved_masks.dtype == masks.dtype


def test_channels_at_the_end_move_as_channels_at_the_front() -> None:
    inputs, masks = numbered(8, 6)
    layout: Layout = "NHWC"
    first, _ = augment(inputs, masks, ALL, generator())
    last, _ = augment(inputs.movedim(1, -1), masks, ALL, generator(), layout)
    assert torch.allclose(last.movedim(-1, 1), first)


def test_labels_stay_as_they_are() -> None:
    inputs, _ = numbered(8, 8)
    labels = torch.arange(16)
    found, kept = augment(inputs, labels, ALL, generator())
    assert kept is not None
    assert torch.equal(kept, labels)
    assert found.shape == inputs.shape


def test_masks_of_several_labels_move_with_their_images_and_several_labels_stay() -> None:
    inputs, masks = numbered(8, 6)
    several = torch.stack([masks, masks + 1, masks + 2], dim=1)  # (n, labels, H, W)
    moved, moved_masks = augment(inputs, several, BOTH.model_copy(update={"shift_ratio": 0.4}), generator())
    assert moved_masks is not None
    assert not torch.equal(moved, inputs)
    for label in range(3):
        assert torch.equal(moved[:, 0] + label, moved_masks[:, label].float())
    labels = torch.eye(16, 3)
    _, kept = augment(inputs, labels, ALL, generator())
    assert kept is not None
    assert torch.equal(kept, labels)


def test_images_without_labels_change_as_those_with_labels() -> None:
    inputs, masks = numbered(8, 6)
    alone, nothing = augment(inputs, None, ALL, generator())
    assert nothing is None
    assert torch.equal(alone, augment(inputs, masks, ALL, generator())[0])


def test_noise_reaches_up_to_its_share_of_the_images_spread() -> None:
    inputs = 50 * torch.randn(100, 1, 32, 32, generator=generator(1))
    found, _ = augment(inputs, None, NOTHING.model_copy(update={"noise": 0.1}), generator())
    shares = (found - inputs).std(dim=(1, 2, 3)) / inputs.std(dim=(1, 2, 3))
    assert float(shares.max()) < 0.11
    assert float(shares.max()) > 0.08
    assert float(shares.min()) < 0.02
    assert abs(float((found - inputs).mean())) < 0.1


@pytest.mark.parametrize(("name", "axis"), [("horizontal", -1), ("vertical", -2)])
def test_a_flip_is_about_the_named_axis_and_half_of_the_samples(name: Any, axis: int) -> None:
    inputs, masks = numbered(4, 6, samples=200)
    found, _ = augment(inputs, masks, NOTHING.model_copy(update={"flips": [name]}), generator())
    flipped = sum(torch.equal(after, before.flip(axis)) for before, after in zip(inputs, found, strict=True))
    kept = sum(torch.equal(after, before) for before, after in zip(inputs, found, strict=True))
    assert flipped + kept == 200
    assert 70 < flipped < 130


def test_a_shift_reaches_as_far_as_it_may_and_repeats_the_border() -> None:
    inputs, masks = numbered(8, 8, samples=100)
    found, _ = augment(inputs, masks, NOTHING.model_copy(update={"shift_ratio": 0.25}), generator())
    offsets = set()
    for before, after in zip(inputs[:, 0], found[:, 0], strict=True):
        rows = [(before == value).nonzero()[0].tolist() for value in (after[4, 4], after[0, 0])]
        offsets.add(rows[0][0] - 4)
        assert rows[1][0] == max(0, rows[0][0] - 4)  # the first row repeats where the image moved down
    assert offsets == {-2, -1, 0, 1, 2}


def test_intensity_changes_scale_and_offset_within_its_reach() -> None:
    inputs = torch.randn(50, 1, 8, 8, generator=generator(1))
    found, _ = augment(inputs, torch.zeros(50, dtype=torch.int64), Augmentation(intensity=0.1, noise=0), generator())
    for before, after in zip(inputs, found, strict=True):
        scale = float(after.std() / before.std())
        offset = float((after - scale * before).mean() / before.std(correction=0))
        assert 0.899 < scale < 1.101
        assert abs(offset) < 0.101
    assert len({round(float(image.std()), 5) for image in found}) == 50


def test_the_seed_decides() -> None:
    inputs, masks = numbered(8, 8)
    noisy = ALL.model_copy(update={"noise": 0.1})
    one, again, other = (augment(inputs, masks, noisy, generator(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_inputs_themselves_are_left_alone() -> None:
    inputs, masks = numbered(8, 8)
    before = inputs.clone()
    augment(inputs, masks, ALL, generator())
    assert torch.equal(inputs, before)
