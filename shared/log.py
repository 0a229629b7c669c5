"""Structured log lines: an event's name and its facts, as JSON, with secrets taken out."""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

_SECRET_NAMES = ("key", "secret", "token", "password", "authorization", "signature")
_SECRET_IN_URL = re.compile(r"(X-Amz-[A-Za-z-]+=|://[^:/@\s]+:)[^&@\s\"]+")


def configure(level: str = "INFO") -> None:
    """Send structlog's events to standard error as JSON lines; other libraries' from WARNING on."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks,
            redact,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get_logger() -> Any:
    return structlog.get_logger()


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Hide values whose names speak of secrets, and the signatures and passwords in URLs."""
    for name, value in event.items():
        if name != "event" and any(word in name.lower() for word in _SECRET_NAMES) and isinstance(value, str):
            event[name] = "[redacted]"
        elif isinstance(value, str):
            event[name] = _SECRET_IN_URL.sub(r"\1[redacted]", value)
    return event

