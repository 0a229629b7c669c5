"""What holds for every command of `burnish`: exit status, one JSON document, no key and no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from typing import Any

import pytest

from burnish import Client
from burnish.cli import COMMANDS
from shared import lifecycle, workers
from tests.api.desk import wait_until
from tests.burnish.conftest import Command
from tests.burnish.workbench import Workbench, run_command

BURNISH = [sys.executable, "-m", "burnish"]


# ---------------------------------------------------------------- the service


def test_workers_stages_and_targets_are_listed(bench: Workbench, burnish: Command) -> None:
    registration = workers.Registration("worker-1", "here", ["default"], ["stage:quantize"], 2, 2**33, {})
    workers.register(bench.sessions, registration)

    assert "worker-1" in burnish("workers").out
    assert burnish("workers", "--json").document()[0]["cores"] == 2
    assert "torch -> onnx" in burnish("stages").out
    assert burnish("stages", "--json").document()[0]["json_schema"]["type"] == "object"
    assert "cpu-fastest" in burnish("targets").out
    assert "cpu-fastest" in {target["name"] for target in burnish("targets", "--json").document()}


def test_version_tells_both_sides(bench: Workbench, burnish: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    document = burnish("version", "--json").document()
    assert document["client"] == document["service"]

    monkeypatch.delenv("BURNISH_URL")
    told = burnish("version")
    assert told.status == 0
    assert "No Burnish service is configured" in told.out


# ---------------------------------------------------------------- what holds for every command


def test_a_service_that_cannot_be_reached_ends_with_3(
    burnish: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.connection.time.sleep", lambda _: None)
    for command in (["jobs"], ["workers"], ["stages"], ["targets"]):
        told = burnish(*command, "--url", "http://127.0.0.1:1", "--json")
        assert told.status == 3
        assert told.document()["error"]["code"] == "unreachable"


def test_without_a_service_every_command_says_how_to_start_one(
    nowhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["jobs"], ["show", "x"], ["submit", "job.yaml"], ["download", "x"], ["workers"]):
        told = run_command(capsys, *arguments)
        assert told.status == 2
        assert "burnish local up" in told.err


def test_a_wrong_key_ends_with_2_and_is_not_shown(burnish: Command) -> None:
    told = burnish("jobs", "--api-key", "brn_a_wrong_key")
    assert told.status == 2
    assert "brn_a_wrong_key" not in told.out + told.err


def test_the_key_is_shown_by_no_command(bench: Workbench, burnish: Command, job: Any) -> None:
    bench.succeed(bench.claim())
    for arguments in (["jobs"], ["show", str(job.id)], ["wait", str(job.id)], ["report", str(job.id)], ["version"]):
        for told in (burnish(*arguments), burnish(*arguments, "--json")):
            assert bench.key not in told.out + told.err
            assert "X-Amz-Signature" not in told.out + told.err


def test_wrong_usage_ends_with_2(burnish: Command) -> None:
    assert burnish("jobs", "--status", "gone").status == 2
    assert burnish("nothing").status == 2
    told = burnish("show", "--json")
    assert told.status == 2
    assert told.document()["error"]["code"] == "usage"


def test_every_command_takes_json_and_has_a_help(burnish: Command) -> None:
    for name in COMMANDS:
        told = burnish(name, "--help")
        assert told.status == 0
        if name not in ("local", "admin"):
            assert "--json" in told.out, name
    assert "Exit status:" in burnish("--help").out


def test_an_interrupted_wait_leaves_the_job_and_ends_with_130(bench: Workbench, nowhere: None, job: Any) -> None:
    bench.claim()
    environment = {**os.environ, "BURNISH_URL": bench.url, "BURNISH_API_KEY": bench.key}
    with subprocess.Popen(
        [*BURNISH, "wait", str(job.id)],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # the jobs that a shell runs in the background ignore interrupts
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as waiting:
        assert waiting.stderr is not None
        assert "submitted" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=30)

    assert waiting.returncode == 130
    assert f"burnish cancel {job.id}" in err
    assert "Traceback" not in out + err
    assert job.refresh().status == "running"


def test_a_reader_that_has_enough_ends_the_command_quietly(bench: Workbench, nowhere: None, job: Any) -> None:
    environment = {**os.environ, "BURNISH_URL": bench.url, "BURNISH_API_KEY": bench.key}
    with subprocess.Popen(
        [*BURNISH, "stages", "--json"], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as listing:
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.close()
        assert listing.stderr.read() == ""


def test_the_installed_command_is_one_json_document_in_a_process_of_its_own(
    bench: Workbench, nowhere: None, job: Any
) -> None:
    environment = {**os.environ, "BURNISH_URL": bench.url, "BURNISH_API_KEY": bench.key, "FORCE_COLOR": "1"}
    ended = subprocess.run([*BURNISH, "show", str(job.id), "--json"], env=environment, capture_output=True, check=True)
    assert json.loads(ended.stdout)["id"] == str(job.id)
    assert ended.stderr == b""


def test_a_wait_outlives_a_restart_of_the_service(bench: Workbench, burnish: Command, job: Any) -> None:
    claim = bench.claim()

    def restart() -> None:
        wait_until(lambda: bench.service.num_requests("GET", f"/v1/jobs/{job.id}/events") == 1)
        bench.service.stop()
        bench.finish_stages(claim)
        bench.service.start()
        lifecycle.settle(bench.sessions, claim.lease, "cancelled")

    with bench.in_background(restart):
        told = burnish("wait", str(job.id))

    assert told.status == 1
    lines = told.err.splitlines()
    assert lines.count("stage 0 (export_onnx) started") == 1
    assert "stage 2 (build_engine) succeeded" in lines


def test_the_client_and_the_command_find_the_same_service(bench: Workbench, burnish: Command, job: Any) -> None:
    with Client() as client:
        assert [found.id for found in client.jobs()] == [job.id]
