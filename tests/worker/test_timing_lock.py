"""Two processes of one machine never time at once, and neither is ever stuck."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from worker import timing_lock

HOLDER = """
import sys
from worker import child, timing_lock
if sys.argv[1] == "sandboxed":
    assert child.leave_network()
with timing_lock.held() as is_held:
    print(is_held, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def lock_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "timing.lock"
    monkeypatch.setenv(timing_lock.VARIABLE, str(path))
    return path


@contextmanager
def holder(how: str = "plain") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its standard input is closed."""
    command = [sys.executable, "-c", HOLDER, how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["plain", "sandboxed"])
def test_what_another_process_holds_is_waited_for_and_then_had(how: str) -> None:
    messages = []
    with holder(how) as process:

        def end_holder(message: str) -> None:
            messages.append(message)
            assert process.stdin is not None
            process.stdin.close()

        with timing_lock.held(end_holder) as is_held:
            assert is_held
    assert messages[0] == "waiting for another measurement on this machine"


def test_a_killed_holder_holds_it_no_more() -> None:
    with holder() as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with timing_lock.held(max_wait_seconds=0) as is_held:
            assert is_held


def test_a_wait_ends_and_timing_goes_on_without_the_lock(caplog: pytest.LogCaptureFixture) -> None:
    with holder(), caplog.at_level(logging.WARNING), timing_lock.held(max_wait_seconds=0.01) as is_held:
        assert not is_held
    assert "timing without the machine's lock" in caplog.text


def test_who_waits_can_be_stopped_by_its_callback() -> None:
    def cancel(message: str) -> None:
        raise InterruptedError

    with holder(), pytest.raises(InterruptedError), timing_lock.held(cancel):
        pytest.fail("it was held by another process")


def test_where_the_lock_cannot_be_opened_timing_goes_on_and_the_log_says_so(
    lock_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(timing_lock.VARIABLE, str(lock_path / "nowhere"))
    with caplog.at_level(logging.WARNING), timing_lock.held() as is_held:
        assert not is_held
    assert "nowhere" in caplog.text


def test_a_link_in_its_place_is_not_followed(lock_path: Path) -> None:
    target = lock_path.with_name("target")
    lock_path.symlink_to(target)
    with timing_lock.held() as is_held:
        assert not is_held
    assert not target.exists()


def test_other_users_may_open_it_and_only_its_owner_write_it(lock_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with timing_lock.held() as is_held:
            assert is_held
    finally:
        os.umask(before)
    assert lock_path.stat().st_mode & 0o777 == 0o644


def test_it_is_free_for_the_next_once_it_was_used() -> None:
    for _ in range(2):
        with timing_lock.held(max_wait_seconds=0) as is_held:
            assert is_held
