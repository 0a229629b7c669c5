"""Whether a data set, as its headers describe it, fits the task: the same sentences at submit and in the workshop."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
    without_labels: Collection[str] = ("calibration",),
) -> None:
    """Hold `inspect_file`'s summary of a data set against the task and the parts that the job reads.

    Raises EvaluationEmpty, CalibrationMissing or DataMismatch. With `preprocessing`, the arrays' layout is held
    against it too; without, either layout is accepted. Parts `without_labels` may lack them.
    """
    if format not in ("safetensors", "zip"):
        raise DataMismatch(f"A data set is a safetensors file or a zip of image folders, not {format}.")
    wanted = sorted(parts)
    if format == "zip" and task.kind == "multilabel":
        _refuse_folders(task, wanted[0])
    if format == "zip":
        for part in wanted:
            _check_folders(summary["parts"].get(part), part, task, part in without_labels)
        return
    shapes = {
        part: _check_arrays(summary["tensors"], part, task, preprocessing, part in without_labels) for part in wanted
    }
    for part, shape in shapes.items():
        if shape[1:] != shapes[wanted[0]][1:]:
            raise DataMismatch(
                f"{part}.images are {shape[1:]} each, but {wanted[0]}.images are {shapes[wanted[0]][1:]}; "
                "all parts must have one shape."
            )


def num_groups(summary: dict[str, Any], format: str, part: str) -> int | None:
    """How many groups, or else samples, a part has, as far as its headers say: None where a tensor of groups says it,
    whose values are not read here, and where the part is missing."""
    if format == "zip":
        found = summary["parts"].get(part)
        if found is None:
            return None
        samples = sum(found["classes"].values()) if "classes" in found else found["images"]
        return int(found.get("groups", samples))
    images = summary["tensors"].get(f"{part}.images")
    grouped = f"{part}.groups" in summary["tensors"]
    return None if images is None or grouped or not images["shape"] else int(images["shape"][0])


def _refuse_folders(task: Task, part: str) -> NoReturn:
    shape = f"(samples, {len(task.classes)}" + (", rows, columns)" if task.target == "masks" else ")")
    raise DataMismatch(
        "A zip of folders says one class of each image or pixel, which is not enough for a multilabel task.",
        hint=f"Send the data as safetensors: {part}.images, and {part}.{task.target} of the shape {shape}, 0 or 1.",
    )


def _check_folders(found: dict[str, Any] | None, part: str, task: Task, without_labels: bool) -> None:
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
    if without_labels and found["masks"] == 0:
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
    tensors: dict[str, Any], part: str, task: Task, preprocessing: Preprocessing | None, without_labels: bool
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
    _check_groups(tensors.get(f"{part}.groups"), shape[0], part)
    target = task.target
    if target is None:
        return shape
    found = tensors.get(f"{part}.{target}")
    if found is None:
        if without_labels:
            return shape
        raise DataMismatch(f"{part} has images but no tensor {part}.{target}.")
    _check_targets(found, shape, part, task, preprocessing)
    return shape


def _check_groups(found: dict[str, Any] | None, samples: int, part: str) -> None:
    if found is None:
        return
    if found["dtype"] not in INTEGERS:
        raise DataMismatch(f"{part}.groups must be integers (a number for each group), not {found['dtype']}.")
    if list(found["shape"]) != [samples]:
        raise DataMismatch(f"{part}.groups must have the shape {[samples]}, one a sample, not {list(found['shape'])}.")


def _check_channels(shape: tuple[int, ...], part: str, preprocessing: Preprocessing) -> None:
    channels = shape[1] if preprocessing.layout == "NCHW" else shape[-1]
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) not in (1, channels):
            raise DataMismatch(
                f"{part}.images have {channels} channels ({preprocessing.layout}), but {name} has {len(values)} values."
            )


def _check_targets(
    found: dict[str, Any], images: tuple[int, ...], part: str, task: Task, preprocessing: Preprocessing | None
) -> None:
    name, shape = f"{part}.{task.target}", tuple(found["shape"])
    if found["dtype"] not in INTEGERS:
        meaning = "0 or 1" if task.kind == "multilabel" else "class indices"
        raise DataMismatch(f"{name} must be integers ({meaning}), not {found['dtype']}.")
    if shape[:1] != images[:1]:
        count = shape[0] if shape else 0
        raise DataMismatch(f"{part}.images has {images[0]} samples, but {name} has {count}.")
    layouts = {"NCHW": images[2:], "NHWC": images[1:-1]}
    sizes = list(layouts.values()) if preprocessing is None else [layouts[preprocessing.layout]]
    rows = (images[0], len(task.classes)) if task.kind == "multilabel" else (images[0],)
    expected = [rows] if task.target == "labels" else [(*rows, *size) for size in sizes]
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
