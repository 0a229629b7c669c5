"""Stored samples become network input: preprocessed, in order, one stretch at a time, and never NaN."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import torchvision.transforms
from PIL import Image
from safetensors.torch import save_file

from shared.errors import DataMismatch, EvaluationEmpty, InvalidFile, StageFailed
from shared.recipe import Data, Preprocessing, Task
from worker.data import Samples, normalize, open_samples, pixels
from worker.feed import Feed

DIGITS = Task(kind="classification", classes=["zero", "one"])
TISSUES = Task(kind="segmentation", classes=["air", "other", "grey"], background=0)


def arrays(path: Path, task: Task, preprocessing: Preprocessing | None = None, **tensors: torch.Tensor) -> Samples:
    save_file({f"evaluation.{name}": tensor for name, tensor in tensors.items()}, path)
    data = Data(artifact=uuid4(), preprocessing=preprocessing or Preprocessing())
    return open_samples(path, "safetensors", "evaluation", data, task)


def png(pixels: Any, mode: str | None = None, format: str = "PNG") -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(out, format=format)
    return out.getvalue()


def zipped(path: Path, files: dict[str, bytes], task: Task, preprocessing: Preprocessing | None = None) -> Samples:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"evaluation/{name}", content)
    data = Data(artifact=uuid4(), preprocessing=preprocessing or Preprocessing())
    return open_samples(path, "zip", "evaluation", data, task)


GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)

# ---------------------------------------------------------------- safetensors


def test_arrays_are_preprocessed_channel_by_channel(tmp_path: Path) -> None:
    images = torch.arange(2 * 3 * 2 * 2, dtype=torch.uint8).reshape(2, 3, 2, 2)
    preprocessing = Preprocessing(channels=3, scale=0.5, mean=[1, 2, 3], std=[1, 2, 4])
    samples = arrays(tmp_path / "d", DIGITS, preprocessing, images=images, labels=torch.tensor([0, 1]))
    expected = (images.numpy() * 0.5 - np.reshape([1, 2, 3], (3, 1, 1))) / np.reshape([1, 2, 4], (3, 1, 1))
    assert len(samples) == 2
    assert samples.inputs(0, 2).dtype == np.float32
    np.testing.assert_allclose(samples.inputs(0, 2), expected)
    np.testing.assert_array_equal(samples.targets(0, 2), [0, 1])


def test_the_channels_may_come_last(tmp_path: Path) -> None:
    images = torch.ones(1, 4, 5, 3)
    preprocessing = Preprocessing(channels=3, layout="NHWC", mean=[0, 1, 2])
    samples = arrays(tmp_path / "d", DIGITS, preprocessing, images=images, labels=torch.tensor([0]))
    assert samples.inputs(0, 1).shape == (1, 4, 5, 3)
    np.testing.assert_array_equal(samples.inputs(0, 1)[0, 0, 0], [1, 0, -1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.uint16, torch.bool])
def test_every_real_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    samples = arrays(tmp_path / "d", DIGITS, images=torch.ones(2, 1, 3, 3).to(dtype), labels=torch.tensor([0, 1]))
    np.testing.assert_array_equal(samples.inputs(0, 2), np.ones((2, 1, 3, 3)))


def test_batches_cover_the_part_once_and_in_order(tmp_path: Path) -> None:
    images = torch.arange(7.0).reshape(7, 1, 1, 1).expand(7, 1, 2, 2).contiguous()
    samples = arrays(tmp_path / "d", TISSUES, images=images, masks=torch.zeros(7, 2, 2, dtype=torch.uint8))
    batches = list(samples.batches(3))
    assert [len(inputs) for inputs, _ in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([inputs[:, 0, 0, 0] for inputs, _ in batches]), np.arange(7))
    assert all(targets is not None and targets.dtype == np.int64 for _, targets in batches)


def test_samples_are_spread_evenly(tmp_path: Path) -> None:
    images = torch.arange(10.0).reshape(10, 1, 1, 1)
    samples = arrays(tmp_path / "d", DIGITS, images=images, labels=torch.zeros(10, dtype=torch.int64))
    assert samples.spread(5) == [0, 2, 4, 6, 8]
    assert samples.spread(99) == list(range(10))
    np.testing.assert_array_equal(samples.take([9, 0]).ravel(), [9, 0])


def test_calibration_needs_no_targets(tmp_path: Path) -> None:
    save_file({"calibration.images": torch.zeros(2, 1, 2, 2)}, tmp_path / "d")
    samples = open_samples(tmp_path / "d", "safetensors", "calibration", Data(artifact=uuid4()), TISSUES)
    assert samples.targets(0, 2) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_told_with_part_and_index(tmp_path: Path, value: float) -> None:
    images = torch.zeros(5, 1, 2, 2)
    images[3, 0, 1, 1] = value
    samples = arrays(tmp_path / "d", DIGITS, images=images, labels=torch.zeros(5, dtype=torch.int64))
    samples.inputs(0, 3)
    with pytest.raises(StageFailed, match="Image 3 of evaluation") as refused:
        samples.inputs(2, 5)
    assert refused.value.code == "data_not_finite"


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_that_is_no_class_is_refused(tmp_path: Path, label: int) -> None:
    with pytest.raises(StageFailed, match=f"class {label}, but the classes are 0 to 1") as refused:
        arrays(tmp_path / "d", DIGITS, images=torch.zeros(2, 1, 2, 2), labels=torch.tensor([0, label]))
    assert refused.value.code == "data_mismatch"


def test_a_mask_with_a_value_that_is_no_class_is_told_with_its_index(tmp_path: Path) -> None:
    masks = torch.zeros(4, 2, 2, dtype=torch.uint8)
    masks[2, 0, 0] = 7
    samples = arrays(tmp_path / "d", TISSUES, images=torch.zeros(4, 1, 2, 2), masks=masks)
    with pytest.raises(StageFailed, match=r"evaluation.masks\[2\] holds class 7"):
        samples.targets(0, 4)


def test_groups_are_read_from_their_tensor(tmp_path: Path) -> None:
    images, labels = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    assert arrays(tmp_path / "d", DIGITS, images=images, labels=labels).groups is None
    groups = torch.tensor([9, 9, 2, 9], dtype=torch.uint8)
    samples = arrays(tmp_path / "e", DIGITS, images=images, labels=labels, groups=groups)
    assert samples.groups == [9, 9, 2, 9]


@pytest.mark.parametrize("stored", ["labels", "masks"])
def test_several_labels_of_a_sample_are_read(tmp_path: Path, stored: str) -> None:
    task = Task(kind="multilabel", classes=["organ", "lesion", "vessel"], per="voxel" if stored == "masks" else "image")
    shape = (2, 3, 4, 5) if stored == "masks" else (2, 3)
    values = torch.ones(shape, dtype=torch.bool)
    samples = arrays(tmp_path / "d", task, images=torch.zeros(2, 1, 4, 5), **{stored: values})
    targets = samples.targets(0, 2)
    assert targets is not None
    assert (targets.shape, targets.dtype) == (shape, np.int64)


def test_a_label_is_0_or_1(tmp_path: Path) -> None:
    task = Task(kind="multilabel", classes=["organ", "lesion", "vessel"])
    with pytest.raises(StageFailed, match="holds 2, but of a multilabel task it is 0 or 1") as refused:
        arrays(tmp_path / "d", task, images=torch.zeros(1, 1, 2, 2), labels=torch.tensor([[0, 2, 1]]))
    assert refused.value.code == "data_mismatch"


def test_masks_that_do_not_match_are_refused_when_opened(tmp_path: Path) -> None:
    with pytest.raises(DataMismatch):
        arrays(tmp_path / "d", TISSUES, images=torch.zeros(4, 1, 2, 2), masks=torch.zeros(3, 2, 2, dtype=torch.uint8))


def test_an_empty_evaluation_is_refused_when_opened(tmp_path: Path) -> None:
    with pytest.raises(EvaluationEmpty):
        arrays(tmp_path / "d", DIGITS, images=torch.zeros(0, 1, 2, 2), labels=torch.zeros(0, dtype=torch.int64))


def test_reading_a_batch_does_not_read_the_part(tmp_path: Path) -> None:
    images = torch.zeros(200, 1, 256, 256)  # 52 MB
    samples = arrays(tmp_path / "d", DIGITS, images=images, labels=torch.zeros(200, dtype=torch.int64))
    del images
    tracemalloc.start()
    samples.inputs(100, 104)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20


# ---------------------------------------------------------------- zip


def test_class_folders_give_labels_mixed_over_the_part(tmp_path: Path) -> None:
    files = {f"{name}/{index}.png": png(GREY) for name in ("zero", "one") for index in range(3)}
    samples = zipped(tmp_path / "d", files, DIGITS, Preprocessing(scale=1 / 255))
    assert samples.inputs(0, 6).shape == (6, 1, 6, 8)
    np.testing.assert_allclose(samples.inputs(0, 1)[0, 0], GREY / 255, rtol=1e-6)
    np.testing.assert_array_equal(samples.targets(0, 6), [1, 0, 1, 0, 1, 0])


def test_images_are_resized_and_get_the_channels_that_the_network_takes(tmp_path: Path) -> None:
    colour = np.zeros((6, 8, 3), dtype=np.uint8)
    colour[..., 0] = 200
    files = {"zero/a.png": png(colour), "zero/b.png": png(GREY)}
    samples = zipped(tmp_path / "d", files, DIGITS, Preprocessing(channels=3, size=(12, 10)))
    assert samples.inputs(0, 2).shape == (2, 3, 12, 10)
    np.testing.assert_array_equal(samples.inputs(0, 1)[0, :, 0, 0], [200, 0, 0])
    last = zipped(tmp_path / "e", files, DIGITS, Preprocessing(channels=3, size=(12, 10), layout="NHWC"))
    np.testing.assert_array_equal(last.inputs(0, 2), samples.inputs(0, 2).transpose(0, 2, 3, 1))


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    deep = (np.arange(48).reshape(6, 8) * 1000).astype(np.uint16)
    samples = zipped(tmp_path / "d", {"zero/a.png": png(deep)}, DIGITS)
    np.testing.assert_array_equal(samples.inputs(0, 1)[0, 0], deep)


def test_masks_belong_to_images_by_name_and_keep_their_indices(tmp_path: Path) -> None:
    mask = GREY % 3
    files = {
        "images/b.jpg": png(GREY, format="JPEG"),
        "images/a.png": png(GREY),
        "masks/a.png": png(mask),
        "masks/b.png": png(mask * 0, "P"),
    }
    samples = zipped(tmp_path / "d", files, TISSUES, Preprocessing(size=(12, 16)))
    targets = samples.targets(0, 2)
    assert targets is not None
    np.testing.assert_array_equal(targets[0], mask.repeat(2, axis=0).repeat(2, axis=1))
    assert not targets[1].any()


def test_a_mask_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    files = {"images/a.png": png(GREY), "masks/a.png": png(GREY[:, :4] % 3)}
    with pytest.raises(StageFailed, match=r"masks/a.png is \(4, 6\), but its image is \(8, 6\)"):
        zipped(tmp_path / "d", files, TISSUES).targets(0, 1)


def test_a_mask_in_colour_is_refused(tmp_path: Path) -> None:
    files = {"images/a.png": png(GREY), "masks/a.png": png(GREY, "RGB")}
    with pytest.raises(StageFailed, match="one channel of class indices"):
        zipped(tmp_path / "d", files, TISSUES).targets(0, 1)


def test_an_image_without_a_mask_is_refused_when_opened(tmp_path: Path) -> None:
    files = {"images/a.png": png(GREY), "images/b.png": png(GREY), "masks/a.png": png(GREY % 3)}
    with pytest.raises(DataMismatch, match="2 images but 1 masks"):
        zipped(tmp_path / "d", files, TISSUES)


def test_images_of_different_sizes_ask_for_a_size(tmp_path: Path) -> None:
    samples = zipped(tmp_path / "d", {"zero/a.png": png(GREY), "zero/b.png": png(GREY[:4])}, DIGITS)
    with pytest.raises(StageFailed, match="differ in size") as refused:
        samples.inputs(0, 2)
    assert "preprocessing.size" in (refused.value.hint or "")


def test_an_image_that_cannot_be_decoded_is_refused_by_name(tmp_path: Path) -> None:
    files = {"zero/a.png": png(GREY), "zero/b.png": b"no image", "zero/c.png": png(GREY)[:-30]}
    samples = zipped(tmp_path / "d", files, DIGITS)
    for index, name in ((1, "zero/b.png"), (2, "zero/c.png")):
        with pytest.raises(StageFailed, match=name) as refused:
            samples.inputs(index, index + 1)
        assert refused.value.code == "data_mismatch"


def test_an_entry_whose_bytes_are_damaged_is_refused(tmp_path: Path) -> None:
    zipped(tmp_path / "d", {"zero/a.png": png(GREY)}, DIGITS)
    content = bytearray((tmp_path / "d").read_bytes())
    content[70] ^= 255
    (tmp_path / "d").write_bytes(content)
    samples = open_samples(tmp_path / "d", "zip", "evaluation", Data(artifact=uuid4()), DIGITS)
    with pytest.raises(StageFailed, match="cannot be read"):
        samples.inputs(0, 1)


def test_a_corrupt_zip_is_refused_when_opened(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InvalidFile):
        open_samples(tmp_path / "d", "zip", "evaluation", Data(artifact=uuid4()), DIGITS)


def test_normalizing_gives_contiguous_fp32() -> None:
    found = normalize(np.ones((2, 3, 4), dtype=np.float64).transpose(2, 0, 1), Preprocessing())
    assert found.dtype == np.float32
    assert found.flags.c_contiguous


# ---------------------------------------------------------------- volumes, other inputs, no task


@pytest.mark.parametrize(("layout", "shape"), [("NCHW", (2, 2, 3, 4, 5)), ("NHWC", (2, 3, 4, 5, 2))])
def test_volumes_are_preprocessed_channel_by_channel(tmp_path: Path, layout: Any, shape: tuple[int, ...]) -> None:
    preprocessing = Preprocessing(channels=3, layout=layout, scale=2, mean=[1.0])
    masks = torch.ones(2, 3, 4, 5, dtype=torch.uint8)
    samples = arrays(tmp_path / "d", TISSUES, preprocessing, images=torch.ones(shape), masks=masks)
    assert samples.inputs(0, 2).shape == shape
    assert set(samples.inputs(0, 2).ravel()) == {1}
    targets = samples.targets(0, 2)
    assert targets is not None
    assert targets.shape == (2, 3, 4, 5)


def with_others(path: Path, others: list[str], **tensors: torch.Tensor) -> Samples:
    images = torch.arange(6.0).reshape(6, 1, 1, 1)
    named = {"images": images, **tensors}
    save_file({f"evaluation.{name}": tensor for name, tensor in named.items()}, path)
    return open_samples(path, "safetensors", "evaluation", Data(artifact=uuid4()), Task(kind="raw"), others)


def test_other_inputs_come_beside_the_images_in_the_same_order(tmp_path: Path) -> None:
    ages, ids = torch.arange(6, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.int16)
    samples = with_others(tmp_path / "d", ["age", "id"], age=ages, id=ids)
    found = samples.feed([4, 1])
    assert isinstance(found, Feed)
    assert (len(found), found.shape) == (2, (2, 1, 1, 1))
    np.testing.assert_array_equal(found.others["age"], np.float32([[4], [1]]))
    np.testing.assert_array_equal(found.others["id"], [4, 1])
    assert [found.others[name].dtype for name in ("age", "id")] == [np.float32, np.int64]
    assert [len(inputs) for inputs, _ in samples.batches(4)] == [4, 2]
    assert isinstance(with_others(tmp_path / "e", []).feed([0]), np.ndarray)


def test_an_input_that_the_data_lacks_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataMismatch, match=r"lacks the tensor evaluation\.age") as refused:
        with_others(tmp_path / "d", ["age"])
    assert "source.constants" in (refused.value.hint or "")
    with pytest.raises(DataMismatch, match="6 samples"):
        with_others(tmp_path / "d", ["age"], age=torch.zeros(5))
    with pytest.raises(StageFailed, match=r"evaluation\.age has NaN"):
        with_others(tmp_path / "d", ["age"], age=torch.full((6,), torch.nan)).feed([0])


def test_folders_below_images_and_masks_are_groups(tmp_path: Path) -> None:
    masks = {name: np.full((6, 8), value, dtype=np.uint8) for value, name in enumerate(["b/1", "a/1", "a/2"])}
    files = {f"images/{name}.png": png(GREY) for name in masks} | {
        f"masks/{name}.png": png(mask) for name, mask in masks.items()
    }
    samples = zipped(tmp_path / "d", files, TISSUES)
    assert samples.groups == [0, 0, 1]
    targets = samples.targets(0, 3)
    assert targets is not None
    assert targets[:, 0, 0].tolist() == [1, 2, 0]  # a/1, a/2, b/1: each with its own mask


def test_folders_below_a_class_are_groups(tmp_path: Path) -> None:
    files = {name: png(GREY) for name in ("zero/ann/2.png", "zero/bob/1.png", "one/ann/3.png")}
    samples = zipped(tmp_path / "d", files, DIGITS)
    assert samples.groups == [1, 0, 0]
    np.testing.assert_array_equal(samples.targets(0, 3), [0, 0, 1])
    assert zipped(tmp_path / "e", {"zero/1.png": png(GREY)}, DIGITS).groups is None


def test_a_zip_has_no_other_inputs(tmp_path: Path) -> None:
    zipped(tmp_path / "d", {"images/a.png": png(GREY)}, Task(kind="raw"))
    with pytest.raises(DataMismatch, match="age beside the images"):
        open_samples(tmp_path / "d", "zip", "evaluation", Data(artifact=uuid4()), Task(kind="raw"), ["age"])


def test_without_a_task_any_folder_but_masks_holds_images(tmp_path: Path) -> None:
    files = {"images/a.png": png(GREY), "images/b.png": png(GREY), "masks/a.png": png(GREY), "masks/b.png": png(GREY)}
    samples = zipped(tmp_path / "d", files, Task(kind="raw"))
    assert (len(samples), samples.targets(0, 1)) == (2, None)
    assert len(zipped(tmp_path / "e", {"some/a.png": png(GREY), "other/b.png": png(GREY)}, Task(kind="raw"))) == 2


def test_samples_are_checked_one_at_a_time() -> None:
    images = np.zeros((200, 1, 256, 256), dtype=np.float32)
    images[150, 0, 0, 0] = np.nan
    samples = Samples("calibration", 200, lambda index: images[index], None)
    tracemalloc.start()
    samples.check(range(150))
    assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    tracemalloc.stop()
    with pytest.raises(StageFailed, match="Image 150 of calibration"):
        samples.check(range(200))


def test_a_check_finds_images_of_another_size() -> None:
    samples = Samples("calibration", 3, lambda index: np.zeros((1, 4, 4 + index // 2), dtype=np.float32), None)
    with pytest.raises(StageFailed, match="differ in size"):
        samples.check(range(3))


def test_the_seed_draws_the_same_samples_in_order() -> None:
    samples = Samples("calibration", 50, lambda index: np.zeros((1, 1, 1), dtype=np.float32), None)
    assert samples.draw(10, 3) == samples.draw(10, 3) == sorted(samples.draw(10, 3))
    assert samples.draw(10, 3) != samples.draw(10, 4)
    assert samples.draw(99, 0) == list(range(50))


# ---------------------------------------------------------------- crops


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (256, 256), (40, 31), (257, 511)])
def test_a_crop_is_what_torchvision_makes_of_the_image(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    publisher = torchvision.transforms.Compose([
        torchvision.transforms.Resize(256), torchvision.transforms.CenterCrop(224), torchvision.transforms.PILToTensor()
    ])  # fmt: skip
    ours = pixels(image, Preprocessing(size=(224, 224), crop_ratio=224 / 256, channels=3))
    np.testing.assert_array_equal(ours, publisher(image).numpy())


def test_a_mask_is_cropped_with_its_image(tmp_path: Path) -> None:
    half = np.zeros((40, 80), dtype=np.uint8)
    half[:, 40:] = 2
    files = {"images/a.png": png(half * 100), "masks/a.png": png(half)}
    samples = zipped(tmp_path / "d", files, TISSUES, Preprocessing(size=(16, 16), crop_ratio=0.5))
    targets = samples.targets(0, 1)
    assert targets is not None
    np.testing.assert_array_equal(targets[0] == 2, samples.inputs(0, 1)[0, 0] > 100)
    assert {0, 2} == set(targets.ravel())
