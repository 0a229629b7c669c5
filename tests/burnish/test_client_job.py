"""A job in the client's hands: waited for, followed, and what it made."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from burnish import BadInput, BrokenDownload, Client, JobFailed, ServiceSaidNo
from shared.report import Report
from shared.schemas import Event
from tests.burnish.workbench import ENGINE, Workbench

# ---------------------------------------------------------------- waiting


def test_wait_tells_every_event_once_and_in_order(bench: Workbench, client: Client) -> None:
    job, told = client.submit(bench.job_file()), list[Event]()

    with bench.in_background(lambda: bench.succeed(bench.claim())):
        job.wait(on_event=told.append)

    assert [event.sequence for event in told] == list(range(1, len(told) + 1))
    assert [told[0].kind, told[1].kind, told[-1].kind] == ["submitted", "claimed", "succeeded"]
    assert (job.status, job.verdict, job.has_ended) == ("succeeded", "met", True)
    assert job.headline == "The headline of met."


def test_events_survive_a_restart_of_the_service(bench: Workbench, client: Client) -> None:
    job, told = client.submit(bench.job_file()), list[Event]()
    claim = bench.claim()
    seen_first_stage = threading.Event()

    def note(event: Event) -> None:
        told.append(event)
        if event.kind == "stage_started":
            seen_first_stage.set()

    def restart_and_finish() -> None:
        from shared import lifecycle

        lifecycle.start_stage(bench.sessions, claim.lease, 0)
        assert seen_first_stage.wait(10)
        bench.service.stop()
        lifecycle.heartbeat(bench.sessions, claim.lease, 60, lifecycle.Progress(0, 0.25, "while nobody listened"))
        bench.service.start()
        bench.fail(claim)

    with bench.in_background(restart_and_finish), pytest.raises(JobFailed):
        job.wait(on_event=note)

    assert [event.sequence for event in told] == list(range(1, len(told) + 1))
    assert [event.kind for event in told] == [
        *("submitted", "claimed", "stage_started", "progress", "stage_started", "failed")
    ]
    assert bench.service.num_requests("GET", f"/v1/jobs/{job.id}/events") >= 2


def test_a_failed_job_raises_with_its_reason(bench: Workbench, client: Client) -> None:
    job = client.submit(bench.job_file())
    bench.fail(bench.claim())

    with pytest.raises(JobFailed) as told:
        job.wait()

    assert told.value.job is job
    assert "failed: The calibration data are all zero." in str(told.value)
    assert told.value.hint == "Send other data."
    assert [stage.status for stage in job.view.stages] == ["skipped", "failed", "skipped"]


def test_a_cancelled_job_raises(bench: Workbench, client: Client) -> None:
    job = client.submit(bench.job_file()).cancel()

    assert job.status == "cancelled"
    assert job.cancel().status == "cancelled", "again is no error"
    with pytest.raises(JobFailed, match="was cancelled"):
        job.wait()


def test_a_job_that_ended_long_ago_is_waited_for_at_once(bench: Workbench, client: Client) -> None:
    job = client.submit(bench.job_file())
    bench.succeed(bench.claim())

    assert client.job(job.id).wait().status == "succeeded"


def test_events_after_the_last_one_are_none(bench: Workbench, client: Client) -> None:
    job = client.submit(bench.job_file()).cancel()
    last = job.view.last_sequence

    assert [event.kind for event in job.events()] == ["submitted", "cancelled"]
    assert [event.kind for event in job.events(after=1)] == ["cancelled"]
    assert list(job.events(follow=True, after=last)) == []


def test_more_events_than_a_page_holds_are_all_told(
    bench: Workbench, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.client.EVENTS_PAGE", 3)
    job = client.submit(bench.job_file())
    bench.succeed(bench.claim())

    assert [event.sequence for event in job.events()] == list(range(1, job.refresh().view.last_sequence + 1))


def test_logs_are_read_while_the_job_runs_and_after(bench: Workbench, client: Client) -> None:
    job = client.submit(bench.job_file())
    claim = bench.claim()
    with bench.in_background(lambda: bench.succeed(claim)):
        followed = list(job.logs(follow=True))

    assert followed == ["line of stage 0\n", "line of stage 1\n", "line of stage 2\n"]
    assert "".join(job.logs()) == "".join(followed)


def test_a_retry_is_a_new_job_that_names_the_old_one(bench: Workbench, client: Client) -> None:
    job = client.submit(bench.job_file()).cancel()

    again = job.retry()

    assert again.id != job.id
    assert again.view.retry_of == job.id
    assert again.view.recipe == job.view.recipe


def test_a_running_job_cannot_be_retried(bench: Workbench, client: Client) -> None:
    with pytest.raises(ServiceSaidNo) as told:
        client.submit(bench.job_file()).retry()
    assert (told.value.code, told.value.hint) == ("conflict", "Cancel it first.")


# ---------------------------------------------------------------- what a job made


def test_the_report_is_read_as_what_it_is(bench: Workbench, client: Client) -> None:
    job = client.submit(bench.job_file())
    bench.succeed(bench.claim())

    report = job.report()

    assert isinstance(report, Report)
    assert (report.job, report.verdict, report.final) == (job.id, "met", 2)
    assert job.report_as("md").startswith("# unet: met")
    assert job.report_as("csv").startswith("stage,status,engine")


def test_a_job_without_a_report_says_so(bench: Workbench, client: Client) -> None:
    with pytest.raises(ServiceSaidNo) as told:
        client.submit(bench.job_file()).report()
    assert told.value.code == "report_not_ready"


def test_a_corrupted_file_is_refused_and_leaves_nothing_behind(
    bench: Workbench, client: Client, tmp_path: Path
) -> None:
    job = client.submit(bench.job_file())
    bench.succeed(bench.claim())
    bench.damage("engine.zip", b"X" + ENGINE[1:])

    with pytest.raises(BrokenDownload, match="Nothing was kept"):
        job.download(tmp_path / "out")

    assert list((tmp_path / "out").iterdir()) == []


def test_a_download_that_breaks_off_is_begun_again(
    bench: Workbench, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit(bench.job_file())
    bench.succeed(bench.claim())
    broken = list[str]()
    receive = httpx.Response.iter_raw

    def break_once(response: httpx.Response, chunk_size: int | None = None) -> Any:
        for chunk in receive(response, 1000):
            yield chunk
            if not broken:
                broken.append("once")
                raise httpx.ReadError("connection reset")

    monkeypatch.setattr(httpx.Response, "iter_raw", break_once)
    assert job.download(tmp_path).read_bytes() == ENGINE


def test_a_download_replaces_the_file_of_that_name(bench: Workbench, client: Client, tmp_path: Path) -> None:
    job = client.submit(bench.job_file())
    bench.succeed(bench.claim())
    (tmp_path / "engine.zip").write_bytes(b"an older one")

    assert job.download(tmp_path).read_bytes() == ENGINE
    assert not (tmp_path / "engine.zip.part").exists()


def test_any_file_is_downloaded_by_its_name(bench: Workbench, client: Client, tmp_path: Path) -> None:
    job = client.submit(bench.job_file())
    bench.succeed(bench.claim())

    assert job.download(tmp_path, name="attempt-1.log").read_text().startswith("line of stage 0")
    with pytest.raises(BadInput) as told:
        job.download(tmp_path, name="nothing")
    assert told.value.hint == "It has: engine.zip, attempt-1.log."


def test_a_job_that_delivered_nothing_says_so(bench: Workbench, client: Client, tmp_path: Path) -> None:
    job = client.submit(bench.job_file())
    bench.fail(bench.claim())

    with pytest.raises(ServiceSaidNo, match="left no report"):
        job.download(tmp_path)


def test_a_directory_that_cannot_be_written_is_told(bench: Workbench, client: Client, tmp_path: Path) -> None:
    job = client.submit(bench.job_file())
    bench.succeed(bench.claim())
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(BadInput, match="cannot be written"):
        job.download(tmp_path / "file")
