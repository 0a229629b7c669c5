"""Log lines: one JSON object each, with no secret in it, wherever the secret came from."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from shared import accounts, log


@pytest.fixture(autouse=True)
def _as_before_afterwards() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def _line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    [line] = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert isinstance(told, dict)
    return told


def test_an_event_is_one_json_line_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("INFO")
    log.get_logger().info("job_claimed", job_id="42", attempt=2)
    told = _line(capsys)
    assert (told["event"], told["job_id"], told["attempt"], told["level"]) == ("job_claimed", "42", 2, "info")
    assert str(told["timestamp"]).endswith("Z")


def test_less_than_the_level_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("INFO")
    log.get_logger().debug("noise")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["api_key", "s3_secret_key", "lease_token", "Password", "Authorization", "signature"])
def test_a_value_whose_name_speaks_of_a_secret_is_hidden(name: str) -> None:
    assert log.redact(None, "", {"event": "e", name: "abc"}) == {"event": "e", name: "[redacted]"}


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
def test_secrets_inside_text_are_hidden_and_nothing_else_is(told: str, shown: str) -> None:
    assert log.redact(None, "", {"event": told, "url": told, "deep": {"list": [told]}}) == {
        "event": shown,
        "url": shown,
        "deep": {"list": [shown]},
    }


def test_a_real_key_is_hidden() -> None:
    key = accounts.KEY_PREFIX + "x" * 43
    assert key not in str(log.redact(None, "", {"event": f"no account for {key}"}))


def test_numbers_and_nothings_stay_what_they_are() -> None:
    event = {"event": "e", "tokens_left": 3, "key": None, "ratio": 0.5}
    assert log.redact(None, "", dict(event)) == event


def test_a_traceback_is_told_without_the_values_of_its_variables(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("INFO")
    hush = "hush" * 3
    try:
        raise ValueError(f"connecting to redis://:{hush}@valkey:6379 failed")
    except ValueError:
        log.get_logger().exception("failed")
    line = capsys.readouterr().err
    assert "ValueError" in line
    assert "test_log.py" in line
    assert hush not in line


def test_an_object_is_told_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("INFO")
    log.get_logger().info("e", what={1})
    assert _line(capsys)["what"] == "{1}"
