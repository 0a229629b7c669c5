"""Log lines: one JSON object each, with no secret in it, wherever the secret came from."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from shared import accounts, log


@pytest.fixture(autouse=True)
def _as_before_afterwards() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("burnish")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:], level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_event_is_one_json_line_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("INFO")
    log.get_logger().info("job_claimed", job_id="42", attempt=2)
    [told] = _lines(capsys)
    assert (told["event"], told["job_id"], told["attempt"], told["level"]) == ("job_claimed", "42", 2, "info")
    assert told["at"].endswith("+00:00")
    assert "logger" not in told


def test_less_than_the_level_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("WARNING")
    log.get_logger().info("noise")
    log.get_logger().warning("ring_lost")
    assert [told["event"] for told in _lines(capsys)] == ["ring_lost"]


def test_other_libraries_are_heard_from_warning_on_under_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("DEBUG")
    logging.getLogger("botocore").info("noise")
    logging.getLogger("botocore").warning("GET http://s3/b?X-Amz-Signature=d3adb33f failed")
    [told] = _lines(capsys)
    assert (told["logger"], told["event"]) == ("botocore", "GET http://s3/b?X-Amz-Signature=[redacted] failed")


@pytest.mark.parametrize("name", ["api_key", "s3_secret_key", "lease_token", "Password", "Authorization", "signature"])
def test_a_value_whose_name_speaks_of_a_secret_is_hidden(name: str) -> None:
    assert log.redact({name: "abc", "deep": {name: ["abc"]}}) == {name: "[redacted]", "deep": {name: ["[redacted]"]}}


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        (
            "PUT http://s3:8333/b/k?X-Amz-Credential=ABC%2F1&X-Amz-Signature=d3adb33f&x=1 failed",
            "PUT http://s3:8333/b/k?X-Amz-Credential=[redacted]&X-Amz-Signature=[redacted]&x=1 failed",
        ),
        ("postgresql+psycopg://burnish:hush@db:5432/burnish", "postgresql+psycopg://burnish:[redacted]@db:5432/burnish"),
        ("redis://:hush@127.0.0.1:6379/0", "redis://:[redacted]@127.0.0.1:6379/0"),
        ("Bearer brn_aB3-_x and more", "Bearer brn_[redacted] and more"),
        ("http://127.0.0.1:8000/v1/jobs/7", "http://127.0.0.1:8000/v1/jobs/7"),
        ("mailto:someone@example.org at 12:30", "mailto:someone@example.org at 12:30"),
    ],
    ids=["presigned", "database", "broker", "API key", "plain URL", "no URL"],
)
def test_secrets_inside_text_are_hidden_and_nothing_else_is(
    told: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log.configure("INFO")
    log.get_logger().info(told, url=told, deep={"list": [told]})
    [line] = _lines(capsys)
    assert (line["event"], line["url"], line["deep"]) == (shown, shown, {"list": [shown]})


def test_a_real_key_is_hidden() -> None:
    key = accounts.KEY_PREFIX + "x" * 43
    assert key not in str(log.redact({"detail": f"no account for {key}"}))


def test_numbers_and_nothings_stay_what_they_are() -> None:
    facts = {"tokens_left": 3, "key": None, "ratio": 0.5}
    assert log.redact(facts) == facts


def test_a_trace_is_told_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("INFO")
    hush = "hush" * 3
    try:
        raise ValueError(f"connecting to redis://:{hush}@valkey:6379 failed")
    except ValueError as error:
        log.get_logger().error("failed", exc_info=error, job_id="42")
    [told] = _lines(capsys)
    assert (told["event"], told["level"], told["job_id"]) == ("failed", "error", "42")
    assert "ValueError: connecting to redis://:[redacted]@valkey:6379 failed" in told["trace"]
    assert "test_log.py" in told["trace"]
    assert hush not in str(told)


def test_an_object_is_told_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("INFO")
    log.get_logger().info("e", what={1})
    assert [told["what"] for told in _lines(capsys)] == ["{1}"]
