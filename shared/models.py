"""The tables. Statuses are text with a CHECK; the partial indexes match the ledger's queries."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TEXT
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from uuid6 import uuid7

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

JOB_STATUSES = ("queued", "running", "succeeded", "failed", "cancelled")
JOB_TERMINAL = ("succeeded", "failed", "cancelled")
STAGE_STATUSES = ("pending", "running", "succeeded", "failed", "dropped", "cached", "skipped")
STAGE_DONE = ("succeeded", "dropped", "cached", "skipped")
ARTIFACT_STATUSES = ("pending", "ready")
TOLD_MD5 = "md5(COALESCE(state_reason ->> 'message', ''))"  # of what a job's owner is told


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: DateTime(timezone=True),
        str: TEXT,
        dict[str, Any]: JSONB(none_as_null=True),
        list[Any]: JSONB,
        list[str]: ARRAY(TEXT),
    }


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class Account(Base):
    """Who owns jobs and artifacts; other accounts' rows read as missing.

    Limits of its own are stronger than the service's.
    """

    __tablename__ = "accounts"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    max_active_jobs: Mapped[int | None]
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)


class AccountUsage(Base):
    """What an account has, counted by triggers: its queued and running jobs, and the bytes of its announced uploads.

    It is the sum of several rows, each written by other connections, so that commits of one account need not wait for
    each other.
    """

    __tablename__ = "account_usage"

    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"), primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    active_jobs: Mapped[int]
    stored_bytes: Mapped[int] = mapped_column(BigInteger)


class ApiKey(Base):
    """A key's SHA-256; the key itself is shown once and kept nowhere."""

    __tablename__ = "api_keys"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    key_sha256: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    revoked_at: Mapped[datetime | None]


class Job(Base):
    """One order and where it stands. Only shared/lifecycle.py writes `status`.

    `attempt` counts claims and names artifacts' keys, so it never falls. `lease_token` fences the one worker that
    holds the job. `crashes` counts child deaths without progress between them. `input_sha256` is the same for jobs
    that compute the same with the same bytes.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        _one_of("status", JOB_STATUSES),
        CheckConstraint("attempt <= max_attempts", name="attempt"),
        CheckConstraint("(status = 'running') = (lease_token IS NOT NULL)", name="lease"),
        Index(
            "ix_jobs_next",
            *("queue", "requires", "account_id", text("priority DESC"), "id"),
            postgresql_where=text("status = 'queued'"),
        ),
        Index(
            "ix_jobs_waiting",
            *("queue", "requires", text(TOLD_MD5), "required_memory_bytes"),
            postgresql_where=text("status = 'queued'"),
        ),
        Index("ix_jobs_running", "account_id", postgresql_where=text("status = 'running'")),
        Index("ix_jobs_served", "account_id", "started_at", postgresql_where=text("started_at IS NOT NULL")),
        Index("ix_jobs_lease", "lease_expires_at", postgresql_where=text("status = 'running'")),
        Index("ix_jobs_list", "account_id", "id"),
        Index("ix_jobs_list_by_status", "account_id", "status", "id"),
        Index("ix_jobs_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
        Index("ix_jobs_tags", "tags", postgresql_using="gin"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    name: Mapped[str]
    tags: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    recipe: Mapped[dict[str, Any]]
    requires: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    required_memory_bytes: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    queue: Mapped[str] = mapped_column(server_default="default")
    priority: Mapped[int] = mapped_column(server_default=text("0"))
    retry_of: Mapped[UUID | None]  # not a foreign key: the job that it names may be deleted before this one
    input_sha256: Mapped[str | None]
    use_cache: Mapped[bool] = mapped_column(server_default=text("true"))

    status: Mapped[str] = mapped_column(server_default="queued")
    state_reason: Mapped[dict[str, Any] | None]
    attempt: Mapped[int] = mapped_column(server_default=text("0"))
    max_attempts: Mapped[int] = mapped_column(server_default=text("3"))
    crashes: Mapped[int] = mapped_column(server_default=text("0"))
    timeout_seconds: Mapped[float]

    worker_id: Mapped[str | None]
    lease_token: Mapped[UUID | None]
    lease_expires_at: Mapped[datetime | None]
    available_at: Mapped[datetime] = mapped_column(server_default=func.now())
    cancel_requested_at: Mapped[datetime | None]

    baseline: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None]
    verdict: Mapped[str | None]
    last_sequence: Mapped[int] = mapped_column(server_default=text("0"))

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class StageRun(Base):
    """One stage of one job. `report` is its StageReport once it has ended; stages of one `cache_key` make the same."""

    __tablename__ = "stage_runs"
    __table_args__ = (
        _one_of("status", STAGE_STATUSES),
        Index("ix_stage_runs_cache_key", "cache_key", postgresql_where=text("cache_key IS NOT NULL")),
    )

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="pending")
    attempt: Mapped[int | None]
    progress: Mapped[float] = mapped_column(server_default=text("0"))
    message: Mapped[str | None]
    report: Mapped[dict[str, Any] | None]
    cache_key: Mapped[str | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobEvent(Base):
    """What happened to a job, in a gapless sequence, written with the change that it tells of.

    `lease_token` is that of the worker who wrote it; what its owner and the sweeper wrote has none.
    """

    __tablename__ = "job_events"

    job_id: Mapped[UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    attempt: Mapped[int]
    lease_token: Mapped[UUID | None]
    kind: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))


class Artifact(Base):
    """A file in object storage under an immutable key: an upload, or what a stage left.

    `etag` is the object's from when its bytes were known to be right: while it is the same, so are they.
    `summary` is what its header told without parsing the rest (tensor names and shapes, images by part).
    """

    __tablename__ = "artifacts"
    __table_args__ = (
        _one_of("status", ARTIFACT_STATUSES),
        ForeignKeyConstraint(
            ["job_id", "stage_position"], ["stage_runs.job_id", "stage_runs.position"], ondelete="CASCADE"
        ),
        UniqueConstraint("job_id", "name"),
        Index("ix_artifacts_digest", "account_id", "sha256", "format"),
        Index("ix_artifacts_expiry", "expires_at", postgresql_where=text("status = 'pending'")),
        Index("ix_artifacts_checkpoints", "job_id", postgresql_where=text("role = 'checkpoint'")),
        Index(
            "uq_artifacts_timings",
            "account_id",
            "name",
            unique=True,
            postgresql_where=text("role = 'timings' AND status = 'ready'"),
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    stage_position: Mapped[int | None]
    attempt: Mapped[int | None]
    role: Mapped[str]
    name: Mapped[str]
    format: Mapped[str]
    key: Mapped[str] = mapped_column(unique=True)
    sha256: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    etag: Mapped[str | None]
    status: Mapped[str] = mapped_column(server_default="pending")
    multipart_id: Mapped[str | None]
    summary: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]


class IdempotencyKey(Base):
    """A submit's key and the request it belongs to: the same again gives the same job."""

    __tablename__ = "idempotency_keys"

    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[str]
    job_id: Mapped[UUID] = mapped_column(index=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Quarantine(Base):
    """An input that crashed its job's process again and again, until an operator releases it or a job gets through."""

    __tablename__ = "quarantines"

    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"), primary_key=True)
    input_sha256: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[UUID]  # the first job that crashed with it; it may be deleted before this row
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Worker(Base):
    """A worker that said what it can do, and when it was last heard."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    hostname: Mapped[str]
    queues: Mapped[list[str]]
    capabilities: Mapped[list[str]]
    cores: Mapped[int]
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    details: Mapped[dict[str, Any]]
    job_id: Mapped[UUID | None]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.now())
