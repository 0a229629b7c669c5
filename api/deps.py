"""What routes may ask for: the only file that says Depends()."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Header, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from api.changes import Changes
from shared import accounts, browse
from shared.db import Sessions
from shared.doorbell import Doorbell
from shared.errors import Unauthorized
from shared.settings import Settings
from shared.storage import Storage

KEY_SECONDS = 5.0
MAX_KEYS = 10_000
MAX_WAIT_SECONDS = 60.0

bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="An API key: `Authorization: Bearer brn_…`")


class KnownKeys:
    """Accounts by API key, remembered for KEY_SECONDS so that a request does not pay a query for its key.

    A revoked key therefore works for that long. Wrong keys are never remembered; at most MAX_KEYS are, by digest.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[UUID, float]] = OrderedDict()

    def find(self, key: str) -> UUID | None:
        """The key's account, if it was seen a moment ago."""
        account_id, until = self._known.get(_digest(key), (None, 0.0))
        return account_id if time.monotonic() < until else None

    def remember(self, key: str, account_id: UUID) -> None:
        digest = _digest(key)
        self._known[digest] = (account_id, time.monotonic() + KEY_SECONDS)
        self._known.move_to_end(digest)
        if len(self._known) > MAX_KEYS:
            self._known.popitem(last=False)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True)
class Service:
    """What the process holds for as long as it lives."""

    settings: Settings
    sessions: Sessions
    storage: Storage
    doorbell: Doorbell
    changes: Changes
    keys: KnownKeys = field(default_factory=KnownKeys)


# Dependencies are coroutines although they wait for nothing: a plain function would cost a change of thread each.


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]


async def _account(
    service: ServiceDep, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> UUID:
    if credentials is None:
        raise Unauthorized
    key = credentials.credentials
    account_id = service.keys.find(key)
    if account_id is None:
        account_id = await run_in_threadpool(accounts.authenticate, service.sessions, key)
        service.keys.remember(key, account_id)
    return account_id


AccountDep = Annotated[UUID, Depends(_account)]


async def _settings(service: ServiceDep) -> Settings:
    return service.settings


async def _sessions(service: ServiceDep) -> Sessions:
    return service.sessions


async def _storage(service: ServiceDep) -> Storage:
    return service.storage


async def _doorbell(service: ServiceDep) -> Doorbell:
    return service.doorbell


async def _changes(service: ServiceDep) -> Changes:
    return service.changes


SettingsDep = Annotated[Settings, Depends(_settings)]
SessionsDep = Annotated[Sessions, Depends(_sessions)]
StorageDep = Annotated[Storage, Depends(_storage)]
DoorbellDep = Annotated[Doorbell, Depends(_doorbell)]
ChangesDep = Annotated[Changes, Depends(_changes)]

JobId = Annotated[UUID, Path(description="The job's id.")]


async def _job_moved(
    request: Request,
    service: ServiceDep,
    account_id: AccountDep,
    job_id: JobId,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_SECONDS, description="Seconds to wait for a change before answering.")
    ] = 0,
    if_none_match: Annotated[str | None, Header(description="The ETag of the state that you know.")] = None,
) -> None:
    """Wait until the job is no longer as the client knows it, has ended, or `wait` seconds have gone by.

    A client that sends no ETag waits for the first change after its request.
    """
    if wait == 0:
        return
    deadline = asyncio.get_running_loop().time() + wait
    known = if_none_match
    service.changes.demand_room()
    leaving = asyncio.ensure_future(_departure(request))
    try:
        with service.changes.watch(job_id) as woken:
            leaving.add_done_callback(lambda _: woken.set())
            while not leaving.done():
                woken.clear()
                standing = await service.changes.ask(browse.standing, service.sessions, account_id, job_id)
                known = known or etag(standing.last_sequence)
                if standing.ended or not matches(known, etag(standing.last_sequence)):
                    return
                async with asyncio.timeout_at(deadline):
                    await woken.wait()
    except TimeoutError:
        return
    finally:
        leaving.cancel()


async def _departure(request: Request) -> None:
    """Wait until the client has gone, or the server is about to."""
    while (await request.receive()).get("more_body"):
        pass  # the request's own body
    await request.receive()


JobMoved = Depends(_job_moved)


def etag(last_sequence: int) -> str:
    """A job's ETag: every change of a job raises its last sequence number."""
    return f'"{last_sequence}"'


def matches(if_none_match: str | None, current: str) -> bool:
    """Whether one of the ETags that a client knows is the current one (RFC 9110, weak comparison)."""
    known = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return current in known or known == ["*"]
