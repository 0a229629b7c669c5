"""Whether a data set, as its headers describe it, fits the task: the same sentences at submit and in the workshop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from shared.errors import CalibrationMissing, DataMismatch, EvaluationEmpty
from shared.recipe import Preprocessing, Task

INTEGERS = frozenset({"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


def check_data(
    summary: dict[str, Any],
    format: str,
    task: Task,
    parts: Iterable[str],
    preprocessing: Preprocessing | None = None,
) -> None:
    """Hold `inspect_file`'s summary of a data set against the task and the parts that the job reads.

    Raises EvaluationEmpty, CalibrationMissing or DataMismatch. With `preprocessing`, the arrays' layout is held
    against it too; without, either layout is accepted.
    """
    if format not in ("safetensors", "zip"):
        raise DataMismatch(f"A data set is a safetensors file or a zip of image folders, not {format}.")
    wanted = sorted(parts)
    if format == "zip":
        for part in wanted:
            _check_folders(summary["parts"].get(part), part, task)
        return
    shapes = {part: _check_arrays(summary["tensors"], part, task, preprocessing) for part in wanted}
    for part, shape in shapes.items():
        if shape[1:] != shapes[wanted[0]][1:]:
            raise DataMismatch(
                f"{part}.images are {shape[1:]} each, but {wanted[0]}.images are {shapes[wanted[0]][1:]}; "
                "all parts must have one shape."
            )


def _check_folders(found: dict[str, Any] | None, part: str, task: Task) -> None:
    if found is None:
        _missing(part, f"the folder {part}/")
    if task.kind == "classification":
        _check_class_folders(found, part, task)
        return
    if task.kind == "raw":
        if found.get("images") == 0:
            _missing(part, f"images in {part}/images/")
        return
    if "classes" in found:
        folders = _few(found["classes"])
        raise DataMismatch(f"A segmentation's part {part!r} has the folders images and masks, not {folders}.")
    if found["images"] == 0:
        _missing(part, f"images in {part}/images/")
    if part == "calibration" and found["masks"] == 0:
        return
    if found["masks"] != found["images"] or found["unmatched"]:
        names = f"; without a partner: {', '.join(found['unmatched'])}" if found["unmatched"] else ""
        raise DataMismatch(f"{part} has {found['images']} images but {found['masks']} masks of the same names{names}.")


def _check_class_folders(found: dict[str, Any], part: str, task: Task) -> None:
    if "classes" not in found:
        raise DataMismatch(f"A classification's part {part!r} has one folder a class, not images and masks.")
    unknown = [name for name in found["classes"] if name not in task.classes]
    if unknown:
        raise DataMismatch(f"{part} has folders that are no class of the task: {_few(unknown)}.")


def _check_arrays(
    tensors: dict[str, Any], part: str, task: Task, preprocessing: Preprocessing | None
) -> tuple[int, ...]:
    """Shape of the part's images, if they and their targets fit the task."""
    images = tensors.get(f"{part}.images")
    if images is None:
        _missing(part, f"the tensor {part}.images")
    shape = tuple(images["shape"])
    if len(shape) not in (4, 5):
        raise DataMismatch(
            f"{part}.images need 4 dimensions (samples, channels, rows, columns), or 5 (samples, channels, planes, "
            f"rows, columns), not {len(shape)}."
        )
    if shape[0] == 0:
        _missing(part, f"samples in {part}.images")
    if 0 in shape:
        raise DataMismatch(f"{part}.images have an empty dimension: {list(shape)}.")
    if preprocessing is not None:
        _check_channels(shape, part, preprocessing)
    target = task.target
    if target is None:
        return shape
    found = tensors.get(f"{part}.{target}")
    if found is None:
        if part == "calibration":
            return shape
        raise DataMismatch(f"{part} has images but no tensor {part}.{target}.")
    _check_targets(found, shape, part, target, preprocessing)
    return shape


def _check_channels(shape: tuple[int, ...], part: str, preprocessing: Preprocessing) -> None:
    channels = shape[1] if preprocessing.layout == "NCHW" else shape[-1]
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) not in (1, channels):
            raise DataMismatch(
                f"{part}.images have {channels} channels ({preprocessing.layout}), but {name} has {len(values)} values."
            )


def _check_targets(
    found: dict[str, Any], images: tuple[int, ...], part: str, target: str, preprocessing: Preprocessing | None
) -> None:
    name, shape = f"{part}.{target}", tuple(found["shape"])
    if found["dtype"] not in INTEGERS:
        raise DataMismatch(f"{name} must be integers (class indices), not {found['dtype']}.")
    if shape[:1] != images[:1]:
        count = shape[0] if shape else 0
        raise DataMismatch(f"{part}.images has {images[0]} samples, but {name} has {count}.")
    layouts = {"NCHW": images[2:], "NHWC": images[1:-1]}
    sizes = list(layouts.values()) if preprocessing is None else [layouts[preprocessing.layout]]
    expected = [(images[0],)] if target == "labels" else [(images[0], *size) for size in sizes]
    if shape not in expected:
        raise DataMismatch(f"{name} must have the shape {list(expected[0])} to match {part}.images, not {list(shape)}.")


def _missing(part: str, what: str) -> NoReturn:
    if part == "evaluation":
        raise EvaluationEmpty(
            f"The data set has no evaluation samples: it lacks {what}. Nothing that is built could be checked."
        )
    if part == "calibration":
        raise CalibrationMissing(f"Static int8 quantization needs calibration data: the data set lacks {what}.")
    raise DataMismatch(f"The job reads the part {part!r}, and the data set lacks {what}.")


def _few(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(map(repr, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
