"""The heart that keeps a lease: it counts the lease's length from before the claim, whatever happens after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from shared import lifecycle
from shared.db import Sessions, make_sessions, ping
from shared.settings import Settings
from tests.faults.ground import Ground, wait_until
from tests.faults.proxy import Proxy, port_of, through
from worker.heart import FENCE_RATIO, Heart

LEASE_SECONDS = 20.0


@pytest.fixture
def network(settings: Settings) -> Iterator[Proxy]:
    """The network between the worker and the database."""
    with Proxy(port_of(settings.database_url)) as proxy:
        yield proxy


@pytest.fixture
def far(ground: Ground, network: Proxy) -> Iterator[Sessions]:
    """The database by way of the network."""
    url = through(network, ground.settings.database_url)
    made = make_sessions(ground.settings.model_copy(update={"database_url": url}))
    ping(made)
    yield made
    network.heal()
    made.kw["bind"].dispose()


def heart_of(ground: Ground, sessions: Sessions, stop_child: Callable[[], None], held_since: float) -> Heart:
    ground.submit()
    settings = ground.settings.model_copy(update={"lease_seconds": LEASE_SECONDS})
    claim = replace(ground.claim(), held_since=held_since)
    return Heart(sessions, sessions, claim, settings, ground.directory / "log", stop_child)


def end(ground: Ground) -> None:
    ground.execute("UPDATE jobs SET lease_expires_at = now() - interval '1 s' WHERE status = 'running'")
    assert lifecycle.sweep_leases(ground.sessions) == 1
    assert ground.work() == "succeeded"


def test_the_time_that_a_claim_took_counts(ground: Ground, network: Proxy, far: Sessions) -> None:
    """Its lease runs from the moment at which the database wrote it, of which only this is known: it was not before."""
    stopped = threading.Event()
    heart = heart_of(ground, far, stopped.set, time.monotonic() - FENCE_RATIO * LEASE_SECONDS)
    network.blackhole()
    heart.start()
    assert stopped.wait(LEASE_SECONDS * (1 - FENCE_RATIO)), "the lease would have lapsed"
    assert heart.cause == "lease_lost"
    network.heal()
    heart.stop()
    end(ground)


def test_the_time_that_it_took_to_reach_the_database_does_not(ground: Ground, network: Proxy) -> None:
    ground.submit()
    url = through(network, ground.settings.database_url)
    fresh = make_sessions(ground.settings.model_copy(update={"database_url": url}))
    network.delay(0.1)
    begun_at = time.monotonic()
    claim = ground.claim(fresh)
    assert claim.held_since - begun_at > 3 * 0.2, "three round trips open a connection"
    assert time.monotonic() - claim.held_since > 0.2, "one more is the claim"
    fresh.kw["bind"].dispose()
    network.heal()
    end(ground)


def test_a_beat_makes_the_time_that_a_claim_took_good(ground: Ground) -> None:
    heart = heart_of(ground, ground.sessions, lambda: None, time.monotonic() - 0.6 * LEASE_SECONDS)
    heart.start()
    begun_at = time.monotonic() - 0.5 * LEASE_SECONDS
    wait_until(lambda: heart._beaten_at > begun_at, "the first beat")
    heart.stop()
    assert heart.cause is None
    end(ground)
