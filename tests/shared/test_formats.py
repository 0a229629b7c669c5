"""Files are vetted by their headers, and whatever can carry code is refused with a sentence."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import pickle
import stat
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.torch import save

from shared.errors import InvalidFile, UnsafeFormat
from shared.formats import MAX_ENTRIES, MAX_HEADER_BYTES, inspect_file


def inspect(content: bytes, format: str) -> dict[str, Any]:
    return inspect_file(io.BytesIO(content), len(content), format)


def safetensors(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def zipped(names: list[str], content: bytes = b"x", **changes: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", changes.pop("compression", zipfile.ZIP_STORED)) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = archive.compression
            for key, value in changes.items():
                setattr(entry, key, value)
            archive.writestr(entry, content)
    return out.getvalue()


# ---------------------------------------------------------------- what carries code


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("format", ["safetensors", "onnx", "zip"])
def test_a_pickle_is_refused_whatever_it_is_called(protocol: int, format: str) -> None:
    with pytest.raises(UnsafeFormat, match="pickle") as refused:
        inspect(pickle.dumps({"weights": [1, 2]}, protocol=protocol), format)
    assert "safetensors" in (refused.value.hint or "")


@pytest.mark.parametrize("format", ["safetensors", "onnx", "zip"])
def test_a_pytorch_checkpoint_is_refused(format: str) -> None:
    out = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, out)
    with pytest.raises(UnsafeFormat, match="PyTorch checkpoint"):
        inspect(out.getvalue(), format)


def test_an_old_pytorch_checkpoint_is_refused() -> None:
    out = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, out, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFormat, match="pickle"):
        inspect(out.getvalue(), "safetensors")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["net/data.pkl", "net/constants.pkl", "net/code/__torch__.py"], "TorchScript"),
        (["net/code/__torch__/torch/nn.py"], "TorchScript"),
        (["net/archive_format", "net/models/model.json"], "torch.export"),
        (["serialized_exported_program.json"], "torch.export"),
        (["config.json", "metadata.json", "model.weights.h5"], "Keras"),
        (["saved_model.pb"], "Keras or TensorFlow"),
        (["arr_0.npy"], "npz"),
        (["train/cat/model.pkl"], "pickle"),
    ],
)
def test_an_archive_that_carries_code_is_refused_by_its_kind(names: list[str], kind: str) -> None:
    for format in ("zip", "safetensors", "onnx"):
        with pytest.raises(UnsafeFormat, match=kind):
            inspect(zipped(names), format)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89HDF\r\n\x1a\n" + bytes(100),
        gzip.compress(pickle.dumps([1]), mtime=0),
        b"BZh91AY" + bytes(50),
        b"\xfd7zXZ\0" + bytes(50),
        b"\x93NUMPY\x01\0" + bytes(50),
    ],
)
def test_other_containers_of_code_are_refused(content: bytes) -> None:
    with pytest.raises(UnsafeFormat) as refused:
        inspect(content, "safetensors")
    assert refused.value.hint


def test_a_tar_checkpoint_is_refused() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    with pytest.raises(UnsafeFormat, match="tar"):
        inspect(out.getvalue(), "safetensors")


def test_a_header_length_that_looks_like_a_pickle_is_still_safetensors() -> None:
    length = 0x0280  # its first bytes are those of a pickle of protocol 2
    header = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'.ljust(length)
    assert inspect(safetensors(header), "safetensors") == {"tensors": {"a": {"dtype": "U8", "shape": [0]}}}


@pytest.mark.parametrize("format", ["safetensors", "onnx", "zip"])
def test_an_empty_file_is_refused(format: str) -> None:
    with pytest.raises(InvalidFile, match="empty"):
        inspect(b"", format)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InvalidFile, match="known are"):
        inspect(b"something", "tflite")


# ---------------------------------------------------------------- safetensors


def test_a_safetensors_file_tells_its_tensors() -> None:
    content = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64), "c": torch.zeros(1).bfloat16()})
    assert inspect(content, "safetensors")["tensors"] == {
        "a": {"dtype": "F32", "shape": [2, 3]},
        "b": {"dtype": "I64", "shape": [4]},
        "c": {"dtype": "BF16", "shape": [1]},
    }


def test_metadata_is_no_tensor() -> None:
    content = save({"a": torch.zeros(1)}, metadata={"format": "pt"})
    assert list(inspect(content, "safetensors")["tensors"]) == ["a"]


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}, "not F32 x"),
        ({"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}, "unknown dtype"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [1] * 40, "data_offsets": [0, 4]}, "shape"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "begins at byte 4"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}, "not F32 x"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "data_offsets"),
        ({"dtype": "F32", "shape": [1]}, "exactly"),
        ([1, 2], "exactly"),
    ],
)
def test_a_tensor_that_does_not_add_up_is_refused(entry: Any, told: str) -> None:
    with pytest.raises(InvalidFile, match=told):
        inspect(safetensors({"a": entry}, bytes(8)), "safetensors")


def test_tensors_may_not_share_bytes() -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    with pytest.raises(InvalidFile, match="begins at byte 0"):
        inspect(safetensors({"a": entry, "b": entry}, bytes(4)), "safetensors")


def test_bytes_after_the_last_tensor_are_refused() -> None:
    with pytest.raises(InvalidFile, match="tensors end"):
        inspect(save({"a": torch.zeros(2)}) + b"more", "safetensors")


def test_a_truncated_safetensors_file_is_refused() -> None:
    content = save({"a": torch.zeros(2)})
    for length in (1, 7, 20, len(content) - 1):
        with pytest.raises(InvalidFile):
            inspect(content[:length], "safetensors")


def test_a_header_that_claims_too_much_is_refused_before_it_is_read() -> None:
    with pytest.raises(InvalidFile, match="claims"):
        inspect(struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(100), "safetensors")
    with pytest.raises(InvalidFile, match="claims"):
        inspect(struct.pack("<Q", 2**63) + bytes(100), "safetensors")


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":1,"a":2}', b'{"a":' + b"9" * 5000 + b"}"]
)
def test_a_header_that_is_not_a_json_object_is_refused(header: bytes) -> None:
    with pytest.raises(InvalidFile):
        inspect(safetensors(header), "safetensors")


@given(st.binary(min_size=1, max_size=300), st.sampled_from(["safetensors", "onnx", "zip"]))
def test_no_bytes_bring_the_inspection_down(content: bytes, format: str) -> None:
    with contextlib.suppress(InvalidFile, UnsafeFormat):
        assert inspect(content, format)


# ---------------------------------------------------------------- onnx


def onnx_bytes() -> bytes:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 2])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, 2])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 2)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return content


def test_an_onnx_file_tells_its_opsets_without_being_parsed() -> None:
    assert inspect(onnx_bytes(), "onnx") == {"ir_version": 8, "opsets": {"": 17, "com.example": 2}}


def test_a_truncated_onnx_file_is_refused() -> None:
    content = onnx_bytes()
    second_opset = content.index(b"com.example") - 4  # up to there it is a whole model of one opset
    for length in (*range(1, second_opset), *range(second_opset + 1, len(content))):
        with pytest.raises(InvalidFile):
            inspect(content[:length], "onnx")


def test_other_protobufs_are_not_onnx() -> None:
    with pytest.raises(InvalidFile, match="not an ONNX model"):
        inspect(onnx.TensorProto(name="a", dims=[2]).SerializeToString(), "onnx")


# ---------------------------------------------------------------- zip


def test_class_folders_are_counted() -> None:
    content = zipped(["train/cat/1.png", "train/cat/2.PNG", "train/dog/1.jpg", "evaluation/dog/1.tif"])
    assert inspect(content, "zip")["parts"] == {
        "evaluation": {"classes": {"dog": 1}},
        "train": {"classes": {"cat": 2, "dog": 1}},
    }


def test_images_are_matched_with_masks_by_name() -> None:
    names = ["evaluation/images/a.jpg", "evaluation/masks/a.png", "evaluation/images/b.png", "evaluation/masks/c.png"]
    assert inspect(zipped(names), "zip")["parts"]["evaluation"] == {"images": 2, "masks": 2, "unmatched": ["b", "c"]}


def test_folders_of_groups_are_counted_and_images_matched_within_them() -> None:
    names = ["train/images/ann/1.png", "train/masks/ann/1.png", "train/images/bob/1.png", "train/masks/bob/2.png"]
    assert inspect(zipped(names), "zip")["parts"]["train"] == {
        "images": 2, "masks": 2, "unmatched": ["bob/1", "bob/2"], "groups": 2,
    }  # fmt: skip
    found = inspect(zipped(["train/cat/ann/1.png", "train/dog/ann/1.png"]), "zip")["parts"]["train"]
    assert found == {"classes": {"cat": 1, "dog": 1}, "groups": 1}


def test_a_part_with_images_in_groups_and_in_none_is_refused() -> None:
    with pytest.raises(InvalidFile, match="put all of them in groups, or none"):
        inspect(zipped(["train/cat/ann/1.png", "train/cat/1.png"]), "zip")


def test_images_without_any_mask_are_not_unmatched() -> None:
    found = inspect(zipped(["calibration/images/a.png"]), "zip")["parts"]["calibration"]
    assert found == {"images": 1, "masks": 0, "unmatched": []}


def test_what_desktops_add_is_left_out() -> None:
    names = ["train/cat/1.png", "__MACOSX/train/cat/._1.png", "train/.DS_Store", "train/cat/Thumbs.db", "train/cat/"]
    assert inspect(zipped(names), "zip")["parts"] == {"train": {"classes": {"cat": 1}}}


@pytest.mark.parametrize(
    "name", ["../evil.png", "/etc/evil.png", "train/../../evil.png", "C:/evil.png", "train\\cat\\1.png"]
)
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    with pytest.raises(InvalidFile, match="outside its folder"):
        inspect(zipped([name]), "zip")


def test_a_link_is_refused() -> None:
    content = zipped(["train/cat/1.png"], b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16, create_system=3)
    with pytest.raises(InvalidFile, match="link"):
        inspect(content, "zip")


@pytest.mark.parametrize("name", ["train/cat/model.py", "train/cat/1.svg", "train/cat/1.png.exe"])
def test_only_images_are_accepted(name: str) -> None:
    with pytest.raises(InvalidFile, match="not an image"):
        inspect(zipped([name]), "zip")


@pytest.mark.parametrize("name", ["cat/1.png", "test/cat/1.png", "1.png", "train/cat/more/yet/1.png"])
def test_a_file_in_no_part_is_refused_with_the_layout(name: str) -> None:
    with pytest.raises(InvalidFile, match="<part>/<class>/<image>"):
        inspect(zipped([name]), "zip")


def test_two_files_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidFile, match="differ only in their suffix"):
        inspect(zipped(["train/images/a.png", "train/images/a.jpg"]), "zip")
    with pytest.warns(UserWarning, match="Duplicate"):
        content = zipped(["train/images/a.png", "train/images/a.png"])
    with pytest.raises(InvalidFile, match="same name"):
        inspect(content, "zip")


def test_a_bomb_is_refused() -> None:
    names = [f"train/cat/{index}.bmp" for index in range(6)]
    content = zipped(names, bytes(100 * 2**20), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InvalidFile, match="unpacks to"):
        inspect(content, "zip")


def test_overlapping_entries_are_refused() -> None:
    content = bytearray(zipped(["train/cat/1.png", "train/cat/2.png"], b"x" * 100))
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = bytes(4)  # the second entry's header is the first's
    with pytest.raises(InvalidFile, match="overlaps"):
        inspect(bytes(content), "zip")


def test_an_encrypted_entry_is_refused() -> None:
    content = bytearray(zipped(["train/cat/1.png"]))
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 8] |= 1
    with pytest.raises(InvalidFile, match="encrypted"):
        inspect(bytes(content), "zip")


def test_another_compression_is_refused() -> None:
    with pytest.raises(InvalidFile, match="deflate"):
        inspect(zipped(["train/cat/1.png"], compression=zipfile.ZIP_BZIP2), "zip")


def test_a_directory_that_announces_too_much_is_refused_before_it_is_read() -> None:
    content = bytearray(zipped(["train/cat/1.png"]))
    end = content.rindex(b"PK\x05\x06")
    content[end + 12 : end + 16] = struct.pack("<I", 2**31)
    with pytest.raises(InvalidFile, match="announces"):
        inspect(bytes(content), "zip")
    assert MAX_ENTRIES == 200_000


def test_a_corrupt_zip_is_refused() -> None:
    content = zipped(["train/cat/1.png"] , b"x" * 200)
    for corrupt in (content[:-10], content[: len(content) // 2], b"PK\x03\x04" + bytes(100), b"no zip at all" * 10):
        with pytest.raises(InvalidFile):
            inspect(corrupt, "zip")


def test_a_zip_is_not_accepted_as_another_format() -> None:
    with pytest.raises(InvalidFile, match="zip archive"):
        inspect(zipped(["train/cat/1.png"]), "safetensors")


def test_a_large_archive_is_inspected_by_its_directory_alone(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(50):
            archive.writestr(f"train/cat/{index}.png", np.random.default_rng(index).bytes(100_000))

    class Counting(io.BytesIO):
        num_read = 0

        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size)
            self.num_read += len(found)
            return found

    file = Counting(path.read_bytes())
    inspect_file(file, path.stat().st_size, "zip")
    assert file.num_read < 400_000
