"""What a job tells while it runs: its events, as JSON or as a stream, and its log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from itertools import chain
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from api.changes import Changes
from api.deps import AccountDep, ChangesDep, JobId, SessionsDep, StorageDep
from api.errors import OWNED, problems
from shared import browse
from shared.db import Sessions
from shared.errors import ArtifactDamaged, DigestMismatch, NotFound, Unavailable
from shared.models import JOB_TERMINAL, Artifact
from shared.schemas import Event, EventList
from shared.storage import Storage

EVENT_STREAM = "text/event-stream"
KEEP_ALIVE_SECONDS = 15.0
PAGE = 500
MAX_SEQUENCE = 2**31 - 1

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])


@router.get(
    "/events",
    summary="What happened to a job, as a list or as a stream",
    operation_id="list_events",
    response_model=EventList,
    responses={
        200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}},
        204: {"description": "To a stream's reader: the job has ended and everything was told."},
        **problems(*OWNED),
    },
)
async def events(
    request: Request,
    job_id: JobId,
    account_id: AccountDep,
    sessions: SessionsDep,
    changes: ChangesDep,
    after: Annotated[int, Query(ge=0, le=MAX_SEQUENCE, description="Only events after this one.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="At most so many; a stream has no limit.")] = 1000,
    last_event_id: Annotated[
        str | None, Header(pattern="^[0-9]{1,9}$", description="Go on after this event; stronger than `after`.")
    ] = None,
) -> EventList | Response:
    """With `Accept: text/event-stream`, server-sent events from the first (or after Last-Event-ID) to the job's end.

    Each has the event's sequence as its id and its kind as its name. The stream ends after the event that ends the
    job. The one route that is a coroutine: a stream that waits holds neither a thread nor a connection.
    """
    start = int(last_event_id) if last_event_id else after
    standing = await run_in_threadpool(browse.standing, sessions, account_id, job_id)
    if EVENT_STREAM not in request.headers.get("accept", ""):
        found = await run_in_threadpool(browse.events, sessions, job_id, after=start, limit=limit)
        return EventList(items=found)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    if standing.ended and start >= standing.last_sequence:
        return Response(status_code=204, headers=headers, media_type=EVENT_STREAM)
    changes.demand_room()
    return StreamingResponse(_stream(sessions, changes, job_id, start), headers=headers, media_type=EVENT_STREAM)


@router.get(
    "/logs",
    summary="Read a job's log",
    operation_id="get_log",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **problems(*OWNED, ArtifactDamaged),
    },
)
def logs(
    job_id: JobId,
    account_id: AccountDep,
    sessions: SessionsDep,
    storage: StorageDep,
    attempt: Annotated[int | None, Query(ge=1, le=MAX_SEQUENCE, description="Which attempt; else the newest.")] = None,
) -> Response:
    """The whole log of an attempt that has ended, or what the running one has told so far."""
    found = browse.log(sessions, account_id, job_id, attempt)
    chunks = iter([found.encode()]) if isinstance(found, str) else _kept(storage, found)
    first = next(chunks, b"")  # a storage that is away is told by a status, not by a cut answer
    return StreamingResponse(chain([first], chunks), media_type="text/plain")


def _kept(storage: Storage, found: Artifact) -> Iterator[bytes]:
    try:
        yield from storage.verified_chunks(found.key, sha256=found.sha256, size_bytes=found.size_bytes)
    except (NotFound, DigestMismatch) as error:
        raise ArtifactDamaged from error


async def _stream(sessions: Sessions, changes: Changes, job_id: UUID, after: int) -> AsyncIterator[bytes]:
    with changes.watch(job_id) as woken:
        while True:
            woken.clear()
            try:
                found = await changes.ask(browse.events, sessions, job_id, after=after, limit=PAGE)
            except Unavailable:
                return  # the client comes back with Last-Event-ID and misses nothing
            for event in found:
                yield _frame(event)
                after = event.sequence
                if event.kind in JOB_TERMINAL:
                    return
            if len(found) < PAGE and not await _woken(woken):
                yield b": still here\n"  # no empty line: some readers take one for an event


async def _woken(woken: asyncio.Event) -> bool:
    """Wait for a change; False if none came in KEEP_ALIVE_SECONDS."""
    try:
        async with asyncio.timeout(KEEP_ALIVE_SECONDS):
            return await woken.wait()
    except TimeoutError:
        return False


def _frame(event: Event) -> bytes:
    return f"id: {event.sequence}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()
