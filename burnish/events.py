"""Follows a job's event stream to its end: every event once and in order, over dropped connections and restarts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from httpx_sse import EventSource, SSEError, connect_sse
from pydantic import ValidationError

from burnish.connection import AWAY, Connection, checked, describe, pause
from burnish.errors import Unreachable
from shared.schemas import Event

LAST = frozenset({"succeeded", "failed", "cancelled"})
PATIENCE_SECONDS = 120.0
SILENCE_SECONDS = 60.0  # the service sends a sign of life far more often


def follow(connection: Connection, job_id: UUID, after: int = 0) -> Iterator[Event]:
    """The job's events after the sequence number `after`, until the one that tells its end.

    Raises:
        Unreachable: the service did not come back within PATIENCE_SECONDS.
        ServiceSaidNo: there is no such job, or the key is not known.
    """
    failures, since = 0, time.monotonic()
    while True:
        reason = "the stream broke off"
        try:
            with _connected(connection, job_id, after) as source:
                if source.response.status_code == httpx.codes.NO_CONTENT:
                    return
                for event in _events(source):
                    failures, since = 0, time.monotonic()
                    if event.sequence > after:
                        after = event.sequence
                        yield event
                    if event.kind in LAST:
                        return
        except httpx.TransportError as error:
            reason = describe(error)
        if time.monotonic() - since > PATIENCE_SECONDS:
            raise Unreachable(f"{connection.url} cannot be reached: {reason}.", hint="The job goes on without you.")
        pause(min(failures, 4))
        failures += 1


@contextmanager
def _connected(connection: Connection, job_id: UUID, after: int) -> Iterator[EventSource]:
    """The stream after an event; what the service refuses for good is raised."""
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=5.0)
    headers = {"Last-Event-ID": str(after)} if after else {}
    path = f"/v1/jobs/{job_id}/events"
    with connect_sse(connection.api, "GET", path, headers=headers, timeout=timeout) as source:
        if source.response.is_error and source.response.status_code not in AWAY:
            source.response.read()
            checked(source.response)
        yield source


def _events(source: EventSource) -> Iterator[Event]:
    """What one connection tells; nothing if the service is away for now."""
    if source.response.is_error:
        return
    try:
        for message in source.iter_sse():
            if message.data:
                yield Event.model_validate_json(message.data)
    except (SSEError, ValidationError) as error:
        raise Unreachable("The service does not answer with an event stream.", hint="Check the URL.") from error
