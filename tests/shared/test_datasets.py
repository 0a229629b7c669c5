"""A data set that does not fit its task is refused with the sentence that says where."""

from __future__ import annotations

from typing import Any

import pytest

from shared.datasets import check_data, num_groups
from shared.errors import CalibrationMissing, DataMismatch, EvaluationEmpty
from shared.recipe import Preprocessing, Task

DIGITS = Task(kind="classification", classes=["zero", "one"])
TISSUES = Task(kind="segmentation", classes=["air", "tissue"], background=0)


def arrays(**shapes: tuple[str, list[int]]) -> dict[str, Any]:
    named = {name.replace("_", "."): {"dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()}
    return {"tensors": named}


def folders(**parts: dict[str, Any]) -> dict[str, Any]:
    return {"parts": parts}


SEGMENTED = arrays(
    evaluation_images=("F32", [5, 1, 32, 40]),
    evaluation_masks=("U8", [5, 32, 40]),
    calibration_images=("F32", [3, 1, 32, 40]),
)
CLASSIFIED = arrays(evaluation_images=("U8", [5, 3, 32, 32]), evaluation_labels=("I64", [5]))


def test_data_that_fits_passes() -> None:
    check_data(SEGMENTED, "safetensors", TISSUES, ["evaluation", "calibration"])
    check_data(CLASSIFIED, "safetensors", DIGITS, ["evaluation"])
    check_data(folders(evaluation={"classes": {"zero": 3}}), "zip", DIGITS, ["evaluation"])
    check_data(folders(evaluation={"images": 2, "masks": 2, "unmatched": []}), "zip", TISSUES, ["evaluation"])
    check_data(folders(calibration={"images": 2, "masks": 0, "unmatched": []}), "zip", TISSUES, ["calibration"])


@pytest.mark.parametrize(("part", "error"), [
    ("evaluation", EvaluationEmpty), ("calibration", CalibrationMissing), ("train", DataMismatch),
])  # fmt: skip
def test_a_missing_part_has_its_own_error(part: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"{part}\.images"):
        check_data(arrays(), "safetensors", TISSUES, [part])
    with pytest.raises(error, match=f"{part}/"):
        check_data(folders(), "zip", TISSUES, [part])


def test_a_part_without_samples_is_missing() -> None:
    empty = arrays(evaluation_images=("F32", [0, 1, 8, 8]), evaluation_masks=("U8", [0, 8, 8]))
    with pytest.raises(EvaluationEmpty):
        check_data(empty, "safetensors", TISSUES, ["evaluation"])
    with pytest.raises(EvaluationEmpty):
        check_data(folders(evaluation={"images": 0, "masks": 0, "unmatched": []}), "zip", TISSUES, ["evaluation"])


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        (("U8", [5, 40, 32]), r"must have the shape \[5, 32, 40\]"),
        (("U8", [5, 1, 32, 40]), r"must have the shape \[5, 32, 40\]"),
        (("U8", [4, 32, 40]), "has 5 samples, but evaluation.masks has 4"),
        (("U8", []), "has 5 samples, but evaluation.masks has 0"),
        (("F32", [5, 32, 40]), "must be integers"),
    ],
)
def test_masks_that_do_not_match_their_images_are_refused(masks: tuple[str, list[int]], told: str) -> None:
    found = arrays(evaluation_images=("F32", [5, 1, 32, 40]), evaluation_masks=masks)
    with pytest.raises(DataMismatch, match=told):
        check_data(found, "safetensors", TISSUES, ["evaluation"])


@pytest.mark.parametrize(
    ("labels", "told"),
    [(("F32", [5]), "must be integers"), (("I64", [4]), "5 samples"), (("I64", [5, 2]), r"the shape \[5\]")],
)
def test_labels_that_do_not_match_their_images_are_refused(labels: tuple[str, list[int]], told: str) -> None:
    found = arrays(evaluation_images=("F32", [5, 1, 8, 8]), evaluation_labels=labels)
    with pytest.raises(DataMismatch, match=told):
        check_data(found, "safetensors", DIGITS, ["evaluation"])


FINDINGS = Task(kind="multilabel", classes=["nodule", "effusion", "mass"])
ORGANS = Task(kind="multilabel", classes=["organ", "lesion", "vessel"], per="voxel")


def test_several_labels_have_a_column_each() -> None:
    images = ("F32", [5, 1, 8, 9])
    of_images = arrays(evaluation_images=images, evaluation_labels=("BOOL", [5, 3]))
    of_voxels = arrays(evaluation_images=images, evaluation_masks=("U8", [5, 3, 8, 9]))
    check_data(of_images, "safetensors", FINDINGS, ["evaluation"])
    check_data(of_voxels, "safetensors", ORGANS, ["evaluation"])


@pytest.mark.parametrize(
    ("task", "stored", "told"),
    [
        (FINDINGS, ("I64", [5]), r"labels must have the shape \[5, 3\]"),
        (FINDINGS, ("I64", [5, 2]), r"labels must have the shape \[5, 3\]"),
        (FINDINGS, ("F32", [5, 3]), r"integers \(0 or 1\), not F32"),
        (ORGANS, ("U8", [5, 8, 9]), r"masks must have the shape \[5, 3, 8, 9\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(task: Task, stored: tuple[str, list[int]], told: str) -> None:
    found = arrays(evaluation_images=("F32", [5, 1, 8, 9]), **{f"evaluation_{task.target}": stored})
    with pytest.raises(DataMismatch, match=told):
        check_data(found, "safetensors", task, ["evaluation"])


@pytest.mark.parametrize(("task", "shape"), [(FINDINGS, "(samples, 3)"), (ORGANS, "(samples, 3, rows, columns)")])
def test_a_zip_of_a_multilabel_task_is_refused_with_what_to_send(task: Task, shape: str) -> None:
    with pytest.raises(DataMismatch, match="not enough for a multilabel task") as refused:
        check_data(folders(evaluation={"images": 1, "masks": 1, "unmatched": []}), "zip", task, ["evaluation"])
    assert refused.value.hint == (
        f"Send the data as safetensors: evaluation.images, and evaluation.{task.target} of the shape {shape}, 0 or 1."
    )


@pytest.mark.parametrize(
    ("groups", "told"),
    [(("F32", [5]), "must be integers"), (("I64", [4]), r"shape \[5\]"), (("I64", [5, 1]), r"shape \[5\]")],
)
def test_groups_are_one_number_a_sample(groups: tuple[str, list[int]], told: str) -> None:
    with pytest.raises(DataMismatch, match=rf"evaluation.groups .*{told}"):
        check_data(
            {"tensors": CLASSIFIED["tensors"] | {"evaluation.groups": {"dtype": groups[0], "shape": groups[1]}}},
            "safetensors", DIGITS, ["evaluation"],
        )  # fmt: skip


def test_groups_are_counted_where_the_headers_say_them() -> None:
    assert num_groups(CLASSIFIED, "safetensors", "evaluation") == 5
    assert num_groups(CLASSIFIED, "safetensors", "calibration") is None
    grouped = {"tensors": CLASSIFIED["tensors"] | {"evaluation.groups": {"dtype": "I64", "shape": [5]}}}
    assert num_groups(grouped, "safetensors", "evaluation") is None
    assert num_groups(folders(evaluation={"classes": {"zero": 3, "one": 4}}), "zip", "evaluation") == 7
    assert num_groups(folders(evaluation={"classes": {"zero": 3}, "groups": 2}), "zip", "evaluation") == 2
    assert num_groups(folders(evaluation={"images": 6, "masks": 6, "unmatched": []}), "zip", "evaluation") == 6
    assert num_groups(folders(), "zip", "evaluation") is None


def test_images_without_targets_are_enough_for_calibration_only() -> None:
    found = arrays(evaluation_images=("F32", [5, 1, 8, 8]))
    with pytest.raises(DataMismatch, match=r"no tensor evaluation\.labels"):
        check_data(found, "safetensors", DIGITS, ["evaluation"])


@pytest.mark.parametrize("shape", [[5, 8, 8], [5, 1, 8, 8, 8, 8], []])
def test_images_have_four_dimensions_and_volumes_five(shape: list[int]) -> None:
    with pytest.raises(DataMismatch, match="4 dimensions"):
        check_data(arrays(evaluation_images=("F32", shape)), "safetensors", DIGITS, ["evaluation"])


def test_an_empty_dimension_is_refused() -> None:
    with pytest.raises(DataMismatch, match="empty dimension"):
        check_data(arrays(evaluation_images=("F32", [5, 1, 0, 8])), "safetensors", DIGITS, ["evaluation"])


def test_all_parts_have_one_shape() -> None:
    found = {"tensors": {**SEGMENTED["tensors"], "calibration.images": {"dtype": "F32", "shape": [3, 1, 32, 41]}}}
    with pytest.raises(DataMismatch, match="one shape"):
        check_data(found, "safetensors", TISSUES, ["evaluation", "calibration"])
    check_data(found, "safetensors", TISSUES, ["evaluation"])


def test_the_layout_tells_where_the_channels_are() -> None:
    last = arrays(evaluation_images=("U8", [5, 32, 40, 3]), evaluation_masks=("U8", [5, 32, 40]))
    check_data(last, "safetensors", TISSUES, ["evaluation"], Preprocessing(layout="NHWC", channels=3, mean=[1, 2, 3]))
    with pytest.raises(DataMismatch, match="shape"):
        check_data(last, "safetensors", TISSUES, ["evaluation"], Preprocessing())
    with pytest.raises(DataMismatch, match="32 channels"):
        check_data(last, "safetensors", TISSUES, ["evaluation"], Preprocessing(channels=3, mean=[1, 2, 3]))


def test_masks_without_a_partner_are_named() -> None:
    found = folders(evaluation={"images": 2, "masks": 2, "unmatched": ["b", "c"]})
    with pytest.raises(DataMismatch, match="without a partner: b, c"):
        check_data(found, "zip", TISSUES, ["evaluation"])
    found = folders(evaluation={"images": 2, "masks": 0, "unmatched": []})
    with pytest.raises(DataMismatch, match="2 images but 0 masks"):
        check_data(found, "zip", TISSUES, ["evaluation"])


def test_a_folder_that_is_no_class_is_named() -> None:
    with pytest.raises(DataMismatch, match="'seven'"):
        check_data(folders(evaluation={"classes": {"zero": 1, "seven": 2}}), "zip", DIGITS, ["evaluation"])


def test_the_folders_tell_the_task() -> None:
    with pytest.raises(DataMismatch, match="images and masks, not 'zero'"):
        check_data(folders(evaluation={"classes": {"zero": 1}}), "zip", TISSUES, ["evaluation"])
    with pytest.raises(DataMismatch, match="one folder a class"):
        check_data(folders(evaluation={"images": 1, "masks": 1, "unmatched": []}), "zip", DIGITS, ["evaluation"])


def test_a_model_is_no_data_set() -> None:
    with pytest.raises(DataMismatch, match="not onnx"):
        check_data({"ir_version": 8, "opsets": {}}, "onnx", DIGITS, ["evaluation"])


# ---------------------------------------------------------------- volumes, and no task


@pytest.mark.parametrize(("layout", "shape"), [("NCHW", [5, 1, 4, 8, 9]), ("NHWC", [5, 4, 8, 9, 1])])
def test_masks_of_volumes_are_volumes(layout: Any, shape: list[int]) -> None:
    preprocessing = Preprocessing(layout=layout)
    fits = arrays(evaluation_images=("F32", shape), evaluation_masks=("U8", [5, 4, 8, 9]))
    check_data(fits, "safetensors", TISSUES, ["evaluation"], preprocessing)
    slices = arrays(evaluation_images=("F32", shape), evaluation_masks=("U8", [5, 8, 9]))
    with pytest.raises(DataMismatch, match=r"must have the shape \[5, 4, 8, 9\]"):
        check_data(slices, "safetensors", TISSUES, ["evaluation"], preprocessing)


def test_without_a_task_images_alone_are_enough() -> None:
    raw = Task(kind="raw")
    check_data(arrays(evaluation_images=("F32", [5, 1, 8, 8])), "safetensors", raw, ["evaluation"])
    check_data(folders(evaluation={"images": 2, "masks": 0, "unmatched": []}), "zip", raw, ["evaluation"])
    check_data(folders(evaluation={"classes": {"any": 2}}), "zip", raw, ["evaluation"])
    with pytest.raises(EvaluationEmpty):
        check_data(folders(evaluation={"images": 0, "masks": 3, "unmatched": []}), "zip", raw, ["evaluation"])


def test_a_train_part_may_lack_labels_where_only_a_teacher_is_learnt_from() -> None:
    data = {"evaluation.images": (2, 1, 8, 8), "evaluation.masks": (2, 8, 8), "train.images": (3, 1, 8, 8)}
    tensors = {name: {"dtype": "U8", "shape": list(shape)} for name, shape in data.items()}
    check_data({"tensors": tensors}, "safetensors", TISSUES, ["train", "evaluation"], without_labels=("train",))
    with pytest.raises(DataMismatch, match=r"train has images but no tensor train\.masks"):
        check_data({"tensors": tensors}, "safetensors", TISSUES, ["train", "evaluation"])
