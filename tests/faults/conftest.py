"""After every fault the laws hold: each test here ends with the audit, whatever it did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.db import Sessions
from shared.settings import Settings
from shared.storage import Storage
from tests.api.desk import Desk, open_desk
from tests.faults.front import Front
from tests.faults.ground import Ground, audited, tiny_jobs


@pytest.fixture(autouse=True)
def _audited(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    marker = request.node.get_closest_marker("fault")
    if marker is None and "sessions" not in request.fixturenames:
        yield
        return
    sessions: Sessions = request.getfixturevalue("sessions")
    storage: Storage = request.getfixturevalue("storage")
    with audited(sessions, storage, tmp_path, quiet=marker is not None and marker.kwargs.get("quiet", True)):
        yield


@pytest.fixture
def ground(
    _audited: None, settings: Settings, sessions: Sessions, storage: Storage, tmp_path: Path
) -> Iterator[Ground]:
    """Tools of one worker, tiny jobs, and processes that end with the test."""
    with tiny_jobs(settings, sessions, storage, tmp_path) as made:
        yield made


@pytest.fixture
def desk(ground: Ground) -> Iterator[Desk]:
    """A front desk of this process, for what goes well."""
    with open_desk(ground.settings, ground.sessions, ground.storage) as opened:
        yield opened


@pytest.fixture
def front(ground: Ground, desk: Desk) -> Front:
    """One in a process of its own, which is not started yet, for the same account."""
    ground.account_id = desk.account_id
    return Front(ground)
