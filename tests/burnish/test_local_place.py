"""The directory of a local service: secrets, ports, lock, state, and how it is found."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from burnish.local import find_local
from burnish.local.place import (
    PORT_NAMES,
    PORT_RANGE,
    LocalFailed,
    Phase,
    Place,
    ServiceState,
    State,
    find_place,
    free_ports,
    is_free,
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / ".burnish")
    place.make()
    return place


@pytest.fixture
def own_state() -> State:
    """The state that a service kept by this process would write."""
    own = psutil.Process()
    services = {"api": ServiceState("ready", pid=1, restarts=2, last_exit=137)}
    return State("ready", own.pid, own.create_time(), "http://127.0.0.1:8000", services=services)


def test_other_users_can_read_nothing(place: Place) -> None:
    place.secrets()
    place.choose_ports()
    assert place.directory.stat().st_mode & 0o777 == 0o700
    for name in ("secrets.json", "ports.json"):
        assert (place.directory / name).stat().st_mode & 0o777 == 0o600


def test_secrets_are_made_once_and_differ(place: Place, tmp_path: Path) -> None:
    secrets = place.secrets()
    assert Place(place.directory).secrets() == secrets
    other = Place(tmp_path / "other")
    other.make()
    assert set(vars(other.secrets()).values()).isdisjoint(vars(secrets).values())
    assert all(len(value) >= 16 for value in vars(secrets).values())


def test_the_directory_keeps_itself_out_of_git(place: Place) -> None:
    assert (place.directory / ".gitignore").read_text() == "*\n"


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalFailed, match=r"file/below cannot be used: Not a directory\."):
        Place(tmp_path / "file" / "below").make()


def test_ports_are_distinct_and_kept_while_they_are_free(place: Place) -> None:
    ports = place.choose_ports()
    assert sorted(ports) == sorted(PORT_NAMES)
    assert len(set(ports.values())) == len(PORT_NAMES)
    assert all(PORT_RANGE[0] <= port < PORT_RANGE[1] for port in ports.values())
    assert place.choose_ports() == ports == place.ports()


def test_ports_that_others_took_are_replaced(place: Place) -> None:
    ports = place.choose_ports()
    with socket.create_server(("127.0.0.1", ports["s3"])):
        assert not is_free(ports["s3"])
        assert place.ports() == ports
        assert place.choose_ports()["s3"] != ports["s3"]


def test_a_half_written_file_of_ports_is_replaced(place: Place) -> None:
    (place.directory / "ports.json").write_text('{"postgres": 20')
    assert sorted(place.choose_ports()) == sorted(PORT_NAMES)


def test_free_ports_can_be_listened_on() -> None:
    for port in free_ports(5):
        socket.create_server(("127.0.0.1", port)).close()


def test_one_process_holds_the_directory(place: Place) -> None:
    with place.lock(timeout_seconds=1):
        assert place.is_locked()
        with pytest.raises(LocalFailed, match="Another process"), place.lock(timeout_seconds=0):
            pass
    assert not place.is_locked()


def test_a_leash_that_outlives_its_holder_keeps_the_lock(place: Place) -> None:
    with place.lock(timeout_seconds=1) as lock:
        outliving = subprocess.Popen(["sleep", "100"], pass_fds=[lock])
    assert place.is_locked()
    outliving.kill()
    outliving.wait()
    assert not place.is_locked()


def test_state_is_read_back_as_written(place: Place, own_state: State) -> None:
    assert place.read_state() is None
    place.write_state(own_state)
    assert place.read_state() == own_state


def test_the_state_of_a_dead_process_is_not_believed(place: Place) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        state = State("ready", process.pid, psutil.Process(process.pid).create_time())
        place.write_state(state)
        assert place.read_state() == state
        process.send_signal(signal.SIGKILL)
    assert place.read_state() is None
    assert place.read_last_state() == state


def test_the_state_of_a_process_whose_number_was_given_again_is_not_believed(place: Place) -> None:
    place.write_state(State("ready", os.getpid(), psutil.Process().create_time() - 100))
    assert place.read_state() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_broken_state_counts_as_none(place: Place, text: str) -> None:
    (place.directory / "state.json").write_text(text)
    assert place.read_state() is None


def test_the_end_of_a_log_is_shown(place: Place) -> None:
    (place.logs / "api.log").write_bytes(b"\xff\n" + b"".join(f"line {n}\n".encode() for n in range(40)))
    assert place.log_tail("api", num_lines=2) == "line 38\nline 39"
    assert place.log_tail("nobody") == ""


def test_the_nearest_directory_above_is_found(
    place: Place, own_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert find_place().directory == tmp_path / "a" / "b" / ".burnish"
    place.write_state(own_state)
    assert find_place().directory == place.directory
    assert find_place(Path("elsewhere")).directory == tmp_path / "a" / "b" / "elsewhere"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_directory_that_another_user_made_is_passed_over(
    place: Place, own_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write_state(own_state)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert find_place().directory == place.directory
    shutil.chown(place.directory / "state.json", "nobody")
    assert find_place().directory == tmp_path / "below" / ".burnish"


@pytest.mark.parametrize("phase", ["ready", "recovering"])
def test_a_running_service_is_found_with_its_key(
    place: Place, own_state: State, monkeypatch: pytest.MonkeyPatch, phase: Phase
) -> None:
    for name in ("BURNISH_URL", "BURNISH_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert find_local(place.directory) is None
    place.api_key.write_text("brn_key\n")
    place.write_state(replace(own_state, phase="starting"))
    assert find_local(place.directory) is None
    place.write_state(replace(own_state, phase=phase))
    assert find_local(place.directory) == ("http://127.0.0.1:8000", "brn_key")


def test_the_environment_comes_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.directory)
    monkeypatch.setenv("BURNISH_URL", "https://burnish.example")
    assert find_local() is None
    monkeypatch.setenv("BURNISH_API_KEY", "brn_other")
    assert find_local() == ("https://burnish.example", "brn_other")
