"""The child as a process: it is ended as long as its number is its own, and never afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.ground import wait_until
from tests.worker.workshop import Workshop
from worker import process
from worker.custody import Custody
from worker.process import ChildProcess
from worker.wire import Ticket

WAITS = ("-c", "import sys; sys.stdin = open(int(sys.argv[1])); sys.stdin.read()")
ENDS = ("-c", "raise SystemExit(3)")


@pytest.fixture
def ticket(workshop: Workshop) -> Ticket:
    workshop.submit(**workshop.brief())
    directory = workshop.directory / "job"
    directory.mkdir()
    return Custody(workshop.claim(), workshop.storage, workshop.sessions, directory).fetch(1, lambda: False)


@pytest.fixture
def child(workshop: Workshop) -> Iterator[ChildProcess]:
    directory = workshop.directory / "job"
    made = ChildProcess(directory, directory / "log", threads=1, memory_bytes=2**30, timing_lock=directory / "lock")
    yield made
    made.kill()
    made.close()


def test_what_ended_a_child_is_told(child: ChildProcess, ticket: Ticket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PROGRAM", ENDS)
    ear = child.start(ticket)
    assert child.readable(30)
    assert ear.lines() is None
    number = child._process.pid if child._process is not None else 0
    wait_until(lambda: psutil.Process(number).status() == psutil.STATUS_ZOMBIE, "its end")
    assert child.death() == "exit code 3"


def test_a_child_is_given_the_lock_that_its_machine_shares(
    child: ChildProcess, ticket: Ticket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its TMPDIR is its own, so it could not find the lock there."""
    prints = "import os; print(os.environ['BURNISH_TIMING_LOCK'])"
    monkeypatch.setattr(process, "PROGRAM", ("-c", prints))
    ear = child.start(ticket)
    assert child.readable(30)
    assert ear.lines() is None  # it has ended
    assert child._log.read_text().strip() == str(child._log.with_name("lock"))


def test_a_child_whose_end_was_taken_is_not_killed_again(
    child: ChildProcess, ticket: Ticket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another process's by now."""
    monkeypatch.setattr(process, "PROGRAM", WAITS)
    child.start(ticket)
    child.kill()
    killed = list[int]()
    monkeypatch.setattr(os, "killpg", lambda number, _: killed.append(number))
    assert child.death() == "SIGKILL (often out of memory)"
    child.kill()
    assert killed == []


def test_a_child_that_never_started_has_nothing_to_end(tmp_path: Path) -> None:
    child = ChildProcess(tmp_path, tmp_path / "log", threads=1, memory_bytes=2**30, timing_lock=tmp_path / "lock")
    child.kill()
    assert child.death() == "it never started"
