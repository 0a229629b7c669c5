"""The leash: a command ends with its holder, with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from burnish.local.crew import LEASH
from burnish.local.waiting import wait_until

# Starts a grandchild in a session of its own, writes both process ids, and waits.
FAMILY = """
import os, subprocess, sys, signal
grandchild = subprocess.Popen(["sleep", "1000"], start_new_session=True)
with open(sys.argv[1] + ".partial", "w") as file:
    file.write(f"{os.getpid()} {grandchild.pid}")
os.rename(sys.argv[1] + ".partial", sys.argv[1])
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: os._exit(7) if "obedient" in sys.argv else None)
while True:
    signal.pause()
"""


class Leashed:
    """A leash with a command, whose holder is this test."""

    def __init__(
        self, *command: str, stop: int = signal.SIGTERM, grace_seconds: float = 10, identity: str = "same"
    ) -> None:
        hold, self._holder = os.pipe()
        arguments = [str(hold), "-1", str(int(stop)), str(grace_seconds), identity, *command]
        self.process = subprocess.Popen(
            [sys.executable, "-IS", str(LEASH), *arguments],
            pass_fds=[hold],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        os.close(hold)

    def let_go(self) -> None:
        if self._holder >= 0:
            os.close(self._holder)
            self._holder = -1

    def output(self) -> str:
        return self.process.communicate(timeout=20)[0]


@pytest.fixture
def leashed() -> Iterator[type[Leashed]]:
    made: list[Leashed] = []

    class Kept(Leashed):
        def __init__(self, *command: str, **options: object) -> None:
            super().__init__(*command, **options)  # type: ignore[arg-type]
            made.append(self)

    yield Kept
    for leash in made:
        leash.let_go()
        leash.process.communicate(timeout=20)


def family_of(path: Path) -> list[psutil.Process]:
    """The processes of FAMILY, once they are there."""
    assert wait_until(path.exists, 10)
    return [psutil.Process(int(pid)) for pid in path.read_text().split()]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("command", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)]
)
def test_the_leash_ends_as_its_command_ended(leashed: type[Leashed], command: str, status: int) -> None:
    leash = leashed("sh", "-c", command)
    leash.output()
    assert leash.process.returncode == status


def test_a_command_that_is_not_there_is_told(leashed: type[Leashed]) -> None:
    leash = leashed("/no/such/program")
    assert "/no/such/program cannot be started" in leash.output()
    assert leash.process.returncode == 127


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_sends_the_stop_signal_and_takes_what_is_left_along(
    leashed: type[Leashed], tmp_path: Path, stop: signal.Signals
) -> None:
    leash = leashed(sys.executable, "-c", FAMILY, str(tmp_path / "pids"), "obedient", stop=stop)
    family = family_of(tmp_path / "pids")
    leash.process.terminate()
    leash.output()
    assert leash.process.returncode == 7
    assert all(is_gone(process) for process in family)


def test_who_does_not_stop_in_time_is_killed(leashed: type[Leashed], tmp_path: Path) -> None:
    leash = leashed(sys.executable, "-c", FAMILY, str(tmp_path / "pids"), grace_seconds=0.2)
    family = family_of(tmp_path / "pids")
    leash.process.terminate()
    leash.output()
    assert leash.process.returncode == 137
    assert all(is_gone(process) for process in family)


def test_what_a_dead_command_leaves_behind_is_killed(leashed: type[Leashed], tmp_path: Path) -> None:
    leash = leashed(sys.executable, "-c", FAMILY, str(tmp_path / "pids"))
    command, grandchild = family_of(tmp_path / "pids")
    command.kill()
    leash.output()
    assert leash.process.returncode == 137
    assert is_gone(grandchild)


def test_the_holders_death_kills_a_grandchild_in_another_session(leashed: type[Leashed], tmp_path: Path) -> None:
    leash = leashed(sys.executable, "-c", FAMILY, str(tmp_path / "pids"))
    family = family_of(tmp_path / "pids")
    leash.let_go()
    leash.output()
    assert all(is_gone(process) for process in family)


@pytest.mark.parametrize("identity", ["same", "namespace"])
def test_the_leashs_own_death_kills_the_command(leashed: type[Leashed], tmp_path: Path, identity: str) -> None:
    if identity == "namespace" and os.geteuid() != 0:
        pytest.skip("only root needs a user namespace")
    leash = leashed(sys.executable, "-c", FAMILY, str(tmp_path / "pids"), identity=identity)
    assert wait_until((tmp_path / "pids").exists, 10)
    command, grandchild = family_of(tmp_path / "pids")
    leash.process.kill()
    assert wait_until(lambda: is_gone(command), 5)
    grandchild.kill()


def test_neither_the_holders_pipe_nor_the_lock_reaches_the_command(leashed: type[Leashed]) -> None:
    listing = leashed(sys.executable, "-c", "import os; print(sorted(os.listdir('/proc/self/fd'), key=int))").output()
    assert listing.strip() == "['0', '1', '2', '3']"  # 3 is the listing itself


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
@pytest.mark.parametrize(("identity", "number"), [("namespace", "1000"), ("nobody", "65534")])
def test_root_becomes_somebody_without_rights(leashed: type[Leashed], identity: str, number: str) -> None:
    printed = leashed("sh", "-c", "id -u; grep CapEff /proc/self/status", identity=identity).output().split()
    assert printed == [number, "CapEff:", "0" * 16]


def test_a_signal_to_the_terminals_foreground_group_does_not_reach_the_command(
    leashed: type[Leashed], tmp_path: Path
) -> None:
    leash = leashed(sys.executable, "-c", FAMILY, str(tmp_path / "pids"), "obedient")
    command, _ = family_of(tmp_path / "pids")
    assert os.getpgid(command.pid) == command.pid != os.getpgid(leash.process.pid)
