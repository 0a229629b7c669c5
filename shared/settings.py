"""Every setting of the service, read from the environment with the prefix BURNISH_."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_SECRET = "burnish-insecure-default"
DEFAULT_DATABASE_URL = f"postgresql+psycopg://burnish:{DEFAULT_SECRET}@127.0.0.1:5432/burnish"


@lru_cache
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()


class Settings(BaseSettings):
    """Where the servers are, who may use them, and the service's limits.

    Times are in seconds, sizes in bytes. Outside local mode the default secrets are refused.
    """

    model_config = SettingsConfigDict(env_prefix="BURNISH_", frozen=True)

    local: bool = False

    database_url: str = Field(default=DEFAULT_DATABASE_URL, repr=False)
    broker_url: str = Field(default="redis://127.0.0.1:6379/0", repr=False)
    s3_endpoint_url: str = "http://127.0.0.1:8333"
    s3_public_endpoint_url: str | None = None  # what a client reaches, if not the same
    s3_region: str = "us-east-1"
    s3_bucket: str = "burnish"
    s3_access_key: str = "burnish"
    s3_secret_key: SecretStr = SecretStr(DEFAULT_SECRET)
    secret_key: SecretStr = SecretStr(DEFAULT_SECRET)  # signs list cursors
    transfer_seconds: float = 60.0  # how long a file may take to or from storage,
    transfer_bytes_per_second: float = 100_000.0  # and a second more for every so many bytes of it

    # the ledger
    statement_seconds: float = 20.0  # how long a statement may take
    lock_seconds: float = 10.0  # how long it may wait for a row that another one holds
    heartbeat_seconds: float = 1.0
    lease_seconds: float = 15.0
    sweep_seconds: float = 2.0
    poll_seconds: float = 3.0  # how often an idle worker looks without having been rung
    max_attempts: int = 3
    retry_delay_seconds: float = 2.0
    job_timeout_seconds: float = 6 * 3600

    # the worker
    worker_queues: list[str] = ["default"]
    work_directory: Path = Path("/tmp/burnish")
    worker_threads: int | None = None  # None: every core of the machine
    worker_memory_bytes: int | None = None  # None: the machine's memory
    timing_lock: Path = Path("/tmp/burnish-timing.lock")  # held while a model is timed; one file a machine
    drain_seconds: float = 20.0  # how long a worker told to stop waits for the running stage's end
    stall_seconds: float = 900.0  # a child that says nothing for so long is taken for dead

    # the api
    max_waiting: int = Field(default=5_000, ge=1)  # long polls and event streams at once, in one process

    # uploads
    max_upload_bytes: int = 20 * 2**30
    upload_part_bytes: int = 64 * 2**20
    presign_seconds: int = 3600

    # what one account may have at once, unless it has limits of its own
    max_active_jobs_per_account: int = Field(default=5_000, ge=0)  # queued and running
    max_stored_bytes_per_account: int = Field(default=200 * 2**30, ge=0)  # of uploads

    # what is kept
    job_retention_days: float | None = Field(default=None, ge=0)  # None or 0: ended jobs are kept for ever
    orphan_grace_seconds: float = 86400.0  # how old a file is that nothing points to before it is removed
    gc_seconds: float = 3600.0  # how often the sweeper looks for what nobody keeps any more

    log_level: str = "INFO"

    @model_validator(mode="after")
    def _refuse_default_secrets(self) -> Self:
        if not self.local:
            secrets = {name: getattr(self, name).get_secret_value() for name in ("secret_key", "s3_secret_key")}
            for name, value in {**secrets, "database_url": self.database_url, "broker_url": self.broker_url}.items():
                if DEFAULT_SECRET in value:
                    raise ValueError(f"set BURNISH_{name.upper()}: the default secret is only for local mode")
        if self.lease_seconds < 3 * self.heartbeat_seconds:
            raise ValueError("BURNISH_LEASE_SECONDS must be at least three heartbeats long")
        if self.orphan_grace_seconds < max(self.presign_seconds, self.lease_seconds):
            raise ValueError("BURNISH_ORPHAN_GRACE_SECONDS must be longer than an upload's URL and a lease hold")
        return self
