"""The commands that submit, show and end jobs, against a real service."""

from __future__ import annotations

import sys
from typing import Any, get_args

import pytest

from shared import lifecycle
from shared.report import Verdict
from tests.burnish.conftest import Command
from tests.burnish.workbench import Workbench

BURNISH = [sys.executable, "-m", "burnish"]


# ---------------------------------------------------------------- submit and validate


def test_submit_tells_the_jobs_url_and_that_files_were_sent(bench: Workbench, burnish: Command) -> None:
    told = burnish("submit", bench.job_file())

    assert told.status == 0
    assert f"{bench.url}/v1/jobs/" in told.out
    assert "sending weights.safetensors" in told.err
    assert "sending data.safetensors" in told.err


def test_a_second_submit_sends_no_file_again(bench: Workbench, burnish: Command) -> None:
    path = bench.job_file()
    burnish("submit", path)

    told = burnish("submit", path)

    assert "sending" not in told.err
    assert "weights.safetensors was uploaded before" in told.err
    assert len(list(bench.storage.list_keys("uploads/"))) == 2


def test_submit_and_wait_shows_every_stage_and_ends_with_0(bench: Workbench, burnish: Command) -> None:
    path = bench.job_file()
    with bench.in_background(lambda: bench.succeed(bench.claim())):
        told = burnish("submit", path, "--wait")

    assert told.status == 0
    lines = told.err.splitlines()
    assert "attempt 1 started on worker-1" in lines
    assert "stage 1 (quantize) 50% half way" in lines
    assert "stage 2 (build_engine) succeeded" in lines
    assert "verdict    met" in told.out


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        ("missed", "its result misses a goal"),
        ("not_shown", "do not show that every goal is met; more of them, or wider goals, settle it"),
        ("not_evaluated", "not all of its goals could be evaluated"),
        ("no_gain", "its result is neither smaller nor faster than your model"),
    ],
)
def test_every_verdict_but_met_ends_with_4_and_says_why(
    bench: Workbench, burnish: Command, job: Any, verdict: Verdict, why: str
) -> None:
    bench.succeed(bench.claim(), verdict)

    told = burnish("wait", str(job.id))

    assert told.status == 4
    assert why in told.err
    assert f"See 'burnish report {job.id}'." in told.err
    assert f"headline   The headline of {verdict}." in told.out
    assert "warning    Stage 1 (quantize): a warning." in told.out


def test_a_missed_goal_is_one_json_document_with_its_headline(bench: Workbench, burnish: Command) -> None:
    path = bench.job_file()
    with bench.in_background(lambda: bench.succeed(bench.claim(), "missed")):
        told = burnish("submit", path, "--wait", "--json")

    assert told.status == 4
    found = told.document()
    assert (found["status"], found["verdict"]) == ("succeeded", "missed")
    assert (found["headline"], found["warnings"]) == ("The headline of missed.", ["Stage 1 (quantize): a warning."])


def test_the_help_lists_the_exit_status_of_every_verdict(burnish: Command) -> None:
    text = burnish("--help").out
    assert all(verdict in text for verdict in get_args(Verdict))


def test_a_failed_job_ends_with_1_and_its_reason(bench: Workbench, burnish: Command) -> None:
    path = bench.job_file()
    with bench.in_background(lambda: bench.fail(bench.claim())):
        told = burnish("submit", path, "--wait")

    assert told.status == 1
    assert "The calibration data are all zero." in told.err
    assert "Send other data." in told.err
    assert f"{bench.url}/v1/jobs/" in told.out


def test_a_failed_job_is_one_json_document(bench: Workbench, burnish: Command) -> None:
    path = bench.job_file()
    with bench.in_background(lambda: bench.fail(bench.claim())):
        told = burnish("submit", path, "--wait", "--json")

    assert told.status == 1
    assert told.document()["error"]["code"] == "job_failed"
    assert told.document()["job"]["status"] == "failed"


def test_submit_with_the_same_key_gives_the_same_job(bench: Workbench, burnish: Command) -> None:
    path = bench.job_file()
    first, again = (burnish("submit", path, "--idempotency-key", "k", "--json").document() for _ in range(2))
    assert first["id"] == again["id"]


def test_validate_tells_what_the_job_needs(bench: Workbench, burnish: Command) -> None:
    path = bench.job_file()
    told = burnish("validate", path)

    assert told.status == 0
    assert "is valid" in told.out
    assert "it would wait: No live worker serves the queue 'default'" in told.out
    found = burnish("validate", path, "--json").document()
    assert found["valid"] is True
    assert len(found["notes"]) == 2
    assert burnish("jobs", "--json").document() == []


def test_notes_are_printed_by_validate_and_by_submit(bench: Workbench, burnish: Command) -> None:
    path = bench.job_file(goals=[{"metric": "dice", "kind": "max_drop", "value": 0.5}])
    note = "note on recipe.goals.0: A max_drop of 0.5 lets 50 points of dice be lost"
    assert note in burnish("validate", path).out
    submitted = burnish("submit", path, "--json")
    assert note in submitted.err
    assert submitted.document()["status"] == "queued"


def test_a_bad_job_file_ends_with_2_and_a_line(bench: Workbench, burnish: Command) -> None:
    path = bench.job_file(stages=[{"kind": "export_onnx", "opsett": 18}])
    for command in ("submit", "validate"):
        told = burnish(command, path)

        assert told.status == 2
        assert told.out == ""
        assert "recipe.stages.0.opsett (line " in told.err
        assert "is not a known field" in told.err
    assert bench.service.requests == []


def test_a_pickle_ends_with_2_and_what_to_send_instead(bench: Workbench, burnish: Command) -> None:
    source = {"architecture": {"library": "monai", "name": "BasicUNet"}, "weights": "unet.pth"}
    (bench.directory / "unet.pth").write_bytes(b"\x80\x04")

    told = burnish("submit", bench.job_file(source=source), "--json")

    assert told.status == 2
    error = told.document()["error"]
    assert "can carry code" in error["errors"][0]["message"]
    assert "safetensors.torch.save_file" in error["hint"]


def test_an_error_of_the_service_is_a_sentence_with_places_and_hint(bench: Workbench, burnish: Command) -> None:
    missing = "01990000-0000-7000-8000-000000000001"
    told = burnish("submit", bench.job_file(data={"artifact": missing}))

    assert told.status == 2
    assert f"Error: there is no upload {missing}" in told.err
    assert "recipe.data.artifact: there is no upload" in told.err
    assert "Traceback" not in told.err


# ---------------------------------------------------------------- jobs


def test_jobs_lists_name_status_and_url(bench: Workbench, burnish: Command, job: Any) -> None:
    told = burnish("jobs")

    assert told.status == 0
    assert "unet" in told.out
    assert "queued" in told.out
    assert job.url in told.out


def test_jobs_are_filtered(bench: Workbench, burnish: Command, job: Any) -> None:
    assert [found["id"] for found in burnish("jobs", "--json").document()] == [str(job.id)]
    assert burnish("jobs", "--status", "failed", "--json").document() == []
    assert len(burnish("jobs", "--tag", "test", "--limit", "1", "--json").document()) == 1
    assert burnish("jobs", "--tag", "nothing", "--json").document() == []


def test_show_tells_stages_files_and_reason(bench: Workbench, burnish: Command, job: Any) -> None:
    bench.succeed(bench.claim())

    told = burnish("show", str(job.id))

    assert told.status == 0
    for part in (job.url, "succeeded", "build_engine", "engine.zip", "attempt-1.log", "The headline of met."):
        assert part in told.out
    assert [file["name"] for file in burnish("show", job.url, "--json").document()["artifacts"]] == [
        "engine.zip",
        "attempt-1.log",
    ]


def test_show_tells_how_far_a_running_job_is(bench: Workbench, burnish: Command, job: Any) -> None:
    claim = bench.claim()
    lifecycle.start_stage(bench.sessions, claim.lease, 0)
    lifecycle.heartbeat(bench.sessions, claim.lease, 60, lifecycle.Progress(0, 0.25, "tracing [conv]"))

    told = burnish("show", str(job.id))

    assert "running: stage 0 (export_onnx) 25%" in told.out
    assert "tracing [conv]" in told.out


def test_show_of_a_failed_job_ends_with_0(bench: Workbench, burnish: Command, job: Any) -> None:
    bench.fail(bench.claim())
    told = burnish("show", str(job.id))
    assert told.status == 0
    assert "The calibration data are all zero. Send other data." in told.out


def test_wait_ends_as_the_job_ends(bench: Workbench, burnish: Command, job: Any) -> None:
    bench.succeed(bench.claim())
    assert burnish("wait", str(job.id), "--json").document()["verdict"] == "met"


def test_wait_for_a_cancelled_job_ends_with_1(bench: Workbench, burnish: Command, job: Any) -> None:
    job.cancel()
    told = burnish("wait", str(job.id))
    assert told.status == 1
    assert "was cancelled: Cancelled while it waited." in told.err


def test_logs_follow_a_job_to_its_end(bench: Workbench, burnish: Command, job: Any) -> None:
    claim = bench.claim()
    with bench.in_background(lambda: bench.succeed(claim)):
        told = burnish("logs", "-f", str(job.id))

    assert told.status == 0
    assert told.out == "line of stage 0\nline of stage 1\nline of stage 2\n"
    assert burnish("logs", str(job.id)).out == told.out
    assert burnish("logs", str(job.id), "--json").document()["log"] == told.out


def test_a_log_that_is_not_there_yet_is_told(burnish: Command, job: Any) -> None:
    told = burnish("logs", str(job.id))
    assert told.status == 2
    assert "no log yet" in told.err


def test_cancel_and_retry_show_the_job(burnish: Command, job: Any) -> None:
    assert burnish("cancel", str(job.id), "--json").document()["status"] == "cancelled"
    assert burnish("cancel", str(job.id)).status == 0, "again is no error"

    again = burnish("retry", str(job.id), "--json").document()

    assert again["retry_of"] == str(job.id)
    told = burnish("retry", str(job.id))
    assert f"repeats    {job.id}" in told.out


def test_retry_of_a_job_that_has_not_ended_ends_with_2(burnish: Command, job: Any) -> None:
    told = burnish("retry", str(job.id))
    assert told.status == 2
    assert "only an ended job can be retried" in told.err
    assert "Cancel it first." in told.err


def test_a_job_that_is_not_there_ends_with_2(burnish: Command) -> None:
    assert burnish("show", "01990000-0000-7000-8000-000000000001").status == 2
    assert "is not a job's id" in burnish("show", "unet").err
