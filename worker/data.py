"""A part of the data set as network input: read on demand, preprocessed, in a fixed order, in bounded memory."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from PIL import Image, UnidentifiedImageError

from shared.datasets import check_data
from shared.errors import StageFailed
from shared.formats import CLUTTER, inspect_file
from shared.recipe import Data, Preprocessing, Task

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

MAX_PIXELS = 8192 * 8192


@dataclass(frozen=True)
class Samples:
    """One part: `inputs` in the network's layout, `targets` as class indices, by position."""

    part: str
    num_samples: int
    read_input: Callable[[int], Floats]
    read_target: Callable[[int], Indices] | None

    def __len__(self) -> int:
        return self.num_samples

    def inputs(self, start: int, stop: int) -> Floats:
        """Network inputs, float32 (n, C, H, W) or (n, H, W, C). Raises StageFailed: data_not_finite, data_mismatch."""
        return self.take(range(start, min(stop, len(self))))

    def targets(self, start: int, stop: int) -> Indices | None:
        """Class indices, int64: (n,) labels or (n, H, W) masks; None where the part has none."""
        if self.read_target is None:
            return None
        return np.stack([self.read_target(index) for index in range(start, min(stop, len(self)))])

    def take(self, indices: Sequence[int]) -> Floats:
        """Inputs at the given positions, as `inputs` gives them."""
        found = [self._finite(index) for index in indices]
        shapes = {array.shape for array in found}
        if len(shapes) > 1:
            sizes = ", ".join(str(list(shape)) for shape in sorted(shapes)[:3])
            raise StageFailed(
                f"The images of {self.part} differ in size: {sizes}.",
                hint="Give preprocessing.size, and images are resized to it.",
                code="data_mismatch",
            )
        return np.stack(found)

    def batches(self, size: int) -> Iterator[tuple[Floats, Indices | None]]:
        """Inputs and targets, `size` samples at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.inputs(start, start + size), self.targets(start, start + size)

    def spread(self, num_samples: int) -> list[int]:
        """Positions of `num_samples` samples, evenly spaced over the part."""
        count = min(num_samples, len(self))
        return [index * len(self) // count for index in range(count)]

    def _finite(self, index: int) -> Floats:
        found = self.read_input(index)
        if not np.isfinite(found).all():
            raise StageFailed(f"Image {index} of {self.part} has NaN or infinite values.", code="data_not_finite")
        return found


def open_samples(path: Path, format: str, part: str, data: Data, task: Task) -> Samples:
    """The data set's part by name. Raises what `inspect_file` and `check_data` raise, and StageFailed."""
    with path.open("rb") as file:
        summary = inspect_file(file, path.stat().st_size, format)
    check_data(summary, format, task, [part], data.preprocessing)
    if format == "safetensors":
        return _open_arrays(path, summary["tensors"], part, data.preprocessing, task)
    return _open_images(path, part, data.preprocessing, task)


# ---------------------------------------------------------------- safetensors


def _open_arrays(path: Path, tensors: dict[str, Any], part: str, preprocessing: Preprocessing, task: Task) -> Samples:
    """Arrays in a memory-mapped file: a sample is read when it is asked for."""
    file: Any = safetensors.safe_open(path, framework="pt")
    images = file.get_slice(f"{part}.images")
    name = f"{part}.labels" if task.kind == "classification" else f"{part}.masks"
    targets = file.get_slice(name) if name in tensors else None

    def read_input(index: int) -> Floats:
        stored: torch.Tensor = images[index : index + 1]
        return normalize(stored[0].to(torch.float32).numpy(), preprocessing)

    def read_target(index: int) -> Indices:
        assert targets is not None
        stored: torch.Tensor = targets[index : index + 1]
        return in_range(stored[0].to(torch.int64).numpy(), task, f"{name}[{index}]")

    if targets is not None and task.kind == "classification":
        in_range(targets[:].to(torch.int64).numpy(), task, name)
    return Samples(part, tensors[f"{part}.images"]["shape"][0], read_input, None if targets is None else read_target)


# ---------------------------------------------------------------- zip


def _open_images(path: Path, part: str, preprocessing: Preprocessing, task: Task) -> Samples:
    """Images in an archive, decoded when they are asked for."""
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if name.startswith(f"{part}/") and not name.endswith("/")]
    names = [name for name in names if not CLUTTER & set(name.split("/"))]
    if task.kind == "classification":
        # sorted by file name first, so that any stretch of the part holds many classes
        images = sorted(names, key=lambda name: (PurePosixPath(name).name, name))
        masks: dict[str, str] = {}
    else:
        images = sorted(name for name in names if name.split("/")[1] == "images")
        masks = {PurePosixPath(name).stem: name for name in names if name.split("/")[1] == "masks"}

    def read_input(index: int) -> Floats:
        return normalize(pixels(_decode(archive, images[index]), preprocessing), preprocessing)

    def read_label(index: int) -> Indices:
        return np.asarray(task.classes.index(images[index].split("/")[1]), dtype=np.int64)

    def read_mask(index: int) -> Indices:
        name = masks[PurePosixPath(images[index]).stem]
        image, mask = _decode(archive, images[index]), _decode(archive, name)
        if mask.size != image.size:
            raise StageFailed(f"{name} is {mask.size}, but its image is {image.size}.", code="data_mismatch")
        return in_range(_class_indices(mask, preprocessing, name), task, name)

    if task.kind == "classification":
        return Samples(part, len(images), read_input, read_label)
    return Samples(part, len(images), read_input, read_mask if masks else None)


def _decode(archive: zipfile.ZipFile, name: str) -> Image.Image:
    try:
        return decode(archive.read(name), name)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise StageFailed(f"{name} cannot be read: {error}", code="data_mismatch") from error


def decode(content: bytes, name: str) -> Image.Image:
    """One PNG, JPEG, BMP or TIFF image, decoded. Raises StageFailed, OSError."""
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "BMP", "TIFF"))
    except UnidentifiedImageError:
        raise StageFailed(f"{name} is not a PNG, JPEG, BMP or TIFF image.", code="data_mismatch") from None
    if image.width * image.height > MAX_PIXELS:
        raise StageFailed(f"{name} has more than {MAX_PIXELS} pixels: {image.size}.", code="data_mismatch")
    image.load()
    return image


def pixels(image: Image.Image, preprocessing: Preprocessing) -> Floats:
    """The image resized, with the channels that the network takes: float32 (C, H, W) or (H, W, C)."""
    if preprocessing.channels == 3:
        image = image.convert("RGB")
    elif image.mode in ("I", "I;16", "I;16B", "F"):
        image = image.convert("F")  # more than 8 bits a pixel: kept
    else:
        image = image.convert("L")
    if preprocessing.size is not None and image.size != preprocessing.size[::-1]:
        image = image.resize(preprocessing.size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels  # (H, W, C)
    return pixels if preprocessing.layout == "NHWC" else pixels.transpose(2, 0, 1)


def _class_indices(mask: Image.Image, preprocessing: Preprocessing, name: str) -> Indices:
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        raise StageFailed(f"{name} is {mask.mode}; a mask has one channel of class indices.", code="data_mismatch")
    if preprocessing.size is not None and mask.size != preprocessing.size[::-1]:
        mask = mask.resize(preprocessing.size[::-1], Image.Resampling.NEAREST)
    return np.asarray(mask).astype(np.int64)


# ---------------------------------------------------------------- both


def normalize(stored: npt.NDArray[Any], preprocessing: Preprocessing) -> Floats:
    """(value * scale - mean) / std, channel by channel; one sample (C, H, W) or (H, W, C) in, float32 out."""
    axis = (-1, 1, 1) if preprocessing.layout == "NCHW" else (1, 1, -1)
    mean = np.asarray(preprocessing.mean, dtype=np.float32).reshape(axis)
    std = np.asarray(preprocessing.std, dtype=np.float32).reshape(axis)
    found = (np.asarray(stored, dtype=np.float32) * np.float32(preprocessing.scale) - mean) / std
    return np.ascontiguousarray(found, dtype=np.float32)


def in_range(found: Indices, task: Task, name: str) -> Indices:
    """The class indices, if every one is a class of the task."""
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= len(task.classes):
        wrong = low if low < 0 else high
        last = len(task.classes) - 1
        raise StageFailed(f"{name} holds class {wrong}, but the classes are 0 to {last}.", code="data_mismatch")
    return found
