"""One preprocessed sample as a picture: what the network sees, so that a person can see whether preprocessing fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from shared.recipe import Preprocessing
from worker.data import Samples

MIN_SIDE, MAX_SIDE = 192, 512  # pixels of the picture's longer side


def write_preview(samples: Samples, preprocessing: Preprocessing, path: Path) -> None:
    """The first sample, its range stretched over black to white; of a volume the middle plane."""
    image = samples.inputs(0, 1)[0]  # (C, [D,] H, W) or ([D,] H, W, C)
    if preprocessing.layout == "NHWC":
        image = np.moveaxis(image, -1, 0)
    while image.ndim > 3:
        image = image[:, image.shape[1] // 2]
    low, high = np.percentile(image, (0.5, 99.5))
    pixels = np.clip((image - low) / max(float(high - low), 1e-12) * 255, 0, 255).astype(np.uint8)  # (C, H, W)
    picture = _picture(pixels)
    factor = _factor(max(picture.size))
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BILINEAR).save(path)


def _picture(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    if len(pixels) == 3:
        return Image.fromarray(np.moveaxis(pixels, 0, -1))
    return Image.fromarray(pixels[0])


def _factor(side: int) -> float:
    if side < MIN_SIDE:
        return float(-(-MIN_SIDE // side))
    return min(1.0, MAX_SIDE / side)
