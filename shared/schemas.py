"""What travels over HTTP: the bodies of requests and answers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import Fault
from shared.recipe import Recipe
from shared.report import Verdict
from shared.storable import why_not_storable
from shared.targets import Target as EngineTarget

UploadFormat = Literal["safetensors", "onnx", "zip"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
StageStatus = Literal["pending", "running", "succeeded", "failed", "dropped", "cached", "skipped"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Tag = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9._:-]+$")]


ONE_LINE = r"^[^\x00-\x1f\x7f\u2028\u2029\u202a-\u202e\u2066-\u2069]+$"  # no control, no change of direction


class Body(BaseModel):
    """A request's body: an unknown field is an error, so that a misspelt one is noticed."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _can_be_kept(cls, value: Any) -> Any:
        if isinstance(value, dict) and (reason := why_not_storable(value)):
            raise ValueError(reason)
        return value


class UploadRequest(Body):
    """A file that is about to be uploaded."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[^/\\\x00-\x1f]+$", examples=["unet.safetensors"])
    format: UploadFormat
    size_bytes: int = Field(gt=0)
    sha256: Sha256


class UploadPart(BaseModel):
    """PUT the bytes offset..offset+size_bytes of the file to `url`."""

    number: int
    url: str
    offset: int
    size_bytes: int


class Upload(BaseModel):
    """Where to send a file's bytes. Status `ready`: the account has this very file, nothing is to be sent."""

    id: UUID
    status: Literal["pending", "ready"]
    name: str
    format: UploadFormat
    size_bytes: int
    sha256: str
    parts: list[UploadPart] = Field(description="One PUT each; then POST to /v1/uploads/{id}/complete.")
    summary: dict[str, Any] = Field(default_factory=dict, description="What the file's header told, once complete.")
    expires_at: datetime | None = Field(description="When a pending upload is forgotten.")


class JobRequest(Body):
    """An order: a recipe, and how it is to be run."""

    name: str = Field(min_length=1, max_length=200, pattern=ONE_LINE, examples=["brain-mri-unet"])
    tags: list[Tag] = Field(default_factory=list, max_length=20)
    recipe: Recipe
    priority: int = Field(default=0, ge=-100, le=100, description="Higher runs first among the account's own jobs.")
    queue: str = Field(default="default", pattern=r"^[a-z0-9-]{1,40}$")
    timeout_seconds: float | None = Field(default=None, gt=0, le=7 * 86400, description="From its first start.")
    max_attempts: int | None = Field(default=None, ge=1, le=10)
    cache: bool = Field(default=True, description="Take what earlier jobs of the account made by the same stages.")


class StateReason(BaseModel):
    """Why a job waits, failed or was cancelled."""

    code: str
    message: str
    hint: str | None = None
    stage: int | None = None
    fault: Fault = "platform"


class StageView(BaseModel):
    position: int
    kind: str
    status: StageStatus
    attempt: int | None
    progress: float = Field(description="0..1")
    message: str | None
    started_at: datetime | None
    finished_at: datetime | None


class Job(BaseModel):
    """One job as its owner sees it."""

    id: UUID
    url: str
    name: str
    tags: list[str]
    status: JobStatus
    state_reason: StateReason | None
    verdict: Verdict | None = Field(
        description="met: every goal is met, as far as its 95 % bound. not_shown: the figures lie inside the goals, a "
        "bound does not. no_gain: neither smaller nor faster. null before the job has succeeded."
    )
    headline: str | None = Field(
        default=None,
        description="Of one job that left a report: its verdict in words. null in lists, and before.",
        examples=["The model of stage 2 (build_engine) is delivered; it meets every goal."],
    )
    warnings: list[str] = Field(default_factory=list, description="What the report warns of; empty in lists.")
    attempt: int
    max_attempts: int
    priority: int
    queue: str
    retry_of: UUID | None
    cancel_requested_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    last_sequence: int = Field(description="Sequence number of the job's newest event; the ETag follows it.")
    stages: list[StageView]
    recipe: Recipe | dict[str, Any] = Field(
        union_mode="left_to_right", description="As it was ordered, maybe in the language of another version."
    )


class JobList(BaseModel):
    """A page of jobs, newest first. `next_cursor` is null on the last page."""

    items: list[Job]
    next_cursor: str | None


class Note(BaseModel):
    """Advice on a recipe that is valid as it is: at which place, in a sentence or two."""

    location: str = Field(examples=["recipe.goals.0"])
    message: str = Field(
        examples=["15 evaluation samples can show that at most 1.6 points of dice are lost, not the wanted 1 point."]
    )


class Validation(BaseModel):
    """A recipe that would be accepted: what a worker must have to run it, whether one is there now, and advice."""

    valid: Literal[True] = True
    requires: list[str]
    required_memory_bytes: int
    capable_workers: int
    waiting_reason: StateReason | None
    notes: list[Note] = Field(default_factory=list, description="What may surprise: never a reason to refuse the job.")


class Event(BaseModel):
    """One thing that happened to a job; `sequence` has no gaps."""

    sequence: int
    at: datetime
    attempt: int
    kind: str
    data: dict[str, Any]


class EventList(BaseModel):
    items: list[Event]


class Artifact(BaseModel):
    """A file of a job, for download at `url`."""

    name: str
    role: str
    format: str
    stage: int | None
    attempt: int | None
    sha256: str
    size_bytes: int
    url: str
    created_at: datetime


class ArtifactList(BaseModel):
    items: list[Artifact]


class StageKind(BaseModel):
    """A stage of the language: what it takes, gives and needs, and the schema of its words with their defaults."""

    kind: str
    description: str
    consumes: str
    produces: str
    json_schema: dict[str, Any]


class Target(BaseModel):
    """An engine that can be asked of build_engine (`target` is what a recipe says), and how many live workers can
    build it.
    """

    name: str
    target: EngineTarget
    description: str
    workers: int


class Worker(BaseModel):
    """A worker and what it said that it can do."""

    id: str
    hostname: str
    queues: list[str]
    capabilities: list[str]
    cores: int
    memory_bytes: int
    details: dict[str, Any]
    busy: bool
    alive: bool
    started_at: datetime
    heartbeat_at: datetime


class Version(BaseModel):
    version: str
    api: Literal["v1"] = "v1"


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Each server behind the service: ok, or what is wrong with it."""

    status: Literal["ready", "degraded", "unavailable"]
    checks: dict[str, str]


class FieldError(BaseModel):
    """What is wrong at one place of the request."""

    location: str = Field(examples=["recipe.stages.0.scheme"])
    message: str


class Problem(BaseModel):
    """RFC 9457: what went wrong, whose fault it is, and what to do."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None
    code: str
    fault: Fault
    stage: str | None = None
    hint: str | None = None
    retryable: bool
    errors: list[FieldError] = Field(default_factory=list)
