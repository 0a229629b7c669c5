"""Object storage is overloaded, slow, cut off, or gives other bytes than it took: no result is ever wrong for that."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import select

from burnish import BrokenDownload, Client, ServiceSaidNo
from shared import retention
from shared.accounts import create_key
from shared.db import transaction
from shared.models import Artifact
from shared.settings import Settings
from shared.storage import Storage
from tests.api.desk import announce, client_of, open_desk, safetensors, send
from tests.audit import orphans
from tests.faults.ground import Ground, children, reached, wait_until
from tests.faults.http_proxy import HttpProxy
from tests.faults.proxy import Proxy, port_of, through

MAX_TRIES = 5
LARGE_BYTES = 9 * 2**20  # boto3 sends in parts what has more than 8 MiB
AT_ONCE = {"orphan_grace_seconds": 0.0, "presign_seconds": 0}


@pytest.fixture
def network(settings: Settings) -> Iterator[Proxy]:
    """The network between a worker and storage."""
    with Proxy(port_of(settings.s3_endpoint_url)) as proxy:
        yield proxy


@pytest.fixture
def server(settings: Settings) -> Iterator[HttpProxy]:
    """Storage as a worker sees it."""
    with HttpProxy(port_of(settings.s3_endpoint_url)) as proxy:
        yield proxy


def behind(ground: Ground, proxy: Proxy | HttpProxy, **changes: float) -> Storage:
    """Storage by way of the proxy."""
    url = through(proxy, ground.settings.s3_endpoint_url)
    return Storage(ground.settings.model_copy(update={"s3_endpoint_url": url, **changes}))


def artifacts(ground: Ground, job_id: UUID, role: str = "model") -> list[Artifact]:
    with transaction(ground.sessions) as session:
        found = select(Artifact).where(Artifact.job_id == job_id, Artifact.role == role)
        return list(session.scalars(found.order_by(Artifact.name)))


def expected_of(ground: Ground, script: str) -> dict[str, str]:
    """The result of a job of this script to which nothing else happens."""
    job_id = ground.submit(script)
    assert ground.work() == "succeeded", ground.reason(job_id)
    return ground.result(job_id)


# ---------------------------------------------------------------- 34: an overloaded server


@pytest.mark.fault(34, "S3 answers 30% 5xx / SlowDown")
def test_a_job_is_done_in_one_attempt_by_a_storage_that_fails_at_three_requests_in_ten(
    ground: Ground, server: HttpProxy
) -> None:
    expected = expected_of(ground, "epochs 0 2")
    storage = behind(ground, server)
    job_id = ground.submit("epochs 0 2")
    server.fail(0.3, seed=1)
    random.seed(34)  # which botocore draws its waits from
    assert ground.work(ground.tools(storage=storage)) == "succeeded", ground.reason(job_id)
    assert ground.job(job_id).attempt == 1
    assert ground.result(job_id) == expected
    tries = [times for times in server.tries.values() if len(times) > 1]
    assert server.num_errors >= 3
    assert max(map(len, tries)) <= MAX_TRIES
    waits = [times[1] - times[0] for times in tries]
    assert max(waits) - min(waits) > 0.1, f"they are tried again in step: {waits}"


@pytest.mark.fault(34, "S3 answers 30% 5xx / SlowDown")
def test_a_storage_that_only_fails_is_asked_so_often_and_no_more(ground: Ground, server: HttpProxy) -> None:
    expected = ground.faultless_result()
    tools = ground.tools(storage=behind(ground, server))
    job_id = ground.submit()
    server.fail(1.0, seed=1)
    random.seed(10134)  # for short waits
    assert ground.work(tools) == "queued"
    [requeued] = ground.events(job_id, "requeued")
    assert (requeued.data["cause"], requeued.data["code"]) == ("storage", "storage_unavailable")
    assert [len(times) for times in server.tries.values()] == [MAX_TRIES]
    server.heal()
    assert ground.work(tools) == "succeeded"
    assert ground.result(job_id) == expected


# ---------------------------------------------------------------- 35: a slow one


@pytest.mark.fault(35, "S3 at 10 KB/s past the deadline")
def test_files_that_come_too_slowly_end_the_attempt_and_not_the_lease(ground: Ground, network: Proxy) -> None:
    ground.source = ground.keep("large.onnx", random.Random(35).randbytes(200_000))
    expected = ground.faultless_result()
    storage = behind(ground, network, transfer_seconds=1.5, transfer_bytes_per_second=1e6)
    job_id = ground.submit()
    network.throttle(10_000)
    attempt = ground.start_work(ground.tools(storage=storage))
    leases = set()
    while attempt.is_alive():
        leases.add(ground.job(job_id).lease_expires_at)
        attempt.join(0.05)
    assert len(leases - {None}) >= 3, "no heartbeat while the files came"
    [requeued] = ground.events(job_id, "requeued")
    assert (requeued.data["cause"], requeued.data["code"]) == ("storage", "storage_unavailable")
    assert "too slow" in requeued.data["message"]
    assert ground.job(job_id).crashes == 0

    network.heal()
    assert ground.work(ground.tools(storage=storage)) == "succeeded"
    assert ground.result(job_id) == expected


@pytest.mark.fault(35, "S3 at 10 KB/s past the deadline")
def test_a_result_that_leaves_too_slowly_is_no_silent_child(ground: Ground, network: Proxy, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    script = f"wait 0 {gate}; large 0 {32 * 2**20}"
    storage = behind(ground, network, transfer_seconds=3.0, transfer_bytes_per_second=1e9)
    job_id = ground.submit(script)
    tools = ground.tools(storage=storage, stall_seconds=60.0)
    attempt = ground.start_work(tools)
    reached(gate)
    network.throttle(2_000_000)  # boto3 tells of 256 KiB at a time
    vars(tools.settings)["stall_seconds"] = 1.5
    gate.unlink()
    attempt.join()
    [requeued] = ground.events(job_id, "requeued")
    assert (requeued.data["cause"], requeued.data["code"]) == ("storage", "storage_unavailable")
    assert "too slow" in requeued.data["message"]
    vars(tools.settings)["stall_seconds"] = 60.0
    network.heal()
    again = ground.start_work(tools)
    reached(gate).unlink()
    again.join()
    assert ground.job(job_id).status == "succeeded"


# ---------------------------------------------------------------- 36: a network that damages what it brings


@pytest.mark.fault(36, "GET truncated, or a bit flipped")
@pytest.mark.parametrize(("damage", "attempts"), [("flip", 1), ("shorten", 1), ("truncate", 3)])
def test_what_arrives_damaged_is_fetched_again_and_never_read(
    ground: Ground, server: HttpProxy, tmp_path: Path, damage: str, attempts: int
) -> None:
    expected = ground.faultless_result()
    job_id = ground.submit(f"once 1 {tmp_path / 'here'}", max_attempts=4)
    assert ground.work() == "queued"
    for part in ("source.onnx", "0-quantize.onnx"):  # an input, and what the first attempt finished
        getattr(server, damage)(part)
    tools = ground.tools(storage=behind(ground, server))
    ended = [ground.work(tools) for _ in range(attempts)]
    assert ended == ["queued"] * (attempts - 1) + ["succeeded"], ground.reason(job_id)
    assert server.num_damaged == 2
    assert [event.data["cause"] for event in ground.events(job_id, "requeued")[1:]] == ["storage"] * (attempts - 1)
    assert ground.result(job_id) == expected


@pytest.mark.fault(36, "GET truncated, or a bit flipped")
def test_a_file_that_always_arrives_damaged_reaches_no_parser(ground: Ground, server: HttpProxy) -> None:
    job_id = ground.submit()
    server.flip("source.onnx", times=None)
    assert ground.work(ground.tools(storage=behind(ground, server))) == "failed"
    reason = ground.reason(job_id)
    assert (reason["code"], reason["fault"]) == ("digest_mismatch", "platform")
    assert "sha256" in reason["message"]
    assert [event.kind for event in ground.events(job_id)] == ["submitted", "claimed", "failed"]


# ---------------------------------------------------------------- 37: a network that is cut


@pytest.mark.fault(37, "PUT cut; CompleteMultipart's answer lost")
@pytest.mark.parametrize("fault", ["cut in a small file", "cut in a large file", "answer to the last part's join lost"])
def test_an_upload_that_is_cut_leaves_one_file_and_the_stage(
    ground: Ground, network: Proxy, tmp_path: Path, fault: str
) -> None:
    size_bytes = 2**20 if "small" in fault else LARGE_BYTES
    expected = expected_of(ground, f"large 0 {size_bytes}")
    gate = tmp_path / "gate"
    job_id = ground.submit(f"wait 0 {gate}; large 0 {size_bytes}")
    attempt = ground.start_work(ground.tools(storage=behind(ground, network)))
    reached(gate)
    if fault.startswith("cut"):
        network.cut_after(size_bytes // 2)
    else:
        network.lose_answer(b"<CompleteMultipartUpload")
    gate.unlink()
    attempt.join()
    assert network.bytes_left is None
    assert network.num_answers_lost == (not fault.startswith("cut"))
    job = ground.job(job_id)
    assert (job.status, job.attempt) == ("succeeded", 1), job.state_reason
    assert ground.result(job_id) == expected
    assert [found.name for found in artifacts(ground, job_id)] == sorted(expected)
    assert orphans(ground.sessions, ground.storage) == set()
    assert list(ground.storage.list_multiparts()) == []


@pytest.mark.fault(37, "PUT cut; CompleteMultipart's answer lost")
def test_an_upload_whose_last_answer_was_lost_is_complete(ground: Ground, network: Proxy) -> None:
    content = safetensors({"weight": ("F32", [1500, 1000])})
    url = through(network, ground.settings.s3_endpoint_url)
    settings = ground.settings.model_copy(update={"s3_endpoint_url": url, "upload_part_bytes": 5 * 2**20})
    with open_desk(settings, ground.sessions, Storage(settings)) as desk:
        begun = desk.client.post("/v1/uploads", json=announce(content, "safetensors")).json()
        send(begun, content)
        network.lose_answer(b"<CompleteMultipartUpload")
        done = desk.client.post(f"/v1/uploads/{begun['id']}/complete")
        assert (done.status_code, done.json()["status"]) == (200, "ready")
        assert network.num_answers_lost == 1
        again = desk.client.post("/v1/uploads", json=announce(content, "safetensors"))
        assert (again.status_code, again.json()["id"]) == (200, begun["id"])


# ---------------------------------------------------------------- 38: a storage that damages what it keeps


@pytest.fixture
def damaged(ground: Ground) -> Iterator[Callable[[str], str]]:
    """Flips a bit of the one object whose key ends so; what was damaged is repaired at the test's end."""
    kept = dict[str, bytes]()

    def damage(part: str) -> str:
        [key] = [key for key in ground.storage.list_keys() if key.endswith(part)]
        content = kept[key] = b"".join(ground.storage.chunks(key))
        ground.storage.put_bytes(bytes([content[0] ^ 1]) + content[1:], key)
        return key

    yield damage
    for key in set(ground.storage.list_keys()) & set(kept):
        ground.storage.put_bytes(kept[key], key)


@pytest.mark.fault(38, "a stored artifact is corrupted later")
def test_a_damaged_checkpoint_costs_its_epochs_and_nothing_else(
    ground: Ground, damaged: Callable[[str], str], tmp_path: Path
) -> None:
    expected = expected_of(ground, "epochs 0 3")
    job_id = ground.submit(f"epochs 0 3; once 0 {tmp_path / 'here'}")
    assert ground.work() == "queued"
    damaged("0-training.checkpoint")
    assert ground.work() == "succeeded"
    assert ground.logs(job_id).split("\n")[:-1] == [f"epoch {number}" for number in (1, 2, 3)] * 2
    assert ground.result(job_id) == expected


@pytest.mark.fault(38, "a stored artifact is corrupted later")
def test_a_damaged_stage_is_not_built_upon_and_made_anew_by_the_next_job(
    ground: Ground, damaged: Callable[[str], str], tmp_path: Path
) -> None:
    job_id = ground.submit(f"once 1 {tmp_path / 'here'}", use_cache=True)
    assert ground.work() == "queued"
    damaged(f"{artifacts(ground, job_id)[0].sha256}/0-quantize.onnx")
    assert ground.work() == "failed"
    assert ground.reason(job_id)["code"] == "digest_mismatch"
    assert [event.attempt for event in ground.events(job_id, "stage_started")] == [1, 1]

    again = ground.submit(use_cache=True)  # whose cache is what was damaged
    assert ground.work() == "succeeded"
    assert [stage.status for stage in ground.stages(again)] == ["succeeded", "succeeded"]
    assert ground.result(again) == ground.faultless_result()


@pytest.mark.fault(38, "a stored artifact is corrupted later")
def test_whoever_downloads_a_damaged_file_is_told_and_gets_nothing(
    ground: Ground, damaged: Callable[[str], str], tmp_path: Path
) -> None:
    job_id = ground.submit("epochs 0 1")
    assert ground.work() == "succeeded"
    [right] = [ground.storage.chunks(key) for key in ground.storage.list_keys() if key.endswith(".engine")]
    content = b"".join(right)
    engine, log = damaged("1-build_engine.engine"), damaged("attempt-1.log")
    path = f"/v1/jobs/{job_id}/artifacts/1-build_engine.engine"
    with open_desk(ground.settings, ground.sessions, ground.storage) as desk:
        key = create_key(ground.sessions, ground.account_id, "k")
        with client_of(desk.url, key) as client:

            def refuses(path: str) -> bool:
                answer = client.get(path)
                return (answer.status_code, answer.json()["code"]) == (500, "artifact_damaged")

            assert refuses(path)
            assert "retry" in client.get(path).json()["hint"]
            ground.storage.put_bytes(content, engine)  # written anew, but what was recorded
            assert client.get(path).status_code == 307
            ground.storage.put_bytes(content[:-1], engine)
            assert refuses(path)
            ground.storage.remove(engine)
            assert refuses(path)
            assert refuses(f"/v1/jobs/{job_id}/logs")
            ground.storage.remove(log)
            assert refuses(f"/v1/jobs/{job_id}/logs")
            ground.storage.put_bytes(b"epoch 1\n", log)
            assert client.get(f"/v1/jobs/{job_id}/logs").text == "epoch 1\n"
        etag = ground.storage.put_bytes(content[:-1] + b"?", engine)
        with Client(desk.url, key) as client:
            with pytest.raises(ServiceSaidNo, match="not what was recorded"):
                client.job(job_id).download(tmp_path / "out")
            # Where storage itself does not know of it, the client does.
            ground.execute(f"UPDATE artifacts SET etag = '{etag}' WHERE key = '{engine}'")
            with pytest.raises(BrokenDownload, match="Nothing was kept"):
                client.job(job_id).download(tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------- 39: a late upload


@pytest.mark.fault(39, "an older attempt uploads after success")
def test_what_an_older_attempt_stores_after_the_success_is_not_pointed_to_and_collected(
    ground: Ground, network: Proxy, tmp_path: Path
) -> None:
    expected = ground.faultless_result()
    gate = tmp_path / "gate"
    job_id = ground.submit(f"wait 0 {gate}")
    storage = behind(ground, network)
    put = storage.put
    storage.put = lambda path, key, moved, **_: put(path, key, moved=moved)  # type: ignore[method-assign]  # unstopped
    older = ground.start_work(ground.tools(storage=storage))
    reached(gate)
    network.blackhole()
    gate.unlink()
    ground.take_away(job_id)
    wait_until(lambda: not children(job_id), "the older attempt's child to be ended")
    newer = ground.start_work()
    reached(gate).unlink()
    newer.join()
    assert ground.job(job_id).status == "succeeded"
    before = {found.name: found.key for found in artifacts(ground, job_id)}

    network.heal()
    older.join()
    late = orphans(ground.sessions, ground.storage)
    assert [key for key in late if f"{job_id}/1/0/" in key] == list(late) != []
    assert {found.name: found.key for found in artifacts(ground, job_id)} == before
    assert ground.result(job_id) == expected
    assert ground.job(job_id).attempt == 2
    at_once = ground.settings.model_copy(update=AT_ONCE)
    assert retention.collect(ground.sessions, ground.storage, at_once).files == 1
    assert orphans(ground.sessions, ground.storage) == set()
    assert ground.result(job_id) == expected
