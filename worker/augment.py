"""Random changes of a batch, as the recipe names them: the same generator state gives the same changes."""

from __future__ import annotations

from typing import Literal

import torch

from shared.recipe import Augmentation

Layout = Literal["NCHW", "NHWC"]


def augment(
    inputs: torch.Tensor,
    targets: torch.Tensor | None,
    augmentation: Augmentation,
    generator: torch.Generator,
    layout: Layout = "NCHW",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each sample changed by itself; masks move with their images, labels stay.

    `inputs` are (n, C, H, W), (n, H, W, C), or volumes with one axis more; `targets` (n,) or (n, labels), or masks
    (n, *space) or (n, labels, *space). Flips and shifts are drawn axis by axis; what a shift uncovers repeats the
    border, in image and mask alike.
    """
    if not changes(augmentation):
        return inputs, targets
    pairs = [
        _change(image, None if targets is None else targets[index], augmentation, generator, layout)
        for index, image in enumerate(inputs)
    ]
    changed = [target for _, target in pairs if target is not None]
    return torch.stack([image for image, _ in pairs]), torch.stack(changed) if changed else None


def changes(augmentation: Augmentation) -> bool:
    """Whether the augmentation changes anything."""
    return bool(augmentation.flips or augmentation.shift_ratio or augmentation.intensity or augmentation.noise)


def _change(
    image: torch.Tensor,
    target: torch.Tensor | None,
    augmentation: Augmentation,
    generator: torch.Generator,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One sample: `image` (C, *space) or (*space, C), `target` () or (labels,), or (*space) or (labels, *space)."""
    first = 1 if layout == "NCHW" else 0  # of the image's axes in space
    space = image.ndim - 1
    for axis, size in enumerate(image.shape[first : first + space]):
        index = _moved(axis, space, size, augmentation, generator)
        if index is None:
            continue
        image = image.index_select(first + axis, index)
        if target is not None and target.ndim >= space:
            target = target.index_select(target.ndim - space + axis, index)
    return _noise(_intensity(image, augmentation.intensity, generator), augmentation.noise, generator), target


def _moved(
    axis: int, space: int, size: int, augmentation: Augmentation, generator: torch.Generator
) -> torch.Tensor | None:
    """Where each position along an axis takes its value from, (size,); None where nothing moves."""
    named = {space - 1: "horizontal", space - 2: "vertical"}.get(axis)
    flipped = named in augmentation.flips and _draw(generator) < 0
    reach = int(augmentation.shift_ratio * size)
    shift = round(_draw(generator) * reach) if reach else 0
    if not flipped and not shift:
        return None
    index = (torch.arange(size) - shift).clamp(0, size - 1)
    return index.flip(0) if flipped else index


def _intensity(image: torch.Tensor, largest: float, generator: torch.Generator) -> torch.Tensor:
    """Scaled about 0, and offset by a share of the image's own spread."""
    if not largest:
        return image
    scale, offset = 1 + largest * _draw(generator), largest * _draw(generator)
    return image * scale + offset * image.std(correction=0)


def _noise(image: torch.Tensor, largest: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise, its standard deviation drawn between 0 and a share of the image's own spread."""
    if not largest:
        return image
    deviation = largest * abs(_draw(generator)) * image.std(correction=0)
    return image + deviation * torch.randn(image.shape, generator=generator)


def _draw(generator: torch.Generator) -> float:
    """Uniform in -1..1."""
    return 2 * float(torch.rand((), generator=generator)) - 1
