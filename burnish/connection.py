"""The way to a service: where it is, with which key, and requests that are repeated while it is away."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from burnish.errors import NoService, ServiceSaidNo, Unreachable
from burnish.local import find_local
from shared.schemas import Problem

T = TypeVar("T")
TRIES = 5
AWAY = frozenset({429, 502, 503, 504})
PROBLEM = "application/problem+json"
MAX_DELAY_SECONDS = 10.0
NO_PROXY: Mapping[str, None] = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}


def find_service(url: str | None = None, api_key: str | None = None) -> tuple[str, str]:
    """URL and API key: as given, else from BURNISH_URL and BURNISH_API_KEY, else of the local mode that runs here.

    Local mode's key is never sent anywhere but to local mode. Raises NoService.
    """
    url = url or os.environ.get("BURNISH_URL") or None
    api_key = api_key or os.environ.get("BURNISH_API_KEY") or None
    if url and not url.startswith(("http://", "https://")):
        raise NoService(f"{url!r} is not a URL; it begins with http:// or https://.")
    if url and api_key:
        return url.rstrip("/"), api_key
    local_url, local_key = find_local() or (None, None)
    if local_url and local_key and (url is None or url.rstrip("/") == local_url.rstrip("/")):
        return local_url.rstrip("/"), api_key or local_key
    if url:
        raise NoService(f"There is no API key for {url}.", hint="Set BURNISH_API_KEY, or give --api-key.")
    raise NoService(hint="Start one with 'burnish local up', or set BURNISH_URL and BURNISH_API_KEY.")


class Connection:
    """One service with one key.

    Every request of the API may be sent twice, so each is repeated while the service is away. `send` raises
    ServiceSaidNo for an error that the service told, Unreachable where nothing told anything.
    """

    def __init__(self, url: str, api_key: str, *, timeout_seconds: float = 60.0) -> None:
        self.url = url
        timeout = httpx.Timeout(timeout_seconds, connect=5.0)
        headers, tls = {"Authorization": f"Bearer {api_key}"}, httpx.create_ssl_context()
        self.api = httpx.Client(base_url=url, timeout=timeout, headers=headers, verify=tls, mounts=NO_PROXY)
        self.storage = httpx.Client(timeout=timeout, verify=tls, mounts=NO_PROXY)  # presigned URLs, which take no key

    def close(self) -> None:
        self.api.close()
        self.storage.close()

    def ask(self, kind: type[T], method: str, path: str, **request: Any) -> T:
        """One request of the API, answered with a `kind`."""
        response = self.send(method, path, **request)
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError:
            raise _strange(response) from None

    def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        """One request of the API, answered with a success or a redirect."""
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                response = self.api.request(method, path, **request)
            except httpx.TransportError as error:
                if last:
                    raise Unreachable(f"{self.url} cannot be reached: {describe(error)}.") from error
                pause(attempt)
                continue
            if last or not is_away(response):
                return checked(response)
            pause(attempt, response)
        raise AssertionError("the last try returns or raises")


def is_away(response: httpx.Response) -> bool:
    """Whether the same may soon go better by itself. A quota that the service says is reached needs somebody."""
    is_quota = response.status_code == 429 and response.headers.get("content-type") == PROBLEM
    return response.status_code in AWAY and not is_quota


def checked(response: httpx.Response) -> httpx.Response:
    """The response, if it is no error; its body must have been read."""
    if response.status_code < 400:
        return response
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        raise _strange(response) from None
    raise ServiceSaidNo(problem)


def _strange(response: httpx.Response) -> Unreachable:
    moved = response.headers.get("location")
    return Unreachable(
        f"{response.request.url.copy_with(query=None)} answered {response.status_code} {response.reason_phrase}, "
        "and not as a Burnish service of this version does.",
        hint=f"It points to {moved}." if moved else "Check the URL, or install the service's version of burnish.",
    )


def pause(attempt: int, response: httpx.Response | None = None) -> None:
    """Wait before the next try: as long as the service asked, else a jittered, doubling while."""
    asked = response.headers.get("retry-after", "") if response is not None else ""
    delay = float(asked) if asked.isdecimal() else 0.25 * 2**attempt * (0.5 + random.random())
    time.sleep(min(delay, MAX_DELAY_SECONDS))


def describe(error: httpx.TransportError) -> str:
    """Why a request got no answer."""
    return "no answer in time" if isinstance(error, httpx.TimeoutException) else str(error) or type(error).__name__
