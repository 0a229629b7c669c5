"""The way to a service: where it is, with which key, and what happens while it is away."""

from __future__ import annotations

import subprocess
import sys
from typing import Any
from uuid import uuid4

import httpx
import pytest

import burnish.connection
import burnish.upload
from burnish import Client, NoService, ServiceSaidNo, Unreachable
from burnish.connection import find_service
from tests.burnish.workbench import Workbench


def test_a_service_that_comes_back_is_asked_again(
    bench: Workbench, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = list[int]()

    def start_at_the_second_pause(attempt: int, response: httpx.Response | None = None) -> None:
        paused.append(attempt)
        if len(paused) == 2:
            bench.service.start()

    monkeypatch.setattr(burnish.connection, "pause", start_at_the_second_pause)
    bench.service.stop()

    assert list(client.jobs()) == []
    assert paused == [0, 1]


@pytest.mark.parametrize("status", [503, 429])
def test_a_service_that_says_when_to_come_back_is_asked_then(
    client: Client, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    slept, request = list[float](), client._connection.api.request
    answers = [httpx.Response(status, headers={"Retry-After": "2"})] * 2

    def away_twice(method: str, path: str, **arguments: Any) -> httpx.Response:
        return answers.pop() if answers else request(method, path, **arguments)

    monkeypatch.setattr(client._connection.api, "request", away_twice)
    monkeypatch.setattr("burnish.connection.time.sleep", slept.append)

    assert list(client.jobs()) == []
    assert slept == [2.0, 2.0]


def test_a_service_that_stays_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.connection.time.sleep", lambda _: None)
    with Client("http://127.0.0.1:1", "brn_secret") as client, pytest.raises(Unreachable) as told:
        client.workers()
    assert "http://127.0.0.1:1 cannot be reached" in told.value.detail
    assert "brn_secret" not in repr(told.value)


def test_a_wrong_key_is_told(bench: Workbench) -> None:
    with Client(bench.url, "brn_wrong") as client, pytest.raises(ServiceSaidNo) as told:
        client.workers()
    assert (told.value.problem.status, told.value.exit_status) == (401, 2)


def test_another_accounts_job_reads_as_missing(bench: Workbench, client: Client) -> None:
    from shared import accounts

    job = client.submit(bench.job_file())
    stranger = accounts.create_key(bench.sessions, accounts.ensure_account(bench.sessions, "stranger"), "k")
    with Client(bench.url, stranger) as other, pytest.raises(ServiceSaidNo) as told:
        other.job(job.id)
    assert told.value.problem.status == 404


def test_something_else_that_answers_is_told(bench: Workbench) -> None:
    with Client(bench.settings.s3_endpoint_url, "brn_key") as client, pytest.raises(Unreachable, match="and not as a"):
        client.job(uuid4())


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (httpx.Response(200, text="<html>It works!</html>"), "Check the URL"),
        (httpx.Response(301, headers={"Location": "https://moved/v1/workers"}), "It points to https://moved/v1/workers."),
        (httpx.Response(502, text="Bad gateway"), "Check the URL"),
        (httpx.Response(404, text="Not here"), "Check the URL"),
    ],
)
def test_an_answer_that_is_no_services_is_told(
    client: Client, monkeypatch: pytest.MonkeyPatch, answer: httpx.Response, hint: str
) -> None:
    answer.request = httpx.Request("GET", "http://proxy/v1/workers?secret=1")
    monkeypatch.setattr(client._connection.api, "request", lambda *_, **__: answer)
    monkeypatch.setattr("burnish.connection.time.sleep", lambda _: None)

    with pytest.raises(Unreachable, match="http://proxy/v1/workers answered") as told:
        client.workers()

    assert told.value.hint is not None
    assert hint in told.value.hint
    assert "secret" not in told.value.detail


def test_url_and_key_come_from_the_arguments_first(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_URL", "http://environment/")
    monkeypatch.setenv("BURNISH_API_KEY", "from-environment")

    assert find_service() == ("http://environment", "from-environment")
    assert find_service("https://given/", "given") == ("https://given", "given")


def test_without_a_service_there_is_a_sentence(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoService) as told:
        Client()
    assert told.value.hint is not None
    assert "burnish local up" in told.value.hint
    with pytest.raises(NoService, match="no API key for http://given"):
        Client("http://given")
    with pytest.raises(NoService, match="is not a URL"):
        Client("given:8000", "key")


def test_local_modes_key_is_sent_to_local_mode_only(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burnish.connection, "find_local", lambda: ("http://127.0.0.1:8000", "local-key"))

    assert find_service() == ("http://127.0.0.1:8000", "local-key")
    assert find_service("http://127.0.0.1:8000/") == ("http://127.0.0.1:8000", "local-key")
    with pytest.raises(NoService):
        find_service("http://elsewhere")


def test_the_package_is_cheap_to_import_and_never_reaches_the_other_rooms() -> None:
    program = (
        "import sys, burnish; early = {'httpx', 'pydantic'} & set(sys.modules); "
        "import burnish.client, burnish.cli, burnish.commands.jobs, burnish.commands.results; "
        "late = {'api', 'worker', 'torch', 'numpy', 'sqlalchemy', 'boto3'} & set(sys.modules); "
        "print(sorted(early), sorted(late))"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == "[] []"
