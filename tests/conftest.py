"""The servers of the tests: local mode's, started once; each test has its own database, bucket and queues."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import psycopg
import pytest
import redis
from psycopg import sql
from sqlalchemy import Engine

from burnish.local.apps import environment_of, migrate_command
from burnish.local.servers import running_servers
from shared.db import Sessions, make_sessions
from shared.settings import Settings
from shared.storage import Storage
from worker.save_timer import INTERVAL_VARIABLE

pytest_plugins = ["tests.faults.table"]
_broker_numbers = itertools.cycle(range(1, 4096))


@dataclass(frozen=True)
class Servers:
    """PostgreSQL, Valkey and S3; `template` is the name of a migrated, empty database."""

    settings: Settings
    template: str


@pytest.fixture(scope="session", autouse=True)
def _save_every_epoch() -> Iterator[None]:
    """Trainings of a few seconds are saved as often as those of hours would be.

    By a patch of its own: the fixture `monkeypatch`, set up before all others, would be undone after them, and put
    back what another fixture has patched and a test has patched again.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(INTERVAL_VARIABLE, "0")
        yield


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with (
        tempfile.TemporaryDirectory(prefix="burnish-tests-") as directory,
        running_servers(Path(directory), durable=False) as settings,
    ):
        environment = {**os.environ, **environment_of(settings)}
        subprocess.run(migrate_command(), env=environment, cwd=directory, check=True)
        yield Servers(settings, template="burnish")


@pytest.fixture
def settings(servers: Servers) -> Iterator[Settings]:
    """Settings that lead to a migrated database, a bucket and a broker database that no other test sees."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    shared = servers.settings
    own = shared.model_copy(
        update={
            "database_url": _with_last_part(shared.database_url, name),
            "broker_url": _with_last_part(shared.broker_url, str(next(_broker_numbers))),
            "s3_bucket": name.replace("_", "-"),
        }
    )
    database, template = sql.Identifier(name), sql.Identifier(servers.template)
    with psycopg.connect(_administration_url(shared), autocommit=True) as administration:
        administration.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(database, template)
        )
        Storage(own).ensure_bucket()
        yield own
        _remove_bucket(own)
        with redis.Redis.from_url(own.broker_url) as broker:
            broker.flushdb()
        administration.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(database))


@pytest.fixture
def sessions(settings: Settings) -> Iterator[Sessions]:
    made = make_sessions(settings)
    yield made
    engine = made.kw["bind"]
    assert isinstance(engine, Engine)
    engine.dispose()


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings)


def _administration_url(settings: Settings) -> str:
    return _with_last_part(settings.database_url.replace("+psycopg", ""), "postgres")


def _with_last_part(url: str, last: str) -> str:
    return f"{url.rpartition('/')[0]}/{last}"


def _remove_bucket(settings: Settings) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=settings.s3_secret_key.get_secret_value(),
    )
    client.delete_bucket(Bucket=settings.s3_bucket)
    client.close()
