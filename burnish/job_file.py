"""Reads a job file: a JobRequest in YAML, in which a local file may stand wherever an uploaded artifact is named.

Everything that can be known without the service is checked here, before a byte is sent: the YAML, the request, that
the files are there, and what their headers hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

import yaml
from pydantic import ValidationError

from burnish.errors import BadInput
from shared.datasets import check_data
from shared.errors import UserError
from shared.formats import SEND_DATA, SEND_WEIGHTS, inspect_file
from shared.recipe import Recipe
from shared.schemas import FieldError, JobRequest, UploadFormat

# Where a job names an artifact, and in which formats it may come.
PLACES: dict[tuple[str, ...], tuple[UploadFormat, ...]] = {
    ("recipe", "source", "weights"): ("safetensors",),
    ("recipe", "source", "onnx"): ("onnx",),
    ("recipe", "data", "artifact"): ("safetensors", "zip"),
}
FORMATS: tuple[UploadFormat, ...] = get_args(UploadFormat)
CARRY_CODE = frozenset(
    {".pt", ".pth", ".pt2", ".pkl", ".pickle", ".joblib", ".ckpt", ".bin", ".h5", ".hdf5", ".keras", ".pb", ".ptl"}
)
ARRAYS = frozenset({".npy", ".npz", ".tar", ".gz", ".tgz"})
NOT_YET = UUID(int=0)  # stands for the id of a file that is still to be uploaded


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine that a job names."""

    place: tuple[str, ...]
    path: Path
    format: UploadFormat


@dataclass(frozen=True)
class Draft:
    """A checked job whose local files are still to be uploaded."""

    document: dict[str, Any]
    files: tuple[LocalFile, ...]

    def request(self, artifacts: dict[Path, UUID]) -> JobRequest:
        """The request, once every local file is an artifact."""
        document = deepcopy(self.document)
        for file in self.files:
            _parent(document, file.place)[file.place[-1]] = str(artifacts[file.path])
        return JobRequest.model_validate(document)


def read_job_file(path: Path) -> Draft:
    """The job that a YAML file describes; its paths are relative to the file.

    Raises:
        BadInput: with one sentence, and the line of each mistake.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not a text file.", hint="A job file is YAML; see 'burnish submit --help'.") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from None
    try:
        tree = yaml.compose(text, Loader=_Loader)
        document = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadInput(f"{path}{where}: this is not valid YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: this is not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise BadInput(f"{path} must hold a mapping with name and recipe.")
    try:
        return draft(document, path.parent)
    except BadInput as error:
        errors = [
            FieldError(location=_with_line(tree, found.location), message=found.message) for found in error.errors
        ]
        raise BadInput(f"{path}: {error.detail}", hint=error.hint, errors=errors) from None


def draft(document: dict[str, Any], directory: Path = Path()) -> Draft:
    """Check a request whose artifacts may be paths relative to `directory`. Raises BadInput."""
    document = deepcopy(document)
    files = tuple(_take_files(document, directory))
    try:
        request = JobRequest.model_validate(document)
    except ValidationError as error:
        errors = [
            FieldError(location=_location(document, found["loc"]), message=_sentence(found)) for found in error.errors()
        ]
        raise BadInput("the job does not hold together.", errors=errors) from None
    for file in files:
        _inspect(file, request.recipe)
    return Draft(document, files)


def format_of(path: Path) -> UploadFormat:
    """A file's format by its suffix; a format that is not accepted is refused with what to send instead."""
    suffix = path.suffix.lower()
    for format in FORMATS:
        if suffix == f".{format}":
            return format
    if suffix in CARRY_CODE:
        raise BadInput(f"{path.name}: a {suffix} file can carry code, so it is not accepted.", hint=SEND_WEIGHTS)
    if suffix in ARRAYS:
        raise BadInput(f"{path.name}: {suffix} files are not accepted.", hint=SEND_DATA)
    raise BadInput(
        f"{path.name}: the suffix {suffix or '(none)'} tells no format.",
        hint=f"Files end in {', '.join(f'.{format}' for format in FORMATS)}.",
    )


# ---------------------------------------------------------------- local files


def _take_files(document: dict[str, Any], directory: Path) -> Iterator[LocalFile]:
    """Every local file that the document names; an id that is still to come is put in its place."""
    for place, formats in PLACES.items():
        parent = _parent(document, place)
        value = parent.get(place[-1])
        if not isinstance(value, str | Path) or _is_id(value):
            continue
        path = directory / Path(value).expanduser()
        try:
            format = format_of(path)
        except BadInput as error:
            raise _at(place, error.detail, hint=error.hint) from None
        if format not in formats:
            wanted = " or ".join(f".{name}" for name in formats)
            raise _at(place, f"{path.name} has the suffix .{format}; a file in {wanted} belongs here.")
        if path.is_dir():
            raise _at(place, f"{path} is a folder; name a file.", hint="Zip a folder of images.")
        if not path.is_file():
            raise _at(place, f"{path} is not there.")
        parent[place[-1]] = str(NOT_YET)
        yield LocalFile(place, path, format)


def _inspect(file: LocalFile, recipe: Recipe) -> None:
    """Hold a file's header against its format, and a data set's against the task."""
    try:
        with file.path.open("rb") as opened:
            summary = inspect_file(opened, file.path.stat().st_size, file.format)
        if file.place[1] == "data":
            parts, preprocessing = recipe.parts(), recipe.data.preprocessing
            check_data(summary, file.format, recipe.task, parts, preprocessing)
    except UserError as error:
        raise _at(file.place, f"{file.path.name}: {error.detail}", hint=error.hint) from None
    except OSError as error:
        raise _at(file.place, f"{file.path} cannot be read: {error.strerror}.") from None


def _at(place: tuple[str, ...], message: str, hint: str | None = None) -> BadInput:
    where = FieldError(location=".".join(place), message=message)
    return BadInput("a file that the job names cannot be used.", hint=hint, errors=[where])


def _is_id(value: str | Path) -> bool:
    try:
        UUID(str(value))
    except ValueError:
        return False
    return True


def _parent(document: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    """The mapping that holds a place's last name; an empty one if the document has none there."""
    found: Any = document
    for name in place[:-1]:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------- what is wrong, and where


def _sentence(found: Any) -> str:
    """A validation error in the words of a job file."""
    if found["type"] == "extra_forbidden":
        return "is not a known field"
    if found["type"] == "missing":
        return "is missing"
    return str(found["msg"]).removeprefix("Value error, ")


def _location(document: Any, steps: tuple[int | str, ...]) -> str:
    """Dotted path of an error, without the names of union members that pydantic puts between."""
    names, found = list[str](), document
    for index, step in enumerate(steps):
        in_mapping = isinstance(found, dict) and step in found
        in_list = isinstance(found, list) and isinstance(step, int) and step < len(found)
        if in_mapping or in_list:
            found = found[step]
        elif index < len(steps) - 1 or not isinstance(found, dict):
            continue
        names.append(str(step))
    return ".".join(names)


def _with_line(tree: yaml.Node | None, location: str) -> str:
    """The location with the line in the file that it, or what is nearest above it, stands on."""
    line = tree.start_mark.line + 1 if tree else 1
    for name in location.split("."):
        found = _child(tree, name)
        if found is None:
            break
        line, tree = found
    return f"{location} (line {line})" if location else f"line {line}"


def _child(tree: yaml.Node | None, name: str) -> tuple[int, yaml.Node] | None:
    if isinstance(tree, yaml.MappingNode):
        for key, value in tree.value:
            if key.value == name:
                return key.start_mark.line + 1, value
    if isinstance(tree, yaml.SequenceNode) and name.isdecimal() and int(name) < len(tree.value):
        node = tree.value[int(name)]
        return node.start_mark.line + 1, node
    return None


class _Loader(yaml.SafeLoader):
    """YAML in which a name that occurs twice in one mapping is an error, not a silent last word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = list[Any]()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} occurs twice in one mapping", key.start_mark
                )
            seen.append(key.value)
        return super().construct_mapping(node, deep)
