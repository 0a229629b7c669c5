"""What a job leaves: its files by redirect, its logs as text, its report in three forms."""

from __future__ import annotations

import csv
import hashlib
import io
from typing import Any

import httpx

from shared import lifecycle
from shared.ledger import Reason
from shared.report import (
    Baseline,
    Environment,
    Latency,
    Measurement,
    Method,
    Report,
    StageReport,
)
from tests.api.desk import Desk


def a_report(job: dict[str, Any]) -> dict[str, Any]:
    """A small, complete report of a job, as a worker would settle it with."""

    def measured(engine: str, size_bytes: int, p50: float, dice: float) -> Measurement:
        method = Method(
            engine=engine,
            precision="fp32",
            device="cpu",
            threads=1,
            batch=1,
            warm_up=5,
            runs=50,
            samples=4,
            versions={"torch": "2.14.1"},
        )
        return Measurement(
            parameters=100,
            macs=1000,
            size_bytes=size_bytes,
            latency_ms=Latency(p50=p50, p90=p50),
            baseline_latency_ms=Latency(p50=10, p90=10),
            throughput_per_second={1: 1000 / p50},
            peak_memory_bytes=None,
            metrics={"dice": dice},
            method=method,
        )

    environment = Environment(
        machine="x86_64", cpu="test", cores=2, memory_bytes=2**33, gpu=None, python="3.11", packages={}
    )
    stage = StageReport(
        position=0, kind="export_onnx", status="succeeded", seconds=1, measurement=measured("onnxruntime", 50, 5, 0.9)
    )
    report = Report(
        job=job["id"],
        name=job["name"],
        recipe=job["recipe"],
        source_sha256="0" * 64,
        data_sha256="1" * 64,
        environment=environment,
        baseline=Baseline(source=measured("torch eager", 100, 10, 0.91), onnxruntime=None, environment=environment),
        stages=[stage],
        final=0,
        goals=[],
        verdict="met",
        reason="There were no goals.",
        warnings=["Mind this."],
    )
    return report.model_dump(mode="json")


def test_a_jobs_files_are_listed_and_downloaded_from_storage(desk: Desk) -> None:
    job = desk.submit()
    claim = desk.claim()
    assert desk.client.get(f"{job['url']}/artifacts").json() == {"items": []}
    lifecycle.start_stage(desk.sessions, claim.lease, 0)
    model = desk.keep("model", "0-model.onnx", b"onnx bytes")
    lifecycle.finish_stage(desk.sessions, claim.lease, 0, "succeeded", {}, [model])
    lifecycle.settle(desk.sessions, claim.lease, "succeeded", None, a_report(job), [desk.keep("log", "a.log", b"x")])

    files = desk.client.get(f"{job['url']}/artifacts").json()["items"]
    assert [(file["name"], file["role"], file["stage"], file["attempt"]) for file in files] == [
        ("0-model.onnx", "model", 0, 1),
        ("a.log", "log", None, 1),
    ]
    redirect = desk.client.get(files[0]["url"])
    assert redirect.status_code == 307
    found = httpx.get(redirect.headers["Location"], trust_env=False)
    assert hashlib.sha256(found.content).hexdigest() == files[0]["sha256"]
    assert found.headers["Content-Disposition"] == 'attachment; filename="0-model.onnx"'


def test_a_redirect_holds_for_its_file_only(desk: Desk) -> None:
    job = desk.submit()
    stored = [desk.keep("engine", "engine.zip", b"engine"), desk.keep("log", "attempt-1.log", b"log")]
    lifecycle.settle(desk.sessions, desk.claim().lease, "succeeded", None, a_report(job), stored)
    location = desk.client.get(f"{job['url']}/artifacts/engine.zip").headers["Location"]
    assert httpx.get(location, trust_env=False).content == b"engine"
    other = location.replace("engine.zip", "attempt-1.log").replace(stored[0].sha256, stored[1].sha256)
    assert httpx.get(other, trust_env=False).status_code == 403


def test_a_file_that_is_not_there_is_not_found(desk: Desk) -> None:
    job = desk.submit()
    missing = desk.client.get(f"{job['url']}/artifacts/engine.zip")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert "'engine.zip'" in missing.json()["detail"]


# ---------------------------------------------------------------- logs


def test_a_job_without_a_log_says_so(desk: Desk) -> None:
    job = desk.submit()
    missing = desk.client.get(f"{job['url']}/logs")
    assert (missing.status_code, missing.headers["Content-Type"]) == (404, "application/problem+json")
    assert "no log yet" in missing.json()["detail"]


def test_a_running_jobs_log_is_what_it_told_so_far(desk: Desk) -> None:
    job = desk.submit()
    claim = desk.claim()
    for line in ("one\n", "two\n"):
        lifecycle.heartbeat(desk.sessions, claim.lease, 60, log=line)
    answer = desk.client.get(f"{job['url']}/logs")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.text == "one\ntwo\n"


def test_an_ended_attempts_log_is_read_from_storage(desk: Desk) -> None:
    job = desk.submit()
    first = desk.claim()
    lifecycle.heartbeat(desk.sessions, first.lease, 60, log="first, as it ran\n")
    kept = [desk.keep("log", "attempt-1.log", b"first, whole\n")]
    lifecycle.requeue(desk.sessions, first.lease, Reason("crashed", "It died."), cause="crashed", stored=kept)
    assert desk.client.get(f"{job['url']}/logs").text == "first, whole\n"

    second = desk.claim()
    lifecycle.heartbeat(desk.sessions, second.lease, 60, log="second, so far\n")
    assert desk.client.get(f"{job['url']}/logs").text == "second, so far\n"
    assert desk.client.get(f"{job['url']}/logs", params={"attempt": 1}).text == "first, whole\n"
    absent = desk.client.get(f"{job['url']}/logs", params={"attempt": 3})
    assert (absent.status_code, absent.json()["detail"].endswith("has no log of attempt 3")) == (404, True)


def test_a_long_log_comes_whole(desk: Desk) -> None:
    job = desk.submit()
    content = b"a line of a log\n" * 200_000
    kept = [desk.keep("log", "attempt-1.log", content)]
    lifecycle.settle(desk.sessions, desk.claim().lease, "failed", Reason("bug", "It broke."), None, kept)
    assert desk.client.get(f"{job['url']}/logs").content == content


# ---------------------------------------------------------------- the report


def test_a_report_is_not_ready_before_the_jobs_end(desk: Desk) -> None:
    job = desk.submit()
    early = desk.client.get(f"{job['url']}/report")
    assert (early.status_code, early.json()["code"]) == (409, "report_not_ready")
    assert early.json()["detail"] == "the job is queued"
    desk.client.post(f"{job['url']}/cancel")
    never = desk.client.get(f"{job['url']}/report")
    assert (never.status_code, never.json()["detail"]) == (409, "the job is cancelled and left no report")


def test_a_report_comes_as_json_csv_and_markdown(desk: Desk) -> None:
    job = desk.submit()
    report = a_report(job)
    lifecycle.settle(desk.sessions, desk.claim().lease, "succeeded", None, report)
    assert desk.client.get(f"{job['url']}/report").json() == report
    shown = desk.client.get(job["url"]).json()
    assert (shown["verdict"], shown["headline"], shown["warnings"]) == ("met", "There were no goals.", ["Mind this."])

    table = desk.client.get(f"{job['url']}/report", params={"format": "csv"})
    assert table.headers["Content-Type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [(row["stage"], row["size %"], row["speedup"]) for row in rows] == [
        ("baseline", "100.0", "1.00"),
        ("0 export_onnx", "50.0", "2.00"),
    ]
    page = desk.client.get(f"{job['url']}/report", params={"format": "md"})
    assert page.headers["Content-Type"].startswith("text/markdown")
    assert page.text.startswith("# unet: met")
