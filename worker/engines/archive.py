"""The engine artifact: one zip that holds the engine, the portable ONNX, and a manifest that tells how to use them.

Everything is stored as it is, in a fixed order and without times, so that the same engine gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import DigestMismatch, InvalidFile
from shared.recipe import Preprocessing, Task
from shared.targets import Batches

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**20
CHUNK_BYTES = 2**20
EPOCH = (1980, 1, 1, 0, 0, 0)


class Port(BaseModel):
    """An input or output: a dimension that varies is null."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dtype: Literal["float32", "int64"] = "float32"
    shape: list[int | None]


class File(BaseModel):
    """A file of the archive. Engine files are those that the runtime loads; the portable ONNX may be one of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    role: Literal["engine", "portable"]
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an engine is and how it is used. `entry` is the file that the runtime opens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    engine: Literal["onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"]
    target: str
    compute_capability: str | None = None  # of the GPUs that an engine of TensorRT for RTX was built for
    batches: Batches | None = None  # that an engine of TensorRT takes
    precision: str
    entry: str
    portable: str
    inputs: list[Port]
    outputs: list[Port]
    preprocessing: Preprocessing
    task: Task
    versions: dict[str, str]
    instruction_sets: list[str] = []  # of the CPU that the engine was measured on; older engines do not name them
    files: list[File]


def write(path: Path, manifest: Manifest, files: dict[str, Path]) -> None:
    """Pack the files, by name, behind their manifest."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        content = manifest.model_dump_json(indent=2).encode()
        _add(archive, MANIFEST, io.BytesIO(content), len(content))
        for entry in manifest.files:
            with files[entry.name].open("rb") as file:
                _add(archive, entry.name, file, entry.size_bytes)


def note(name: str, path: Path, role: Literal["engine", "portable"]) -> File:
    """A file's line in the manifest."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return File(name=name, role=role, size_bytes=path.stat().st_size, sha256=sha256)


def _add(archive: zipfile.ZipFile, name: str, file: BinaryIO, size_bytes: int) -> None:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    entry.file_size = size_bytes
    with archive.open(entry, "w") as target:
        shutil.copyfileobj(file, target, CHUNK_BYTES)


def read(path: Path, directory: Path) -> Manifest:
    """Unpack an engine into `directory` and return its manifest.

    Only plain files that the manifest names leave the archive, each by its announced size and digest.
    Raises InvalidFile, DigestMismatch.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(archive)
            for entry in manifest.files:
                _extract(archive, entry, directory)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as error:
        raise InvalidFile(f"This is not an engine made by Burnish: {error}") from None
    return manifest


def _manifest(archive: zipfile.ZipFile) -> Manifest:
    with archive.open(MANIFEST) as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise InvalidFile(f"The engine's manifest is not valid: {error.errors()[0]['msg']}") from None
    names = [entry.name for entry in manifest.files]
    if sorted([MANIFEST, *names]) != sorted(archive.namelist()):
        raise InvalidFile("The engine's archive does not hold exactly the files that its manifest names.")
    if any(PurePosixPath(name).name != name or name in ("", ".", "..") or "\\" in name for name in names):
        raise InvalidFile("The engine's manifest names a file outside its folder.")
    if manifest.entry not in names or manifest.portable not in names:
        raise InvalidFile("The engine's manifest names an entry that is not in it.")
    return manifest


def _extract(archive: zipfile.ZipFile, entry: File, directory: Path) -> None:
    found, left = hashlib.sha256(), entry.size_bytes
    with archive.open(entry.name) as source, (directory / entry.name).open("xb") as target:
        while chunk := source.read(CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                break
            found.update(chunk)
            target.write(chunk)
    if left != 0 or found.hexdigest() != entry.sha256:
        raise DigestMismatch(f"The engine's file {entry.name!r} is not the one that its manifest names.")
