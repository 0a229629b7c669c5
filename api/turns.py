"""A crowd takes turns: what many do at one moment is begun a few at a time, and the loop sees to the rest between.

Without it, a thousand requests that arrive together, or a thousand clients that wait for one event, are all begun
before anyone is answered, and /healthz with them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

AT_ONCE = 10  # in one turn of the loop; each costs it a millisecond or less
NEVER_WAITS = "/healthz"


class Turns:
    """First come, first served. Used from one event loop."""

    def __init__(self) -> None:
        self._deeds = deque[Callable[[], object]]()

    def call(self, deed: Callable[[], object]) -> None:
        """Do it when its turn has come."""
        self._deeds.append(deed)
        if len(self._deeds) == 1:
            asyncio.get_running_loop().call_soon(self._serve)

    async def take(self) -> None:
        """Wait for a turn."""
        turn = asyncio.Event()
        self.call(turn.set)
        await turn.wait()

    def _serve(self) -> None:
        for _ in range(min(AT_ONCE, len(self._deeds))):
            self._deeds.popleft()()
        if self._deeds:
            asyncio.get_running_loop().call_soon(self._serve)


class Turnstile:
    """Lets requests in by turns; whoever asks whether the process is alive never waits."""

    def __init__(self, app: ASGIApp, turns: Turns) -> None:
        self._app, self._turns = app, turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != NEVER_WAITS:
            await self._turns.take()
        await self._app(scope, receive, send)
