"""What the child and its supervisor say to each other: JSON lines over one socket.

The child speaks, the supervisor answers what it has committed. Everything that arrives from the child is checked
against these schemas: the child has parsed a stranger's file and is not trusted.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Discriminator, Field, TypeAdapter

from shared.errors import Fault
from shared.recipe import Recipe
from shared.report import Baseline, Report, StageReport
from shared.storable import why_not_storable
from worker.causes import MachineFault
from worker.wording import legible

MAX_LINE_BYTES = 8 * 2**20
MAX_CODE, MAX_MESSAGE, MAX_HINT, MAX_PROGRESS = 60, 4000, 2000, 500  # characters
TICKET = "ticket.json"
PICTURE = "source-sample.png"  # one preprocessed sample, which the child may leave in its directory


class Word(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------- from the supervisor


class FinishedStage(Word):
    """A stage that an earlier attempt finished: its report, and its files by role, fetched again."""

    report: StageReport
    files: dict[str, Path]


class Cached(Word):
    """What an earlier job made of stages that this one has too, and the baseline that its figures belong to."""

    baseline: Baseline | None
    stages: list[FinishedStage]


CheckpointName = Annotated[str, Field(max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Checkpoint(Word):
    """What an earlier attempt at an unfinished stage had saved under a name, fetched again."""

    position: int
    name: CheckpointName
    path: Path


TimingsName = Annotated[str, Field(max_length=150, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Timing(Word):
    """Kernel timings that an earlier job of the account had saved under a name, fetched again."""

    name: TimingsName
    path: Path


class Ticket(Word):
    """The child's whole order, left in its directory."""

    job_id: UUID
    name: str
    attempt: int
    recipe: Recipe
    source: Path
    source_sha256: str
    data: Path
    data_format: Literal["safetensors", "zip"]
    data_sha256: str
    baseline: Baseline | None
    finished: list[FinishedStage]
    cached: Cached | None = None
    checkpoints: list[Checkpoint] = []
    timings: list[Timing] = []
    threads: int


# ---------------------------------------------------------------- from the child


Position = Annotated[int, Field(ge=0, lt=2**31)]  # what the ledger's column holds


class Progressed(Word):
    kind: Literal["progressed"] = "progressed"
    position: Position | None
    fraction: float = Field(ge=0, le=1)
    message: str = Field(max_length=MAX_PROGRESS)


class BaselineMeasured(Word):
    kind: Literal["baseline_measured"] = "baseline_measured"
    baseline: Baseline


class StageStarted(Word):
    kind: Literal["stage_started"] = "stage_started"
    position: Position


# Those of `Model.files`: a role that the ledger has a use for is not the child's to give.
Role = Annotated[
    str,
    Field(
        max_length=80,
        pattern=r"^(model|graph|engine(\.[a-z0-9._-]+)?|form\.[a-z_]+\.[a-z0-9+]+(\.[a-z0-9-]+)?(\.weights)?)$",
    ),
]


class File(Word):
    """A file that the child left in its directory, to be hashed again and stored."""

    role: Role
    name: str = Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    format: str = Field(max_length=40)
    path: Path


class StageFinished(Word):
    """A stage's end. `report.artifacts` is filled in by the supervisor, from what it hashed itself."""

    kind: Literal["stage_finished"] = "stage_finished"
    report: StageReport
    files: list[File] = Field(max_length=100)


class Checkpointed(Word):
    """A file that a later attempt at the running stage would go on from, to be hashed again and stored."""

    kind: Literal["checkpointed"] = "checkpointed"
    position: Position
    name: CheckpointName
    path: Path


class Timed(Word):
    """Kernel timings that the account's later jobs would build faster with, to be hashed again and stored."""

    kind: Literal["timed"] = "timed"
    name: TimingsName
    path: Path


class Finished(Word):
    kind: Literal["finished"] = "finished"
    report: Report


class Failed(Word):
    """The job's end, or with a `cause` the attempt's: the machine's fault, and another one may do better."""

    kind: Literal["failed"] = "failed"
    position: Position | None
    code: str = Field(max_length=MAX_CODE)
    message: str = Field(max_length=MAX_MESSAGE)
    hint: str | None = Field(default=None, max_length=MAX_HINT)
    fault: Fault
    cause: MachineFault | None = None


Said = Annotated[
    Progressed | BaselineMeasured | StageStarted | Checkpointed | Timed | StageFinished | Finished | Failed,
    Discriminator("kind"),
]
_SAID: TypeAdapter[Said] = TypeAdapter(Said)


def parse(line: bytes) -> Said:
    """One line of the child's.

    Raises:
        ValueError: it is none of the protocol, or the ledger could not keep it.
    """
    said = _SAID.validate_json(line)
    why_not = why_not_storable(_SAID.dump_python(said, mode="json"))
    if why_not is not None:
        raise ValueError(why_not)
    return said


class Mouth:
    """The child's end of the socket."""

    def __init__(self, file_descriptor: int) -> None:
        self._socket = socket.socket(fileno=file_descriptor)
        self._answers = self._socket.makefile("rb")

    def tell(self, said: Said) -> None:
        """Say something that needs no answer; the names in a stranger's file are made legible."""
        told = _legible(said.model_dump(mode="json"))
        self._socket.sendall(json.dumps(told, ensure_ascii=False).encode() + b"\n")

    def ask(self, said: Said) -> dict[str, Any]:
        """Say something and wait until it is committed; the answer holds what the supervisor added to it."""
        self.tell(said)
        line = self._answers.readline()
        if not line:
            raise SystemExit("the supervisor is gone")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _legible(value: Any) -> Any:
    """The same JSON with every text in it as the ledger can keep it."""
    match value:
        case str():
            return legible(value)
        case list():
            return [_legible(item) for item in value]
        case dict():
            return {_legible(key): _legible(item) for key, item in value.items()}
    return value


class Ear:
    """The supervisor's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._pending = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def lines(self) -> list[bytes] | None:
        """The whole lines that have arrived; None once the child has closed its end.

        Raises:
            ValueError: a line is longer than any honest one.
        """
        try:
            data = self._socket.recv(2**16)
        except ConnectionResetError:
            return None
        if not data:
            return None
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > MAX_LINE_BYTES:
            raise ValueError(f"the child sent a line of more than {MAX_LINE_BYTES} bytes")
        return lines

    def answer(self, facts: dict[str, Any]) -> None:
        """Tell the child that what it said is committed; one that has just ended is noticed by `lines`."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(json.dumps(facts).encode() + b"\n")
