"""Slices of a brain MRI with tissue masks, made from the files that the nilearn package carries: nothing is downloaded.

The volume is MNI152 (ICBM 2009a, symmetric): the average of 152 registered T1 scans with maps that tell, voxel by
voxel, how probable grey and white matter are. One average head is no clinical data set: it shows that the machinery
works, never that a network is fit for patients.

Neighbouring slices look alike, so the volume is split by slabs of whole slices with a gap between them, never by
drawing slices at random.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

HERE = Path(__file__).parent
CLASSES = ("background", "other", "grey matter", "white matter")
EVALUATION_MM = (0.0, 32.0)  # the evaluation slab in MNI coordinates, from foot to head: ventricles and basal ganglia
GAP_MM = 8.0  # left out on either side of it
LEAST_BRAIN_RATIO = 0.05  # slices with less brain than this are left out
CALIBRATION_EVERY = 2  # every second training slice calibrates
SHOWN = 4  # evaluation slices that are also written as pictures
GRID = 16  # U-Nets halve a slice four times


@dataclass(frozen=True)
class Slices:
    """Axial slices from foot to head, upright: row 0 is the forehead."""

    images: NDArray[np.uint8]  # (N, H, W)
    masks: NDArray[np.uint8]  # (N, H, W), indices into CLASSES
    centres_mm: NDArray[np.float64]  # (N,), MNI z coordinate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "build", help="folder to write to")
    parser.add_argument("--spacing", type=int, default=2, choices=(1, 2, 3, 4), help="edge of a voxel in mm")
    options = parser.parse_args()

    slices = read_slices(options.spacing)
    parts = split(slices.centres_mm, options.spacing)
    write(slices, parts, options.out)
    _, height, width = slices.images.shape
    for part, chosen in parts.items():
        low, high = slices.centres_mm[chosen].min(), slices.centres_mm[chosen].max()
        print(f"{part:<12} {len(chosen):>3} slices of {height} x {width}, z from {low:+.1f} to {high:+.1f} mm")
    print(f"wrote {options.out / 'data.safetensors'} and {SHOWN} evaluation slices beside it")


def read_slices(spacing_mm: int) -> Slices:
    """The volume at `spacing_mm`, as slices that hold some brain."""
    head, head_to_mm = _read_volume("t1")
    grey, _ = _read_volume("gm")
    white, _ = _read_volume("wm")
    head, grey, white = (_coarser(volume, spacing_mm) for volume in (head, grey, white))

    # Skull and skin are already gone from this volume, so whatever is not black is brain.
    masks = (head >= 1).astype(np.uint8)
    masks[grey >= 0.5 * 255] = CLASSES.index("grey matter")
    masks[white >= 0.5 * 255] = CLASSES.index("white matter")

    first, step = head_to_mm[2, 3], head_to_mm[2, 2]
    centres_mm = first + step * (spacing_mm * np.arange(head.shape[2]) + (spacing_mm - 1) / 2)
    kept = (masks > 0).mean(axis=(0, 1)) >= LEAST_BRAIN_RATIO
    images, masks = (_upright(volume)[kept] for volume in (np.rint(head).astype(np.uint8), masks))
    return Slices(images, masks, centres_mm[kept])


def _read_volume(kind: str) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """One of nilearn's MNI152 volumes, 0..255 in RAS order (X, Y, Z), and its affine from voxels to mm."""
    package = find_spec("nilearn")
    if package is None or package.origin is None:
        raise SystemExit("nilearn is not installed: pip install 'burnish[examples]'")
    folder = Path(package.origin).parent / "datasets" / "data"
    image = nibabel.load(folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")
    return np.asarray(image.dataobj, dtype=np.float32), image.affine


def _coarser(volume: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Mean over cubes of `factor` voxels; what does not fill a cube is left out."""
    x, y, z = (length // factor for length in volume.shape)
    cubes = volume[: x * factor, : y * factor, : z * factor].reshape(x, factor, y, factor, z, factor)
    means: NDArray[np.float32] = cubes.mean(axis=(1, 3, 5))
    return means


def _upright(volume: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(X, Y, Z) in RAS order to slices (Z, H, W), forehead at the top, cut at the middle to a multiple of GRID."""
    slices = volume.transpose(2, 1, 0)[:, ::-1]
    height, width = (length // GRID * GRID for length in slices.shape[1:])
    top, left = (slices.shape[1] - height) // 2, (slices.shape[2] - width) // 2
    return np.ascontiguousarray(slices[:, top : top + height, left : left + width])


def split(centres_mm: NDArray[np.float64], spacing_mm: int) -> dict[str, NDArray[np.intp]]:
    """Indices of the slices of each part: evaluation is one slab, training all that lies beyond the gap around it.

    Calibration takes some of the training slices: it reads no masks, and nothing of the evaluation slab.
    """
    low, high = EVALUATION_MM
    half = spacing_mm / 2
    evaluation = (centres_mm - half >= low) & (centres_mm + half <= high)
    train = (centres_mm + half <= low - GAP_MM) | (centres_mm - half >= high + GAP_MM)
    train_indices = np.flatnonzero(train)
    return {
        "train": train_indices,
        "calibration": train_indices[::CALIBRATION_EVERY],
        "evaluation": np.flatnonzero(evaluation),
    }


def write(slices: Slices, parts: dict[str, NDArray[np.intp]], out: Path) -> None:
    """data.safetensors as a job reads it, and some evaluation slices as `burnish predict` reads them."""
    (out / "slices").mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}.images": slices.images[chosen][:, None] for part, chosen in parts.items()}  # (N, 1, H, W)
    tensors |= {f"{part}.masks": slices.masks[chosen] for part, chosen in parts.items() if part != "calibration"}
    save_file(tensors, out / "data.safetensors", metadata={"classes": ", ".join(CLASSES)})

    images, masks = tensors["evaluation.images"], tensors["evaluation.masks"]
    for index in np.linspace(0, len(images) - 1, SHOWN).astype(int):
        name = out / "slices" / f"evaluation_{index:02d}"
        np.save(name.with_suffix(".npy"), images[index])  # (1, H, W), 0..255
        Image.fromarray(images[index, 0]).save(name.with_suffix(".png"))
        Image.fromarray(masks[index]).save(name.with_name(name.name + "_mask.png"))


if __name__ == "__main__":
    main()
