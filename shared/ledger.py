"""What goes into the ledger and what comes out of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import UUID

from pydantic import ValidationError

from shared.errors import InvalidRecipe
from shared.models import Job
from shared.recipe import Recipe


def input_digest(recipe: Recipe, source_sha256: str | None = None, data_sha256: str | None = None) -> str:
    """sha256 of all that a job computes with: its model's bytes, its data's, and what is done with them.

    A file whose digest is not told stands for itself by its id: its bytes never change.
    """
    asked = recipe.model_dump(mode="json", exclude={"source": {"weights", "onnx"}, "data": {"artifact"}})
    files = [source_sha256 or str(recipe.source.artifact_id), data_sha256 or str(recipe.data.artifact)]
    return hashlib.sha256(json.dumps([files, asked], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Order:
    """What is to be submitted, already validated."""

    account_id: UUID
    name: str
    recipe: Recipe
    timeout_seconds: float
    max_attempts: int = 3
    tags: Sequence[str] = ()
    queue: str = "default"
    priority: int = 0
    required_memory_bytes: int = 0
    retry_of: UUID | None = None
    input_sha256: str | None = None
    use_cache: bool = True

    @classmethod
    def again(cls, job: Job, given_back: int = 0) -> Order:
        """The order that a job was submitted with, as one that repeats it; each attempt given back raised the maximum.

        Raises:
            InvalidRecipe: the language has changed since, and the recipe is no longer one.
        """
        try:
            recipe = Recipe.model_validate(job.recipe)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise InvalidRecipe(f"The recipe is from an older version of Burnish: {place}: {problem['msg']}") from None
        return cls(
            account_id=job.account_id,
            name=job.name,
            recipe=recipe,
            timeout_seconds=job.timeout_seconds,
            max_attempts=job.max_attempts - given_back,
            tags=job.tags,
            queue=job.queue,
            priority=job.priority,
            required_memory_bytes=job.required_memory_bytes,
            retry_of=job.id,
            input_sha256=job.input_sha256,
            use_cache=job.use_cache,
        )

    def values(self) -> dict[str, Any]:
        """What the tables need, by column; `kinds` are the stages', in their order."""
        recipe = {
            "recipe": self.recipe.model_dump_json(),
            "requires": self.recipe.requirements(),
            "kinds": [stage.kind for stage in self.recipe.stages],
        }
        known = self.input_sha256 or input_digest(self.recipe)
        return {**self.__dict__, "tags": list(self.tags), **recipe, "input_sha256": known}

    def digest(self) -> str:
        """sha256 of all that was asked."""
        facts = [self.name, self.recipe.model_dump(mode="json"), self.timeout_seconds, self.max_attempts]
        facts += [list(self.tags), self.queue, self.priority, str(self.retry_of)]
        facts += [] if self.use_cache else ["no cache"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Capacity:
    """Who claims, and what it can do."""

    worker_id: str
    queues: Sequence[str]
    capabilities: Sequence[str]
    memory_bytes: int


@dataclass(frozen=True)
class Lease:
    """The right to write to a running job, until another claims it."""

    job_id: UUID
    token: UUID


@dataclass(frozen=True)
class Claim:
    """A claimed job: all that its worker needs to know.

    `held_since` is the moment, by the monotonic clock, before which its lease cannot have begun.
    """

    lease: Lease
    held_since: float
    account_id: UUID
    name: str
    queue: str
    attempt: int
    recipe: dict[str, Any]
    baseline: dict[str, Any] | None
    use_cache: bool = True


@dataclass(frozen=True)
class Heartbeat:
    cancel_requested: bool
    overdue: bool
    last_sequence: int


@dataclass(frozen=True)
class Progress:
    """How far the running stage is, 0..1. Position None: the baseline is being measured."""

    position: int | None
    fraction: float
    message: str


@dataclass(frozen=True)
class Stored:
    """An object that is in storage under its final key, to be pointed to by an artifact row."""

    role: str
    name: str
    format: str
    key: str
    sha256: str
    size_bytes: int
    etag: str | None = None


@dataclass(frozen=True)
class Reason:
    """Why a job is where it is, for its owner."""

    code: str
    message: str
    hint: str | None = None
    stage: int | None = None
    fault: Literal["user", "platform"] = "platform"

    def after(self, sentence: str, code: str | None = None) -> Reason:
        """The same as the last cause of an end that `sentence` tells of."""
        return replace(self, code=code or self.code, message=f"{sentence} Last: {self.message}")

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if value is not None}
