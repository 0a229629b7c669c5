"""The fixtures of the client and the command: a running service as `bench`, and what talks to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from burnish import Client, Job
from shared.db import Sessions
from shared.settings import Settings
from shared.storage import Storage
from tests.burnish.workbench import Answer, Workbench, open_workbench, run_command

Command = Callable[..., Answer]


@pytest.fixture
def bench(settings: Settings, sessions: Sessions, storage: Storage, tmp_path: Path) -> Iterator[Workbench]:
    opened = open_workbench(settings, sessions, storage, tmp_path)
    opened.service.start()
    yield opened
    opened.service.stop()


@pytest.fixture
def client(bench: Workbench) -> Iterator[Client]:
    with bench.client() as opened:
        yield opened


@pytest.fixture
def job(bench: Workbench, client: Client) -> Job:
    """A job that waits for a worker."""
    return client.submit(bench.job_file())


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No service in the environment, and none that runs in the working directory."""
    for name in ("BURNISH_URL", "BURNISH_API_KEY", "BURNISH_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def burnish(
    nowhere: None, bench: Workbench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """The `burnish` command as the bench's account runs it."""
    monkeypatch.setenv("BURNISH_URL", bench.url)
    monkeypatch.setenv("BURNISH_API_KEY", bench.key)
    return lambda *arguments: run_command(capsys, *arguments)
