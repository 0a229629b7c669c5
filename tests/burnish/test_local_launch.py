"""`burnish local up | status | down`: the whole service, and that nothing of it stays when it ends."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from burnish.local import find_local
from burnish.local.place import Place, State, free_ports
from burnish.local.waiting import wait_until

LOCAL = [sys.executable, "-m", "burnish.local"]
READY_SECONDS = 60.0  # as long as a machine that is busy with other things may take


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing runs any more when the test is over."""
    yield tmp_path / "service"
    place = Place(tmp_path / "service")
    state = place.read_last_state()
    local("down", tmp_path / "service")
    assert not place.is_locked()
    assert state is None or all(is_gone(process) for process in family_of(state))


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


def local(
    verb: str, directory: Path, *options: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    command = [*LOCAL, verb, "--dir", str(directory), *options]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=directory.parent,
        env={**os.environ, **(environment or {})},
    )


def status_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(local("status", directory, "--json").stdout)
    return found


def family_of(state: State) -> list[psutil.Process]:
    """The process that keeps the service running, and all its descendants, that are there now."""
    try:
        keeper = psutil.Process(state.pid)
        return [keeper, *keeper.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def read_state(directory: Path) -> State:
    state = Place(directory).read_state()
    assert state is not None
    return state


def lines_of(process: subprocess.Popen[str]) -> queue.SimpleQueue[str]:
    """A process's output, line by line, as it comes."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    stream = process.stdout
    assert stream is not None

    def pump() -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))

    threading.Thread(target=pump, daemon=True).start()
    return lines


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def commands_of(state: State, *names: str) -> list[psutil.Process]:
    """The services' own processes, below their leashes."""
    pids = [state.services[name].pid for name in names]
    return [command for pid in pids if pid is not None for command in psutil.Process(pid).children()]


def test_in_the_foreground_it_serves_heals_and_ends_with_ctrl_c(
    directory: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{port}"
    up = [*LOCAL, "up", "--dir", str(directory), "--port", str(port)]
    with subprocess.Popen(up, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        lines = lines_of(process)
        assert lines.get(timeout=READY_SECONDS) == f"Burnish is ready: {url}"
        assert lines.get(timeout=5) == f"API key: {directory / 'api-key'}"

        # The key opens the api, another does not; other commands find both.
        assert (directory / "api-key").stat().st_mode & 0o777 == 0o600
        found = find_local(directory)
        assert found is not None
        assert found[0] == url
        for key, expected in ((found[1], 200), ("brn_wrong", 401)):
            answer = httpx.get(f"{url}/v1/jobs", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == expected

        # A second `up` says that it runs, and leaves it alone.
        again = local("up", directory, "--port", str(port))
        assert (again.returncode, again.stdout.splitlines()[0]) == (0, f"Burnish is running already: {url}")
        detached = json.loads(local("up", directory, "--detach", "--json").stdout)
        assert detached == {"url": url, "api_key_path": str(directory / "api-key"), "started": False}

        # Whatever dies is started again, and `status` says so.
        services = status_of(directory)["services"]
        assert {name: service["phase"] for name, service in services.items()} == {
            **dict.fromkeys(("initdb", "migrate"), "done"),
            **dict.fromkeys(("postgres", "valkey", "seaweedfs", "api", "worker-1", "sweeper"), "ready"),
        }
        mortal = ("postgres", "valkey", "api", "worker-1", "sweeper")
        commands = commands_of(read_state(directory), *mortal)
        assert len(commands) == len(mortal)
        for command in commands:
            command.kill()
        assert wait_until(
            lambda: (state := read_state(directory)).phase == "ready"
            and all(state.services[name].restarts >= 1 for name in mortal),
            READY_SECONDS,
        )
        assert wait_until(lambda: is_ready(url), READY_SECONDS)
        shown = local("status", directory)
        assert shown.returncode == 0
        assert "restarted" in shown.stdout

        family = family_of(read_state(directory))
        assert len(family) > 2 * len(mortal)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert all(is_gone(one) for one in family)
    assert status_of(directory)["phase"] == "stopped"
    assert find_local(directory) is None
    socket.create_server(("127.0.0.1", port)).close()


def test_detached_it_stays_until_down_and_survives_a_killed_keeper_with_its_data(directory: Path, port: int) -> None:
    started = local("up", directory, "--detach", "--port", str(port), "--workers", "2")
    assert started.returncode == 0, started.stdout + started.stderr
    state = read_state(directory)
    assert {"worker-1", "worker-2"} <= set(state.services)
    assert os.getsid(state.pid) == state.pid
    key = (directory / "api-key").read_text()

    # kill -9 of the keeper: nothing stays.
    family = family_of(state)
    os.kill(state.pid, signal.SIGKILL)
    assert wait_until(lambda: all(is_gone(process) for process in family), 5)

    # The next start, on a port that it finds itself, is not hindered, and knows the key of before.
    begun = local("up", directory, "--detach", "--port", "0", "--json")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    assert (directory / "api-key").read_text() == key
    answer = httpx.get(f"{json.loads(begun.stdout)['url']}/v1/jobs", headers={"Authorization": f"Bearer {key.strip()}"})
    assert answer.status_code == 200

    family = family_of(read_state(directory))
    assert json.loads(local("down", directory, "--json").stdout) == {"stopped": True}
    assert all(is_gone(process) for process in family)
    assert local("down", directory).stdout == "Nothing was running.\n"
    shown = local("status", directory)
    assert (shown.returncode, shown.stdout) == (3, "stopped\n")


@pytest.mark.parametrize("options", [(), ("--detach",)])
def test_a_taken_port_is_told_and_nothing_is_started(directory: Path, port: int, options: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", port)):
        told = local("up", directory, "--port", str(port), *options)
    assert told.returncode == 1
    assert told.stderr == f"Error: Port {port} is taken by another program; choose another one with --port.\n"
    assert not Place(directory).is_locked()
    assert not (directory / "postgres").exists()


def test_a_start_that_fails_shows_why_and_leaves_nothing(directory: Path, port: int) -> None:
    broken = {"BURNISH_LEASE_SECONDS": "0.1"}
    told = local("up", directory, "--detach", "--port", str(port), environment=broken)
    assert told.returncode == 1
    assert "BURNISH_LEASE_SECONDS must be at least three heartbeats long" in told.stderr
    assert not Place(directory).is_locked()


def test_a_service_that_cannot_start_is_named_with_the_end_of_its_log(directory: Path, port: int) -> None:
    place = Place(directory)
    place.make()
    (place.valkey / "appendonlydir").write_text("not a directory")
    told = local("up", directory, "--port", str(port))
    assert told.returncode == 1
    assert told.stderr.startswith("Error: valkey ended with status 1. The end of ")
    assert "appendonlydir" in told.stderr
    state = status_of(directory)
    assert state["phase"] == "failed"
    assert "valkey ended" in state["message"]


def test_a_directory_in_which_nothing_ever_ran_is_no_error(directory: Path) -> None:
    assert status_of(directory)["phase"] == "stopped"
    assert local("down", directory).returncode == 0
    assert not directory.exists()
