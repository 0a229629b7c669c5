"""What an uploaded file is, read from its headers alone, before any parser sees it.

Nothing here decodes, decompresses or allocates what a file claims: the front desk calls it on an object in storage
through a seekable reader, and the workshop again before it parses. A file that can carry code is refused with a
sentence that says what to send instead.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NoReturn

from shared.errors import InvalidFile, UnsafeFormat

PARTS = ("train", "calibration", "evaluation")

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

MAX_HEADER_BYTES = 32 * 2**20
MAX_DIMENSIONS = 16
MAX_ONNX_BYTES = 2**31 - 1  # protobuf's own limit

MAX_ENTRIES = 200_000
MAX_DIRECTORY_BYTES = 48 * 2**20
MAX_ENTRY_BYTES = 256 * 2**20
MAX_UNPACKED_BYTES = 64 * 2**30
MAX_UNPACKED_RATIO = 100
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
CLUTTER = frozenset({"__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini"})

SEND_WEIGHTS = (
    "Send the weights as safetensors (safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')) "
    "beside an architecture name, or the network as ONNX."
)
SEND_DATA = "Send arrays as safetensors, or images as a zip of folders."


def inspect_file(file: BinaryIO, size_bytes: int, format: str) -> dict[str, Any]:
    """Vet `file`, announced as safetensors, onnx or zip, and tell what it holds.

    safetensors: `{"tensors": {name: {"dtype", "shape"}}}`. onnx: `{"ir_version", "opsets": {domain: version}}`.
    zip: `{"parts": {part: {"classes": {name: count}} or {"images", "masks", "unmatched"}}}`, and the number of
    "groups" of a part whose samples lie in folders of groups.
    Raises UnsafeFormat where the file can carry code, InvalidFile where it is not what its format says.
    """
    if size_bytes == 0:
        raise InvalidFile("The file is empty.")
    _refuse_code(file, size_bytes, format)
    if format == "safetensors":
        return {"tensors": _safetensors_header(file, size_bytes)}
    if format == "onnx":
        return _onnx_header(file, size_bytes)
    if format == "zip":
        return {"parts": _image_folders(_zip_directory(file, size_bytes))}
    raise InvalidFile(f"Unknown format {format!r}; known are safetensors, onnx and zip.")


# ---------------------------------------------------------------- formats that carry code


def _refuse_code(file: BinaryIO, size_bytes: int, format: str) -> None:
    start = _read(file, 0, min(512, size_bytes))
    if start[4:9] == b"\0\0\0\0{":  # safetensors: a header length below 4 GiB, then JSON
        return
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise UnsafeFormat("This is a Python pickle (.pt, .pth, .pkl, joblib), which can run code.", hint=SEND_WEIGHTS)
    if start[:8] == b"\x89HDF\r\n\x1a\n":
        raise UnsafeFormat("This is an HDF5 file (Keras .h5), which can carry code.", hint=SEND_WEIGHTS)
    if start[:6] == b"\x93NUMPY":
        raise UnsafeFormat("This is a NumPy .npy file, which can hold pickled objects.", hint=SEND_DATA)
    if start[257:262] == b"ustar":
        raise UnsafeFormat("This is a tar archive, as old PyTorch checkpoints are.", hint=SEND_WEIGHTS)
    if start[:2] in (b"\x1f\x8b", b"\x78\x9c", b"\x78\xda") or start[:3] == b"BZh" or start[:5] == b"\xfd7zXZ":
        hint = f"{SEND_WEIGHTS} {SEND_DATA}"
        raise UnsafeFormat("This is a compressed stream, as joblib and pickle files are.", hint=hint)
    if start[:4] == b"PK\x03\x04":
        _refuse_code_archive({PurePosixPath(info.filename) for info in _zip_directory(file, size_bytes)})
        if format != "zip":
            raise InvalidFile(f"This is a zip archive, not a file in {format} format.")


def _refuse_code_archive(paths: set[PurePosixPath]) -> None:
    names = {path.name for path in paths}
    if "constants.pkl" in names or any("code" in path.parts[:-1] and path.suffix == ".py" for path in paths):
        raise UnsafeFormat("This is a TorchScript archive, which carries code.", hint=SEND_WEIGHTS)
    if "archive_format" in names or "serialized_exported_program.json" in names:
        raise UnsafeFormat("This is a torch.export archive (.pt2), which can hold pickled objects.", hint=SEND_WEIGHTS)
    if any(path.suffix in (".pkl", ".pickle") for path in paths):
        raise UnsafeFormat("This is a PyTorch checkpoint (.pt, .pth): a zip with a pickle in it.", hint=SEND_WEIGHTS)
    if "model.weights.h5" in names or any(path.suffix in (".h5", ".pb") for path in paths):
        raise UnsafeFormat("This is a Keras or TensorFlow archive, which can carry code.", hint=SEND_WEIGHTS)
    if any(path.suffix == ".npy" for path in paths):
        raise UnsafeFormat("This is a NumPy .npz archive, which can hold pickled objects.", hint=SEND_DATA)


# ---------------------------------------------------------------- safetensors


def _safetensors_header(file: BinaryIO, size_bytes: int) -> dict[str, dict[str, Any]]:
    if size_bytes < 8:
        raise InvalidFile("A safetensors file begins with 8 bytes of header length; this one is shorter.")
    (header_bytes,) = struct.unpack("<Q", _read(file, 0, 8))
    if header_bytes > MAX_HEADER_BYTES:
        raise InvalidFile(f"The safetensors header claims {header_bytes} bytes; at most {MAX_HEADER_BYTES} may be.")
    if 8 + header_bytes > size_bytes:
        raise InvalidFile(f"The safetensors header claims {header_bytes} bytes, but the file has {size_bytes}.")
    try:
        header = json.loads(_read(file, 8, header_bytes), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"The safetensors header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise InvalidFile("The safetensors header is not a JSON object.")
    header.pop("__metadata__", None)
    spans = sorted((_tensor_span(name, entry), name) for name, entry in header.items())
    end = 0
    for (begin, stop), name in spans:
        if begin != end:
            raise InvalidFile(f"Tensor {name!r} begins at byte {begin}, but the one before it ends at {end}.")
        end = stop
    if 8 + header_bytes + end != size_bytes:
        raise InvalidFile(f"The tensors end at byte {8 + header_bytes + end}, but the file has {size_bytes}.")
    return {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in header.items()}


def _tensor_span(name: str, entry: Any) -> tuple[int, int]:
    """Begin and end of one tensor, checked against its dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidFile(f"Tensor {name!r} must have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InvalidFile(f"Tensor {name!r} has the unknown dtype {dtype!r}.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise InvalidFile(f"Tensor {name!r} has a shape that is not a short list of sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise InvalidFile(f"Tensor {name!r} has data_offsets that are not two positions.")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise InvalidFile(f"Tensor {name!r} holds {offsets[1] - offsets[0]} bytes, which is not {dtype} x {shape}.")
    return offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


# ---------------------------------------------------------------- onnx


def _onnx_header(file: BinaryIO, size_bytes: int) -> dict[str, Any]:
    """Walk the fields of the outermost protobuf message (ModelProto); the graph itself is skipped."""
    if size_bytes > MAX_ONNX_BYTES:
        raise InvalidFile(f"An ONNX file has at most {MAX_ONNX_BYTES} bytes; this one has {size_bytes}.")
    position, ir_version, num_graphs, opsets = 0, 0, 0, dict[str, int]()
    for _ in range(100_000):
        if position == size_bytes:
            break
        tag, position = _varint(file, position, size_bytes)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(file, position, size_bytes)
            ir_version = value if number == 1 else ir_version
        elif wire == 2:
            length, position = _varint(file, position, size_bytes)
            if length > size_bytes - position:
                _not_onnx()
            num_graphs += number == 7
            if number == 8:
                domain, version = _opset(_read(file, position, min(length, 1024)))
                opsets[domain] = version
            position += length
        else:
            _not_onnx()
    if position != size_bytes or not ir_version or num_graphs != 1 or not opsets:
        _not_onnx()
    return {"ir_version": ir_version, "opsets": opsets}


def _opset(message: bytes) -> tuple[str, int]:
    """OperatorSetIdProto: field 1 is the domain, field 2 the version."""
    domain, version, position = "", 0, 0
    while position < len(message):
        tag = message[position]
        length_or_value = message[position + 1] if position + 1 < len(message) else _not_onnx()
        position += 2
        if tag == 0x0A:
            domain = message[position : position + length_or_value].decode("utf-8", "replace")
            position += length_or_value
        elif tag == 0x10 and length_or_value < 128:
            version = length_or_value
        else:
            _not_onnx()
    return domain, version


def _varint(file: BinaryIO, position: int, size_bytes: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(_read(file, position, min(10, size_bytes - position))):
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, position + index + 1
    return _not_onnx()


def _not_onnx() -> NoReturn:
    raise InvalidFile("This is not an ONNX model: its bytes are not a complete ModelProto.")


# ---------------------------------------------------------------- zip


def _zip_directory(file: BinaryIO, size_bytes: int) -> list[zipfile.ZipInfo]:
    """The archive's entries, vetted; folders and the clutter that desktops add are left out."""
    _check_directory_size(file, size_bytes)
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error, UnicodeError) as error:
        raise InvalidFile(f"The zip archive cannot be read: {error}") from None
    if len(entries) > MAX_ENTRIES:
        raise InvalidFile(f"The zip archive has {len(entries)} entries; at most {MAX_ENTRIES} are accepted.")
    for entry in entries:
        _check_entry(entry)
    _check_layout(entries, size_bytes)
    return [entry for entry in entries if not entry.is_dir() and not CLUTTER & set(entry.filename.split("/"))]


def _check_directory_size(file: BinaryIO, size_bytes: int) -> None:
    """Python's zipfile reads the whole central directory at once, so its size is checked first."""
    tail_begin = max(0, size_bytes - (1 << 16) - 22)
    tail = _read(file, tail_begin, size_bytes - tail_begin)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise InvalidFile("The zip archive has no directory at its end; it is truncated or not a zip.")
    count, directory_bytes = struct.unpack("<HI", tail[at + 10 : at + 16])
    locator = tail[max(0, at - 20) : at]
    if locator[:4] == b"PK\x06\x07":
        (record_at,) = struct.unpack("<Q", locator[8:16])
        record = _read(file, record_at, 56) if record_at + 56 <= size_bytes else b""
        if record[:4] != b"PK\x06\x06":
            raise InvalidFile("The zip archive's 64-bit directory cannot be read.")
        count, directory_bytes = struct.unpack("<QQ", record[32:48])
    if count > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise InvalidFile(
            f"The zip archive announces {count} entries in a directory of {directory_bytes} bytes; "
            f"at most {MAX_ENTRIES} and {MAX_DIRECTORY_BYTES} are accepted."
        )


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/") or "\0" in entry.orig_filename:
        raise InvalidFile(f"The zip entry {name!r} would land outside its folder.")
    kind = entry.external_attr >> 16 & 0o170000
    if kind not in (0, 0o100000, 0o040000):
        raise InvalidFile(f"The zip entry {name!r} is a link or a device, not a file.")
    if entry.flag_bits & 1:
        raise InvalidFile(f"The zip entry {name!r} is encrypted.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidFile(f"The zip entry {name!r} is compressed by a method other than deflate.")
    if entry.file_size > MAX_ENTRY_BYTES:
        raise InvalidFile(f"The zip entry {name!r} unpacks to {entry.file_size} bytes; {MAX_ENTRY_BYTES} is the limit.")


def _check_layout(entries: list[zipfile.ZipInfo], size_bytes: int) -> None:
    """No name twice, no two entries over the same bytes, and no bomb."""
    if len({entry.filename for entry in entries}) < len(entries):
        raise InvalidFile("The zip archive has two entries of the same name.")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise InvalidFile(f"The zip entry {entry.filename!r} overlaps another.")
        end = entry.header_offset + 30 + entry.compress_size
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MAX_UNPACKED_BYTES or unpacked > MAX_UNPACKED_RATIO * size_bytes + MAX_ENTRY_BYTES:
        raise InvalidFile(f"The zip archive of {size_bytes} bytes unpacks to {unpacked} bytes, which is too many.")


def _image_folders(entries: list[zipfile.ZipInfo]) -> dict[str, Any]:
    """Sort entries into `<part>/<folder>/[<group>/]<file>`, and tell what each part holds."""
    folders: dict[str, dict[str, list[str]]] = {}
    groups: dict[str, set[str]] = {}
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if len(path.parts) not in (3, 4) or path.parts[0] not in PARTS:
            raise InvalidFile(
                f"The zip entry {entry.filename!r} lies elsewhere than in <part>/<class>/<image>, "
                f"<part>/images/<image> or <part>/masks/<image>, or in a folder a group of samples below these; "
                f"the parts are {', '.join(PARTS)}."
            )
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise InvalidFile(f"The zip entry {entry.filename!r} is not an image ({known}).")
        group = path.parts[2] if len(path.parts) == 4 else ""
        groups.setdefault(path.parts[0], set()).add(group)
        name = f"{group}/{path.stem}" if group else path.stem
        folders.setdefault(path.parts[0], {}).setdefault(path.parts[1], []).append(name)
    return {part: _part_summary(part, found) | _groups(part, groups[part]) for part, found in sorted(folders.items())}


def _groups(part: str, groups: set[str]) -> dict[str, int]:
    """The number of groups, where the part's samples lie in groups."""
    if groups == {""}:
        return {}
    if "" in groups:
        raise InvalidFile(
            f"Some images of {part} lie in the folder of a group, others in none; put all of them in groups, or none."
        )
    return {"groups": len(groups)}


def _part_summary(part: str, folders: dict[str, list[str]]) -> dict[str, Any]:
    if not set(folders) <= {"images", "masks"}:
        return {"classes": {name: len(files) for name, files in sorted(folders.items())}}
    images, masks = (_distinct_stems(f"{part}/{name}", folders.get(name, [])) for name in ("images", "masks"))
    unmatched = sorted(images ^ masks) if masks else []
    return {"images": len(images), "masks": len(masks), "unmatched": unmatched[:5]}


def _distinct_stems(folder: str, stems: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for stem in stems:
        if stem in found:
            raise InvalidFile(f"{folder} has two files named {stem!r} that differ only in their suffix.")
        found.add(stem)
    return found


def _read(file: BinaryIO, position: int, length: int) -> bytes:
    file.seek(position)
    found = file.read(length)
    if len(found) < length:
        raise InvalidFile(f"The file ends at byte {position + len(found)}, where more bytes belong.")
    return found
