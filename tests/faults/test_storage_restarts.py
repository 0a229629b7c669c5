"""Storage dies and comes back while a job's result is on its way to it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from shared import lifecycle
from shared.errors import StorageUnavailable
from shared.settings import Settings
from shared.storage import Storage
from tests.faults.ground import Ground, reached, wait_until
from tests.faults.own import OwnServer, own_server
from tests.faults.proxy import Proxy, port_of, through


@pytest.fixture
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    with own_server("seaweedfs", tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def settings(settings: Settings, seaweedfs: OwnServer) -> Settings:
    names = ("s3_endpoint_url", "s3_access_key", "s3_secret_key", "s3_bucket")
    return settings.model_copy(update={name: getattr(seaweedfs.settings, name) for name in names})


def is_away(storage: Storage) -> bool:
    try:
        storage.ping()
    except StorageUnavailable:
        return True
    return False


@pytest.mark.fault(34, "S3 kill -9 and restart")
def test_a_restart_of_the_storage_is_waited_out(ground: Ground, seaweedfs: OwnServer) -> None:
    gate = ground.directory / "gate"
    job_id = ground.submit(f"wait 0 {gate}")
    ground.start_worker()
    reached(gate)
    restarting = threading.Thread(target=seaweedfs.kill)
    restarting.start()
    wait_until(lambda: is_away(ground.storage), "the storage to be away")
    gate.unlink()
    restarting.join()
    assert ground.wait_for(job_id).status == "succeeded", ground.reason(job_id)
    assert ground.job(job_id).attempt == 1


@pytest.mark.fault(34, "S3 is away")
def test_no_attempt_is_spent_while_there_is_no_storage(ground: Ground) -> None:
    url = ground.settings.s3_endpoint_url
    with Proxy(port_of(url)) as proxy:
        proxy.refuse()
        job_id = ground.submit()
        ground.start_worker(settings=ground.settings.model_copy(update={"s3_endpoint_url": through(proxy, url)}))
        wait_until(lambda: ground.log().count("claim_failed") >= 2, "the worker to have looked twice")
        assert (ground.job(job_id).status, ground.job(job_id).attempt) == ("queued", 0)
        proxy.accept()
        assert ground.wait_for(job_id).status == "succeeded", ground.reason(job_id)
        assert ground.job(job_id).attempt == 1


@pytest.mark.fault(34, "S3 is away")
def test_a_job_that_lost_its_worker_comes_back_while_storage_says_nothing(ground: Ground) -> None:
    url = ground.settings.s3_endpoint_url
    lapsed = "UPDATE artifacts SET status = 'pending', expires_at = now() - interval '1 day' WHERE name = 'data.zip'"
    with Proxy(port_of(url)) as proxy:
        proxy.blackhole()
        ground.execute(lapsed)
        told = ground.settings.model_copy(update={"s3_endpoint_url": through(proxy, url)})
        ground.start([sys.executable, "-m", "worker.sweeper"], settings=told)
        wait_until(lambda: proxy.num_connections > 0, "the sweeper to remove a file")
        job_id = ground.submit()
        lifecycle.heartbeat(ground.sessions, ground.claim().lease, -1)
        wait_until(lambda: ground.job(job_id).status == "queued", "the job to come back", timeout_seconds=4.0)
        lifecycle.cancel(ground.sessions, ground.account_id, job_id)
        proxy.heal()
        wait_until(lambda: "uploads/data.zip" not in ground.storage.list_keys(), "the file to go")
