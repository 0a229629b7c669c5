"""The Python client against a real service, with the ledger played by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from burnish import BadInput, Client, ServiceSaidNo
from shared.schemas import JobRequest
from tests.api.desk import data, wait_until, weights
from tests.burnish.workbench import ENGINE, RECIPE, Workbench

# ---------------------------------------------------------------- submitting


def test_a_job_goes_from_its_file_to_an_engine_in_one_line(bench: Workbench, client: Client, tmp_path: Path) -> None:
    with bench.in_background(lambda: bench.succeed(bench.claim())):
        path = client.submit(bench.job_file()).wait().download(tmp_path / "engines")

    assert path == tmp_path / "engines" / "engine.zip"
    assert path.read_bytes() == ENGINE


def test_a_submitted_job_tells_its_url_name_and_stages(bench: Workbench, client: Client) -> None:
    job = client.submit(bench.job_file())

    assert job.url == f"{bench.url}/v1/jobs/{job.id}"
    assert (job.name, job.status, job.verdict) == ("unet", "queued", None)
    assert [stage.kind for stage in job.view.stages] == ["export_onnx", "quantize", "build_engine"]


def test_an_order_is_a_path_a_mapping_or_a_request(bench: Workbench, client: Client) -> None:
    path = bench.job_file()
    files = {"weights": bench.directory / "weights.safetensors", "data": bench.directory / "data.safetensors"}
    source = {**RECIPE["source"], "weights": files["weights"]}
    mapping = {"name": "mapping", "recipe": {**RECIPE, "source": source, "data": {"artifact": str(files["data"])}}}
    request = JobRequest.model_validate(client.submit(path).view.model_dump(include={"name", "recipe"}))

    assert client.submit(mapping).name == "mapping"
    assert client.submit(request).view.recipe == request.recipe


def test_an_idempotency_key_gives_the_same_job_again(bench: Workbench, client: Client) -> None:
    path = bench.job_file()

    first, again = (client.submit(path, idempotency_key="monday") for _ in range(2))

    assert first.id == again.id
    assert client.submit(path).id != first.id


def test_a_key_for_another_request_is_refused(bench: Workbench, client: Client) -> None:
    client.submit(bench.job_file(), idempotency_key="monday")

    with pytest.raises(ServiceSaidNo) as told:
        client.submit(bench.job_file(seed=1), idempotency_key="monday")

    assert told.value.code == "idempotency_conflict"
    assert told.value.exit_status == 2


def test_a_submit_whose_answer_was_lost_makes_one_job(
    bench: Workbench, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, lost = client._connection.api, list[str]()
    request = api.request

    def lose_the_first_answer(method: str, path: str, **arguments: Any) -> httpx.Response:
        answer = request(method, path, **arguments)
        if path == "/v1/jobs" and method == "POST" and not lost:
            lost.append(path)
            raise httpx.ReadError("connection reset")
        return answer

    monkeypatch.setattr(api, "request", lose_the_first_answer)
    client.submit(bench.job_file())

    assert bench.service.num_requests("POST", "/v1/jobs") == 2
    assert len(list(client.jobs())) == 1


def test_validate_says_what_a_job_needs_and_submits_nothing(bench: Workbench, client: Client) -> None:
    found = client.validate(bench.job_file())

    assert "stage:quantize" in found.requires
    assert found.waiting_reason is not None
    assert found.waiting_reason.code == "no_worker"
    assert list(client.jobs()) == []


def test_what_only_the_service_knows_is_told_with_its_place(bench: Workbench, client: Client) -> None:
    missing = uuid4()
    path = bench.job_file(data={"artifact": str(missing)})

    with pytest.raises(ServiceSaidNo) as told:
        client.submit(path)

    assert told.value.problem.status == 404
    assert [found.location for found in told.value.errors] == ["recipe.data.artifact"]


def test_a_job_that_does_not_hold_together_sends_nothing(bench: Workbench, client: Client) -> None:
    with pytest.raises(BadInput):
        client.submit(bench.job_file(stages=[{"kind": "build_engine"}]))

    assert bench.service.requests == []
    assert list(bench.storage.list_keys()) == []


def test_uploaded_data_are_checked_by_the_service_too(bench: Workbench, client: Client) -> None:
    path = bench.directory / "data.safetensors"
    path.write_bytes(data(parts=("evaluation",)))
    bad = {**RECIPE, "data": {"artifact": str(client.upload(path))}}
    (bench.directory / "weights.safetensors").write_bytes(weights())
    bad["source"] = {**RECIPE["source"], "weights": str(bench.directory / "weights.safetensors")}

    with pytest.raises(ServiceSaidNo) as told:
        client.submit({"name": "unet", "recipe": bad})
    assert told.value.code == "calibration_missing"


# ---------------------------------------------------------------- lists


def test_jobs_are_listed_newest_first_over_every_page(
    bench: Workbench, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.client.PAGE_SIZE", 2)
    path = bench.job_file()
    made = [client.submit(path).id for _ in range(5)]

    assert [job.id for job in client.jobs()] == made[::-1]
    assert [job.id for job in client.jobs(limit=3)] == made[:1:-1]
    assert list(client.jobs(limit=0)) == []


def test_jobs_are_filtered_by_status_and_tag(bench: Workbench, client: Client) -> None:
    path = bench.job_file()
    waiting, cancelled = client.submit(path), client.submit(path).cancel()

    assert [job.id for job in client.jobs(status="cancelled")] == [cancelled.id]
    assert [job.id for job in client.jobs(status="queued", tag="test")] == [waiting.id]
    assert list(client.jobs(tag="other")) == []


def test_a_job_is_found_by_its_id_or_its_url(bench: Workbench, client: Client) -> None:
    job = client.submit(bench.job_file())

    assert client.job(job.url).id == client.job(str(job.id)).id == job.id
    with pytest.raises(BadInput, match="is not a job's id"):
        client.job("unet")


def test_the_service_tells_what_it_can_do(client: Client) -> None:
    assert {stage.kind for stage in client.stages()} >= {"export_onnx", "quantize", "build_engine"}
    assert "cpu-fastest" in {target.name for target in client.targets()}
    assert client.workers() == []
    assert client.version().api == "v1"


def test_a_worker_that_is_there_is_told(bench: Workbench, client: Client) -> None:
    from shared import workers

    workers.register(
        bench.sessions,
        workers.Registration("worker-1", "here", ["default"], ["stage:quantize"], 2, 2**33, {"cpu": "a cpu"}),
    )
    wait_until(lambda: len(client.workers()) == 1)
    assert client.workers()[0].alive


def test_the_package_has_the_client_and_its_errors_and_nothing_else() -> None:
    import burnish

    assert {name for name in burnish.__all__ if not hasattr(burnish, name)} == set()
    with pytest.raises(AttributeError, match="has no attribute 'Server'"):
        burnish.Server  # noqa: B018
