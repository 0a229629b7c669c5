"""Structured log lines: an event's name and its facts, as one JSON object a line, with secrets taken out."""

from __future__ import annotations

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

_SECRET_NAMES = ("key", "secret", "token", "password", "authorization", "signature")
# A signature in a URL, a password before a host, an API key.
_SECRETS = re.compile(r"(X-Amz-[A-Za-z-]+=)[^&\s\"']+|(://[^:/@\s]*:)[^@/\s]+(?=@)|(\bbrn_)[A-Za-z0-9_-]+")


class Log:
    """`log.info("claimed", job_id=...)`: the event first, then what there is to know of it."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def info(self, event: str, **facts: Any) -> None:
        self._logger.info(event, extra={"facts": facts})

    def warning(self, event: str, **facts: Any) -> None:
        self._logger.warning(event, extra={"facts": facts})

    def error(self, event: str, *, exc_info: BaseException | None = None, **facts: Any) -> None:
        self._logger.error(event, exc_info=exc_info, extra={"facts": facts})


def get_logger() -> Log:
    return Log("burnish")


def configure(level: str = "INFO") -> None:
    """Send every logger's lines to standard error as JSON: ours from `level` on, the libraries' from WARNING on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("burnish").setLevel(level.upper())


class JsonLines(logging.Formatter):
    """{"at", "level", "event", facts..., "logger" and "trace" where there is one}."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "event": _without_secrets(record.getMessage()),
            **redact(getattr(record, "facts", {})),
        }
        if record.name != "burnish":
            line["logger"] = record.name
        if record.exc_info:
            line["trace"] = _without_secrets(self.formatException(record.exc_info))
        return json.dumps(line, default=str)


def redact(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without values whose names speak of secrets, API keys, and signatures and passwords in URLs."""
    return {name: _redacted(str(name), value) for name, value in facts.items()}


def _redacted(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redacted(name, entry) for entry in value]
    if not isinstance(value, str):
        return value
    if any(word in name.lower() for word in _SECRET_NAMES):
        return "[redacted]"
    return _without_secrets(value)


def _without_secrets(text: str) -> str:
    return _SECRETS.sub(lambda found: "".join(filter(None, found.groups())) + "[redacted]", text)
