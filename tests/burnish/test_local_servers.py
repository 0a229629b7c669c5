"""PostgreSQL, Valkey and SeaweedFS from wheels: closed to others, kept over restarts and crashes, whoever runs them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import boto3
import botocore.exceptions
import psutil
import psycopg
import pytest
import redis

from burnish.local import servers as local_servers
from burnish.local.crew import LEASH, Crew
from burnish.local.place import LocalFailed, Place
from burnish.local.servers import running_servers, servers, settings_of
from burnish.local.waiting import wait_until
from shared.settings import Settings
from shared.storage import Storage

HOLDER = """
import sys
from pathlib import Path
from burnish.local.servers import running_servers
with running_servers(Path(sys.argv[1]), durable="durable" in sys.argv):
    print("ready", flush=True)
    sys.stdin.read()
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")


@dataclass(frozen=True)
class Traces:
    """One thing in each server, written and then looked for."""

    settings: Settings

    def leave(self) -> None:
        with self._database() as database:
            database.execute("CREATE TABLE trace AS SELECT 42 AS value")
        with redis.Redis.from_url(self.settings.broker_url) as broker:
            broker.rpush("trace", "42")
        Storage(self.settings).put_bytes(b"42" * 2**20, "trace")

    def check(self) -> None:
        with self._database() as database:
            assert database.execute("SELECT value FROM trace").fetchall() == [(42,)]
        with redis.Redis.from_url(self.settings.broker_url) as broker:
            assert broker.lrange("trace", 0, -1) == [b"42"]
        assert b"".join(Storage(self.settings).chunks("trace")) == b"42" * 2**20

    def _database(self) -> psycopg.Connection[tuple[int]]:
        return psycopg.connect(self.settings.database_url.replace("+psycopg", ""))


@pytest.fixture
def directory() -> Iterator[Path]:
    """A new directory of a difficult name that every user can reach; pytest's own is closed to them."""
    with tempfile.TemporaryDirectory(prefix="burnish-tests-") as name:
        Path(name).chmod(0o755)
        yield Path(name) / """a, b "c" d'é"""


def sockets_of(ports: Mapping[str, int]) -> list[Path]:
    """What SeaweedFS has in /tmp for these ports."""
    return [path for port in ports.values() for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_data_survives_a_restart_on_other_ports(directory: Path) -> None:
    unfinished = directory / "postgres.new"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")  # left by an initdb that was killed
    with running_servers(directory) as settings:
        Traces(settings).leave()
        ports = Place(directory).ports()
        assert sockets_of(ports)
    assert not sockets_of(ports)
    with (
        socket.create_server(("127.0.0.1", ports["postgres"])),
        socket.create_server(("127.0.0.1", ports["master"])),
        running_servers(directory) as settings,
    ):
        assert set(Place(directory).ports().values()).isdisjoint(ports.values())
        Traces(settings).check()


def test_a_killed_holder_leaves_no_process_and_its_data_whole(directory: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), "durable"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        started = psutil.Process(holder.pid).children(recursive=True)
        assert {"postgres", "valkey-server", "weed"} <= {process.name() for process in started}
        Traces(settings_of(Place(directory))).leave()
        holder.send_signal(signal.SIGKILL)
    assert wait_until(lambda: all(is_gone(process) for process in started), 5)
    assert wait_until(lambda: not Place(directory).is_locked(), 5)

    pid_file = directory / "postgres" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    pid_file.write_text("\n".join([str(os.getppid()), *lines[1:]]))  # its number now is another process's
    with running_servers(directory) as settings:
        Traces(settings).check()


def test_two_cannot_hold_one_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(directory)
    place.make()
    monkeypatch.setattr(local_servers, "LOCK_SECONDS", 0.1)
    with (
        place.lock(timeout_seconds=1),
        pytest.raises(LocalFailed, match="Another process"),
        running_servers(directory),
    ):
        pass


@as_root
def test_an_ordinary_user_can_run_them(directory: Path) -> None:
    hold, holder = os.pipe()
    leash = [sys.executable, "-IS", str(LEASH), str(hold), "-1", str(int(signal.SIGINT)), "10", "namespace"]
    with subprocess.Popen(
        [*leash, sys.executable, "-c", "import os; assert os.geteuid() == 1000\n" + HOLDER, str(directory)],
        pass_fds=[hold],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(hold)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        Traces(settings_of(Place(directory))).leave()
        process.communicate("", timeout=20)
    os.close(holder)
    assert process.returncode == 0


@as_root
@pytest.mark.parametrize("first", ["namespace", "nobody"])
def test_root_can_run_postgres_as_nobody_where_there_are_no_namespaces(
    directory: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    place = Place(directory)
    place.make()
    for identity in (first, "nobody"):
        monkeypatch.setattr(local_servers, "ROOT_BECOMES", (identity,))
        own = [service for service in servers(place) if service.name in ("initdb", "postgres")]
        assert {service.identity for service in own} == {identity}
        with Crew(place, own) as crew:
            crew.start()
            crew.wait_ready()
    assert (place.postgres / "PG_VERSION").owner() == "nobody"
    assert place.secrets() == Place(directory).secrets()


@as_root
def test_a_directory_that_nobody_can_reach_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_servers, "ROOT_BECOMES", ("nobody",))
    place = Place(directory)
    place.make()
    directory.parent.chmod(0o700)
    with pytest.raises(LocalFailed, match=re.escape(f"or {directory}: start as")):
        servers(place)


def test_a_disk_that_is_nearly_full_is_told_before_anything_starts(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_servers, "MIN_FREE_BYTES", 2**60)
    told = rf"MiB are free on the disk of {re.escape(str(directory))}; local mode needs \d+ MiB to start\. Make room"
    with pytest.raises(LocalFailed, match=told), running_servers(directory):
        pytest.fail("it started")
    assert not (directory / "ports.json").exists()
    monkeypatch.undo()
    with running_servers(directory) as settings:
        Traces(settings).leave()


def test_passwords_lie_in_closed_files_and_in_no_command_line(settings: Settings) -> None:
    secret = [settings.s3_secret_key.get_secret_value(), settings.broker_url.split(":")[2].split("@")[0]]
    secret.append(settings.database_url.split(":")[2].split("@")[0])
    children = psutil.Process().children(recursive=True)
    assert {"postgres", "valkey-server", "weed"} <= {process.name() for process in children}
    for process in children:
        assert not any(text in argument for argument in process.cmdline() for text in secret)
    (weed,) = (process for process in children if process.name() == "weed")
    directory = Path(weed.cwd()).parent
    holding = [path for path in directory.rglob("*") if path.is_file() and _mentions(path, secret)]
    assert {path.name for path in holding} >= {"secrets.json", "s3.json", "valkey.conf"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in holding)


def test_nothing_listens_beyond_loopback(settings: Settings) -> None:
    listening = [
        connection.laddr.ip
        for process in psutil.Process().children(recursive=True)
        if process.name() in ("postgres", "valkey-server", "weed")
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 3
    assert set(listening) == {"127.0.0.1"}


def test_postgres_refuses_a_wrong_password(settings: Settings) -> None:
    user, _, place = settings.database_url.replace("+psycopg", "").rpartition("@")
    for wrong in ("wrong", ""):
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"{user.rpartition(':')[0]}:{wrong}@{place}")


def test_valkey_refuses_a_wrong_password_and_none(settings: Settings) -> None:
    _, _, place = settings.broker_url.rpartition("@")
    for url, error in ((f"redis://:wrong@{place}", "invalid"), (f"redis://{place}", "already authenticated")):
        with redis.Redis.from_url(url) as client, pytest.raises(redis.AuthenticationError, match=error):
            client.ping()


def test_s3_refuses_a_wrong_key_and_none(settings: Settings) -> None:
    Storage(settings).put_bytes(b"secret", "object")
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key="wrong",
    )
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        client.get_object(Bucket=settings.s3_bucket, Key="object")
    client.close()
    with socket.create_connection(("127.0.0.1", int(settings.s3_endpoint_url.rpartition(":")[2]))) as connection:
        request = f"GET /{settings.s3_bucket}/object HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 403")


def _mentions(path: Path, texts: list[str]) -> bool:
    content = path.read_bytes()
    return any(text.encode() in content for text in texts)
