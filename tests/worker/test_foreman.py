"""The foreman: a claim that takes long shortens its lease, and a worker that nobody knows any more says so again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete

from shared.db import transaction
from shared.models import Worker
from shared.settings import Settings
from tests.faults.ground import Ground, reached, wait_until
from tests.faults.proxy import Proxy, port_of, through
from worker import foreman
from worker.foreman import Foreman

LEASE_SECONDS = 4.0


@pytest.fixture
def network(settings: Settings) -> Iterator[Proxy]:
    """The network between the worker and the database."""
    with Proxy(port_of(settings.database_url)) as proxy:
        yield proxy
        proxy.heal()


def behind(ground: Ground, network: Proxy, **changes: Any) -> Settings:
    """A worker's settings, its database by way of the network."""
    url = through(network, ground.settings.database_url)
    return ground.settings.model_copy(update={"database_url": url, **changes})


@contextmanager
def foreman_of(settings: Settings) -> Iterator[Foreman]:
    """A foreman in this process, who leaves at the end."""
    made = Foreman(settings)
    yield made
    made.close()
    for sessions in (made._tools.sessions, made._tools.pulse):
        sessions.kw["bind"].dispose()


# ---------------------------------------------------------------- the claim


def test_a_lease_is_as_old_as_its_claim(ground: Ground, network: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    held = list[float]()
    monkeypatch.setattr(foreman, "supervise", lambda claim, *_: held.append(time.monotonic() - claim.held_since))
    ground.submit()
    with foreman_of(behind(ground, network)) as slow:
        network.delay(0.1)
        assert slow.drain() == 1
        network.heal()
    assert held[0] >= 0.2, "there and back"
    ground.execute("UPDATE jobs SET lease_expires_at = now() - interval '1 s'")
    assert ground.sweep() == 1


def test_a_database_that_falls_silent_after_a_claim_does_not_keep_the_fence_from_closing(
    ground: Ground, network: Proxy, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    job_id = ground.submit()
    settings = behind(ground, network, lease_seconds=LEASE_SECONDS)
    ground.start_worker(f"claim.committed=wait:{gate}", settings)
    reached(gate)
    network.blackhole()
    gate.unlink()
    wait_until(lambda: '"child_stopped"' in ground.log(), "the fence", timeout_seconds=2 * LEASE_SECONDS)
    assert '"cause": "lease_lost"' in ground.log()
    network.heal()
    wait_until(ground.sweep, "the lease to lapse")
    assert ground.wait_for(job_id).status == "succeeded"


# ---------------------------------------------------------------- presence


def forget(ground: Ground) -> None:
    """Have the database know no worker, as after a restore."""
    with transaction(ground.sessions) as session:
        session.execute(delete(Worker))


def test_a_worker_whose_row_is_gone_is_known_again(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreman, "PRESENCE_SECONDS", 0.05)
    with foreman_of(ground.settings) as there:
        there.open()
        [known] = wait_until(ground.workers, "the worker to register")
        forget(ground)
        [again] = wait_until(ground.workers, "the worker to register again")
        assert (again.id, again.queues, again.capabilities) == (known.id, known.queues, known.capabilities)
    assert ground.workers() == []


def test_a_worker_that_has_left_is_not_known_again(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its last beat and its leaving meet."""
    monkeypatch.setattr(foreman, "PRESENCE_SECONDS", 0.0)
    for _ in range(20):
        with foreman_of(ground.settings) as there:
            there.open()
            wait_until(ground.workers, "the worker to register")
        wait_until(lambda: "_be_present" not in [thread.name for thread in threading.enumerate()], "its last beat")
        assert ground.workers() == []
