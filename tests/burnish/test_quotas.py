"""Quotas as a user meets them: one sentence at once, and an operator who can raise them."""

from __future__ import annotations

import pytest

import burnish.connection
from burnish import Client, ServiceSaidNo
from burnish.local.apps import environment_of
from shared import quotas
from tests.burnish.workbench import Workbench, run_command


@pytest.fixture
def full(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """An account that may have one job and has it; whoever waits for room would fail the test."""
    quotas.allow(bench.sessions, "clinic", max_active_jobs=1)
    with bench.client() as client:
        client.submit(bench.job_file())

    def pause(*_: object) -> None:
        raise AssertionError("waited for a quota")

    monkeypatch.setattr(burnish.connection, "pause", pause)
    for name, value in {"BURNISH_URL": bench.url, "BURNISH_API_KEY": bench.key}.items():
        monkeypatch.setenv(name, value)
    return bench


def test_the_client_tells_a_quota_at_once(full: Workbench) -> None:
    with Client(full.url, full.key) as client, pytest.raises(ServiceSaidNo) as told:
        client.submit(full.job_file())
    assert (told.value.code, told.value.problem.status, told.value.exit_status) == ("too_many_jobs", 429, 2)
    assert told.value.detail == "the account has 1 of at most 1 jobs queued or running"


def test_the_command_tells_a_quota_as_any_refusal(full: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    told = run_command(capsys, "submit", full.job_file())
    assert (told.status, told.out) == (2, "")
    assert "1 of at most 1 jobs queued or running" in told.err
    assert "cancel some" in told.err
    document = run_command(capsys, "submit", full.job_file(), "--json").document()
    assert document["error"]["code"] == "too_many_jobs"


def test_the_operator_sees_and_raises_it(
    full: Workbench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment_of(full.settings).items():
        monkeypatch.setenv(name, value)
    told = run_command(capsys, "admin", "quota", "clinic")
    assert "1 of 1 jobs queued or running (its own limit)" in told.out
    assert "of 214,748,364,800 bytes of uploads (the service's limit)" in told.out
    raised = run_command(capsys, "admin", "quota", "clinic", "--max-jobs", "2", "--max-bytes", "5000", "--json")
    assert raised.document()["max_active_jobs"] == 2
    assert raised.document()["max_stored_bytes"] == 5000
    assert run_command(capsys, "submit", full.job_file()).status == 0
    lowered = run_command(capsys, "admin", "quota", "clinic", "--max-jobs", "default", "--json").document()
    assert (lowered["max_active_jobs"], lowered["max_stored_bytes"], lowered["active_jobs"]) == (None, 5000, 2)
    assert lowered["default_max_active_jobs"] == full.settings.max_active_jobs_per_account
    assert run_command(capsys, "admin", "quota", "nobody").status == 2
    assert run_command(capsys, "admin", "quota", "clinic", "--max-jobs", "-1").status == 2
