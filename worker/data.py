"""A part of the data set as network input: read on demand, preprocessed, in a fixed order, in bounded memory."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from PIL import Image, UnidentifiedImageError

from shared.datasets import check_data
from shared.errors import DataMismatch, StageFailed
from shared.formats import CLUTTER, inspect_file
from shared.recipe import Data, Preprocessing, Task
from worker.feed import Array, Feed, Floats, Inputs

Indices = npt.NDArray[np.int64]

MAX_PIXELS = 8192 * 8192


@dataclass(frozen=True)
class Samples:
    """One part: images in the network's layout, `targets` as class indices, or 0 and 1 of several labels, by position.

    `read_others` give what the network's other inputs take, by their names. `groups` say which samples belong together,
    as those of one patient do: a number for each sample, or None where the data set does not say.
    """

    part: str
    num_samples: int
    read_input: Callable[[int], Floats]
    read_target: Callable[[int], Indices] | None
    read_others: Mapping[str, Callable[[int], Array]] = field(default_factory=dict)
    groups: Sequence[int] | None = None

    def __len__(self) -> int:
        return self.num_samples

    def inputs(self, start: int, stop: int) -> Floats:
        """Images, float32 (n, C, [D,] H, W) or with C at the end. Raises StageFailed."""
        return self.take(range(start, min(stop, len(self))))

    def targets(self, start: int, stop: int) -> Indices | None:
        """Class indices, int64: (n,) labels or (n, [D,] H, W) masks; of a multilabel task 0 and 1, (n, labels) or
        (n, labels, [D,] H, W). None where the part has none."""
        if self.read_target is None:
            return None
        return np.stack([self.read_target(index) for index in range(start, min(stop, len(self)))])

    def take(self, indices: Sequence[int]) -> Floats:
        """Images at the given positions, as `inputs` gives them."""
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

    def feed(self, indices: Sequence[int]) -> Inputs:
        """All that the network takes, at the given positions: the images alone where it has one input."""
        images = self.take(indices)
        if not self.read_others:
            return images
        return Feed(images, {name: self._stack(name, indices) for name in self.read_others})

    def batches(self, size: int) -> Iterator[tuple[Inputs, Indices | None]]:
        """What the network takes, and targets, `size` samples at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield self.feed(range(start, stop)), self.targets(start, stop)

    def check(self, indices: Sequence[int]) -> None:
        """Read the samples at the given positions, one at a time, to raise what `feed` would."""
        shapes: dict[tuple[int, ...], int] = {}
        for index in indices:
            shapes.setdefault(self._finite(index).shape, index)
            if len(shapes) > 1:
                self.take(list(shapes.values()))
            for name in self.read_others:
                self._stack(name, [index])

    def draw(self, num_samples: int, seed: int) -> list[int]:
        """Positions of `num_samples` samples drawn by the seed, in order; all where there are fewer."""
        drawn = np.random.default_rng(seed).permutation(len(self))[:num_samples]
        return [int(index) for index in np.sort(drawn)]

    def spread(self, num_samples: int) -> list[int]:
        """Positions of `num_samples` samples, evenly spaced over the part."""
        count = min(num_samples, len(self))
        return [index * len(self) // count for index in range(count)]

    def _finite(self, index: int) -> Floats:
        found = self.read_input(index)
        if not np.isfinite(found).all():
            raise StageFailed(f"Image {index} of {self.part} has NaN or infinite values.", code="data_not_finite")
        return found

    def _stack(self, name: str, indices: Sequence[int]) -> Array:
        found = np.stack([self.read_others[name](index) for index in indices])
        if not np.isfinite(found).all():
            raise StageFailed(f"{self.part}.{name} has NaN or infinite values.", code="data_not_finite")
        return found


def open_samples(
    path: Path, format: str, part: str, data: Data, task: Task, others: Sequence[str] = ()
) -> Samples:
    """The data set's part by name; `others` are the network's inputs beside the images.

    Raises what `inspect_file` and `check_data` raise, DataMismatch, and StageFailed.
    """
    with path.open("rb") as file:
        summary = inspect_file(file, path.stat().st_size, format)
    without_labels = ("calibration", "train")  # a training that needs labels asks for them itself
    check_data(summary, format, task, [part], data.preprocessing, without_labels)
    if format == "safetensors":
        return _open_arrays(path, summary["tensors"], part, data.preprocessing, task, others)
    if others:
        raise DataMismatch(
            f"The network has the inputs {', '.join(others)} beside the images, which a zip of images does not hold.",
            hint="Send the data as safetensors, with a tensor for each; or give them as source.constants.",
        )
    return _open_images(path, part, data.preprocessing, task)


# ---------------------------------------------------------------- safetensors


def _open_arrays(
    path: Path, tensors: dict[str, Any], part: str, preprocessing: Preprocessing, task: Task, others: Sequence[str]
) -> Samples:
    """Arrays in a memory-mapped file: a sample is read when it is asked for."""
    file: Any = safetensors.safe_open(path, framework="pt")
    images, count = file.get_slice(f"{part}.images"), tensors[f"{part}.images"]["shape"][0]
    name = f"{part}.{task.target}"
    targets = file.get_slice(name) if name in tensors else None

    def read_input(index: int) -> Floats:
        stored: torch.Tensor = images[index : index + 1]
        return normalize(stored[0].to(torch.float32).numpy(), preprocessing)

    def read_target(index: int) -> Indices:
        assert targets is not None
        stored: torch.Tensor = targets[index : index + 1]
        return in_range(stored[0].to(torch.int64).numpy(), task, f"{name}[{index}]")

    if targets is not None and task.target == "labels":
        in_range(targets[:].to(torch.int64).numpy(), task, name)
    for other in others:
        _check_other(tensors.get(f"{part}.{other}"), f"{part}.{other}", count)
    read_others = {other: _reader(file.get_slice(f"{part}.{other}")) for other in others}
    groups = file.get_tensor(f"{part}.groups").tolist() if f"{part}.groups" in tensors else None
    return Samples(part, count, read_input, None if targets is None else read_target, read_others, groups)


def _check_other(found: dict[str, Any] | None, name: str, count: int) -> None:
    if found is None:
        raise DataMismatch(
            f"The data set lacks the tensor {name}, which an input of the network takes.",
            hint="Add it, one row a sample; or give the input a value in source.constants.",
        )
    if found["shape"][:1] != [count]:
        raise DataMismatch(f"{name} has the shape {found['shape']}, but the part has {count} samples.")


def _reader(stored: Any) -> Callable[[int], Array]:
    """Reads a sample as the two types that a network's other inputs have: real numbers as float32, or int64."""

    def read(index: int) -> Array:
        found: torch.Tensor = stored[index : index + 1][0]
        return found.to(torch.float32 if found.is_floating_point() else torch.int64).numpy()

    return read


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
    elif task.kind == "raw":
        images, masks = sorted(name for name in names if name.split("/")[1] != "masks"), {}
    else:
        images = sorted(name for name in names if name.split("/")[1] == "images")
        masks = {_partner(name): name for name in names if name.split("/")[1] == "masks"}

    def read_input(index: int) -> Floats:
        return normalize(pixels(_decode(archive, images[index]), preprocessing), preprocessing)

    def read_label(index: int) -> Indices:
        return np.asarray(task.classes.index(images[index].split("/")[1]), dtype=np.int64)

    def read_mask(index: int) -> Indices:
        name = masks[_partner(images[index])]
        image, mask = _decode(archive, images[index]), _decode(archive, name)
        if mask.size != image.size:
            raise StageFailed(f"{name} is {mask.size}, but its image is {image.size}.", code="data_mismatch")
        return in_range(_class_indices(mask, preprocessing, name), task, name)

    read_target = read_label if task.kind == "classification" else read_mask if masks else None
    return Samples(part, len(images), read_input, read_target, groups=_group_numbers(images))


def _partner(name: str) -> str:
    """What an image and its mask have in common: the path below images or masks, without the suffix."""
    return str(PurePosixPath(*PurePosixPath(name).parts[2:]).with_suffix(""))


def _group_numbers(images: Sequence[str]) -> list[int] | None:
    """The group of each image, <part>/<folder>/<group>/<file>, as a number; None where there are no such folders."""
    folders = [PurePosixPath(name).parts[2:-1] for name in images]
    if not any(folders):
        return None
    numbers = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return [numbers[folder] for folder in folders]


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
    image = _resized(image, preprocessing, Image.Resampling[preprocessing.interpolation.upper()])
    pixels = np.asarray(image, dtype=np.float32)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels  # (H, W, C)
    return pixels if preprocessing.layout == "NHWC" else pixels.transpose(2, 0, 1)


def _class_indices(mask: Image.Image, preprocessing: Preprocessing, name: str) -> Indices:
    if mask.mode not in ("1", "L", "P", "I", "I;16"):
        raise StageFailed(f"{name} is {mask.mode}; a mask has one channel of class indices.", code="data_mismatch")
    return np.asarray(_resized(mask, preprocessing, Image.Resampling.NEAREST)).astype(np.int64)


def _resized(image: Image.Image, preprocessing: Preprocessing, method: Image.Resampling) -> Image.Image:
    """The image in the size that the network takes; with a crop ratio its shape is kept and its edges are cut."""
    if preprocessing.size is None:
        return image
    height, width = preprocessing.size
    if preprocessing.crop_ratio is None:
        return image if image.size == (width, height) else image.resize((width, height), method)
    covered = round(width / preprocessing.crop_ratio), round(height / preprocessing.crop_ratio)
    factor = max(covered[0] / image.width, covered[1] / image.height)
    sides = max(covered[0], int(image.width * factor)), max(covered[1], int(image.height * factor))
    left, top = round((sides[0] - width) / 2), round((sides[1] - height) / 2)
    return image.resize(sides, method).crop((left, top, left + width, top + height))


# ---------------------------------------------------------------- both


def normalize(stored: npt.NDArray[Any], preprocessing: Preprocessing) -> Floats:
    """(value * scale - mean) / std, channel by channel; one sample (C, [D,] H, W) or ([D,] H, W, C) in and out."""
    spatial = (1,) * (stored.ndim - 1)
    axis = (-1, *spatial) if preprocessing.layout == "NCHW" else (*spatial, -1)
    mean = np.asarray(preprocessing.mean, dtype=np.float32).reshape(axis)
    std = np.asarray(preprocessing.std, dtype=np.float32).reshape(axis)
    found = (np.asarray(stored, dtype=np.float32) * np.float32(preprocessing.scale) - mean) / std
    return np.ascontiguousarray(found, dtype=np.float32)


def in_range(found: Indices, task: Task, name: str) -> Indices:
    """The class indices, if every one is a class of the task; of a multilabel task 0 and 1. Raises StageFailed."""
    low, high = int(found.min()), int(found.max())
    if task.kind == "multilabel" and (low < 0 or high > 1):
        raise StageFailed(
            f"{name} holds {low if low < 0 else high}, but of a multilabel task it is 0 or 1.", code="data_mismatch"
        )
    if task.kind != "multilabel" and (low < 0 or high >= len(task.classes)):
        wrong = low if low < 0 else high
        last = len(task.classes) - 1
        raise StageFailed(f"{name} holds class {wrong}, but the classes are 0 to {last}.", code="data_mismatch")
    return found
