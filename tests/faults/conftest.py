"""After every fault the laws hold: each test here ends with the audit, whatever it did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.db import Sessions
from shared.settings import Settings
from shared.storage import Storage
from tests.audit import audit, leftovers
from tests.faults.ground import HERE, Ground
from worker import process


@pytest.fixture(autouse=True)
def _audited(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    marker = request.node.get_closest_marker("fault")
    if marker is None and "sessions" not in request.fixturenames:
        yield
        return
    sessions: Sessions = request.getfixturevalue("sessions")
    storage: Storage = request.getfixturevalue("storage")
    yield
    quiet = marker is not None and marker.kwargs.get("quiet", True)
    broken = audit(sessions, storage, quiet=quiet) + leftovers(tmp_path)
    for key in storage.list_keys():
        storage.remove(key)
    assert broken == []


@pytest.fixture
def ground(
    _audited: None,
    settings: Settings,
    sessions: Sessions,
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Ground]:
    """Tools of one worker, tiny jobs, and processes that end with the test."""
    monkeypatch.setattr(process, "PROGRAM", ("-P", str(HERE / "tiny_child.py")))
    made = Ground(settings, sessions, storage, tmp_path)
    yield made
    made.close()

