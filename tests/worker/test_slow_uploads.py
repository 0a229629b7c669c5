"""A slow way to storage: whoever is told to stop does not wait until his files have left."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from shared import lifecycle
from shared.ledger import Reason
from shared.settings import Settings
from shared.storage import Storage
from tests.faults.ground import Ground, children, reached, wait_until
from tests.faults.proxy import Proxy, port_of, through
from worker import custody
from worker.custody import Custody

STAGE_BYTES = 32 * 2**20
BYTES_PER_SECOND = 400_000  # 80 s for the stage's file
PROMPT_SECONDS = 10.0  # on a machine that is busy: a heartbeat, and what is on its way


@pytest.fixture
def network(settings: Settings) -> Iterator[Proxy]:
    """The network between the worker and storage."""
    with Proxy(port_of(settings.s3_endpoint_url)) as proxy:
        yield proxy


def behind(ground: Ground, network: Proxy) -> Storage:
    """Storage by way of the network."""
    url = through(network, ground.settings.s3_endpoint_url)
    return Storage(ground.settings.model_copy(update={"s3_endpoint_url": url}))


class Slow:
    """A job whose first stage's file is leaving, slowly."""

    def __init__(self, ground: Ground, network: Proxy) -> None:
        self.ground, self.network = ground, network
        gate = ground.directory / "gate"
        self.tools = ground.tools(storage=behind(ground, network))
        self.job_id = ground.submit(f"wait 0 {gate}; large 0 {STAGE_BYTES}")
        self.attempt = ground.start_work(self.tools)
        reached(gate)
        network.throttle(BYTES_PER_SECOND)
        gate.unlink()
        wait_until(lambda: list(ground.storage.list_multiparts()), "the upload to begin")

    def end(self) -> float:
        """Seconds until the attempt has ended. What it left is as every test here expects it."""
        begun_at = time.monotonic()
        wait_until(lambda: not children(self.job_id), "the child to be stopped")
        self.attempt.join(timeout=60)
        seconds = time.monotonic() - begun_at
        assert not self.attempt.is_alive()
        self.network.heal()
        assert not [key for key in self.ground.storage.list_keys() if key.endswith("0-quantize.onnx")]
        assert self.ground.job(self.job_id).crashes == 0
        return seconds


def test_a_cancel_does_not_wait_for_an_upload(ground: Ground, network: Proxy) -> None:
    slow = Slow(ground, network)
    lifecycle.cancel(ground.sessions, ground.account_id, slow.job_id)
    assert slow.end() < PROMPT_SECONDS
    assert ground.job(slow.job_id).status == "cancelled"


def test_a_job_past_its_time_does_not_wait_for_an_upload(ground: Ground, network: Proxy) -> None:
    slow = Slow(ground, network)
    ground.execute("UPDATE jobs SET timeout_seconds = 0.001")
    assert slow.end() < PROMPT_SECONDS
    assert ground.reason(slow.job_id)["code"] == "timeout"


def test_a_worker_in_a_hurry_does_not_wait_for_an_upload(ground: Ground, network: Proxy) -> None:
    slow = Slow(ground, network)
    slow.tools.hurried.set()
    ground.draining.set()
    assert slow.end() < PROMPT_SECONDS
    job = ground.job(slow.job_id)
    assert (job.status, ground.reason(slow.job_id)["code"]) == ("queued", "worker_stopping")


def test_a_worker_that_was_replaced_does_not_wait_for_an_upload(ground: Ground, network: Proxy) -> None:
    slow = Slow(ground, network)
    ground.take_away(slow.job_id)
    assert slow.end() < PROMPT_SECONDS
    assert ground.job(slow.job_id).status == "queued"


def test_the_log_of_a_stopped_attempt_is_waited_for_a_little(
    ground: Ground, network: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the one thing that tells what the attempt did."""
    job_id = ground.submit("epochs 0 1000 0.01")
    attempt = ground.start_work()
    ground.wait_for_event(job_id, "log")
    lifecycle.cancel(ground.sessions, ground.account_id, job_id)
    attempt.join()
    assert ground.logs(job_id).startswith("epoch 1\n")

    ground.submit()
    claim = ground.claim()
    stopped = Custody(claim, behind(ground, network), ground.sessions, ground.directory, interrupted=lambda: True)
    log = ground.directory / "attempt-1.log"
    log.write_bytes(b"a line\n" * 2**20)
    network.throttle(BYTES_PER_SECOND)
    monkeypatch.setattr(custody, "LAST_SECONDS", 0.5)
    begun_at = time.monotonic()
    assert stopped.store_log(log) == []
    assert 0.5 <= time.monotonic() - begun_at < PROMPT_SECONDS
    lifecycle.requeue(ground.sessions, claim.lease, Reason("done", "It was never begun."), cause="given_back")
    assert ground.work() == "succeeded"
