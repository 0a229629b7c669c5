"""Blocks of MNI152 (nilearn) with tissue masks, split by slabs from the back of the head to its front.

The template is symmetric, so the left never stands on one side of the split and the right on the other: each slab
holds both, and gaps of 6 mm lie between the slabs.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from benchmarks.foreign.pictures import Pictures

SLABS = {"train": ((12, 60), (104, 142), (186, 226)), "evaluation": ((66, 98),), "unseen": ((148, 180),)}  # mm, y
BLOCK = (32, 48, 48)  # y, x, z
STARTS = ((15, 40, 74, 108, 134), (6, 38, 70, 102))  # of the blocks, x and z
LEAST_BRAIN_RATIO = 0.15
NUM_CALIBRATION = 24
CLASSES = ("background", "other", "grey matter", "white matter")
LABELS = ("grey matter", "white matter", "fluid")


@cache
def _volumes() -> dict[str, npt.NDArray[np.uint8]]:
    """T1, grey and white matter as they are stored, 0..255, as (y, x, z) at 1 mm."""
    package = find_spec("nilearn")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "datasets" / "data"
    found = {}
    for kind in ("t1", "gm", "wm"):
        image = nibabel.load(folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")
        stored = np.rint(np.asarray(image.dataobj, dtype=np.float32)).astype(np.uint8)
        found[kind] = np.ascontiguousarray(stored.transpose(1, 0, 2))
    return found


@cache
def classes() -> npt.NDArray[np.uint8]:
    """One class a voxel, (y, x, z): background, other brain, grey matter, white matter."""
    volumes = _volumes()
    found = (volumes["t1"] >= 1).astype(np.uint8)
    found[volumes["gm"] >= 128] = 2
    found[volumes["wm"] >= 128] = 3
    return found


@cache
def labels() -> npt.NDArray[np.uint8]:
    """Three labels a voxel, (3, y, x, z): grey matter, white matter, and the fluid that is the rest of the brain."""
    volumes = _volumes()
    grey, white = volumes["gm"].astype(np.int16), volumes["wm"].astype(np.int16)
    fluid = (volumes["t1"] >= 1) & (255 - grey - white >= 128)
    return np.stack([grey >= 128, white >= 128, fluid]).astype(np.uint8)


def blocks(part: str, several_labels: bool) -> Pictures:
    """Blocks (N, 1, 32, 48, 48) of one part, with masks (N, 32, 48, 48), or (N, 3, 32, 48, 48) of several labels."""
    if part == "calibration":
        return training_blocks(np.random.default_rng(5), NUM_CALIBRATION, BLOCK, several_labels)
    ((start, _),) = SLABS[part]
    corners = [(start, x, z) for x in STARTS[0] for z in STARTS[1]]
    return _cut([corner for corner in corners if _brain_ratio(corner, BLOCK) >= LEAST_BRAIN_RATIO], several_labels)


def training_blocks(random: np.random.Generator, count: int, block: tuple[int, ...], several_labels: bool) -> Pictures:
    """Blocks drawn at random from the training slabs."""
    corners: list[tuple[int, ...]] = []
    while len(corners) < count:
        first, last = SLABS["train"][random.integers(len(SLABS["train"]))]
        sides = classes().shape[1:]
        corner = (
            int(random.integers(first, last - block[0] + 1)),
            *(int(random.integers(side - length + 1)) for side, length in zip(sides, block[1:], strict=True)),
        )
        if _brain_ratio(corner, block) >= LEAST_BRAIN_RATIO:
            corners.append(corner)
    return _cut(corners, several_labels, block)


def _brain_ratio(corner: tuple[int, ...], block: tuple[int, ...]) -> float:
    return float((_piece(_volumes()["t1"], corner, block) >= 1).mean())


def _cut(corners: list[tuple[int, ...]], several_labels: bool, block: tuple[int, ...] = BLOCK) -> Pictures:
    truth = labels() if several_labels else classes()
    images = np.stack([_piece(_volumes()["t1"], corner, block)[None] for corner in corners])
    return Pictures(images, np.stack([_piece(truth, corner, block) for corner in corners]))


def _piece(volume: npt.NDArray[Any], corner: tuple[int, ...], block: tuple[int, ...]) -> npt.NDArray[Any]:
    y, x, z = (slice(start, start + length) for start, length in zip(corner, block, strict=True))
    return volume[..., y, x, z]
