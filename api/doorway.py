"""How uvicorn takes connections: a request has to arrive, whole and soon, and there are only so many at once.

Without it, whoever sends a byte now and then holds a connection for ever, until there is none left for anyone else.
Run it as `uvicorn --http api.doorway:Doorway`.
"""

from __future__ import annotations

import asyncio
import resource
from typing import ClassVar
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

ARRIVAL_SECONDS = 20.0  # from a request's first byte, or the connection's beginning, to the request's last byte
MAX_HEAD_BYTES = 2**16  # what comes after it is limits.py's
CONNECTIONS_RATIO = 0.75  # of the files that the process may have open


def make_room(places: int) -> int:
    """Have the process hold so many connections, if the system lets it; returns how many it may hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = int(places / CONNECTIONS_RATIO) + 1
    allowed = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    return max_connections()


def max_connections() -> int:
    """How many a process may hold at once."""
    return int(CONNECTIONS_RATIO * resource.getrlimit(resource.RLIMIT_NOFILE)[0])


class Doorway(HttpToolsProtocol):
    """One connection, with a clock that runs while a request arrives on it.

    Where there is no room for another, the one on which a request has been arriving for the longest is ended.
    """

    _arriving: ClassVar[WeakKeyDictionary[ServerState, dict[Doorway, asyncio.TimerHandle]]] = WeakKeyDictionary()
    _head_bytes: int | None = 0  # None once the request's head is complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()
        if len(self.connections) > max_connections():
            oldest = next(iter(self._others))
            oldest._stop_clock()  # so that the next one is not the same: it goes only once the loop comes round
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self not in self._others and (self.cycle is None or self.cycle.response_complete):
            self._start_clock()
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_clock()
        super().on_message_complete()

    def shutdown(self) -> None:
        super().shutdown()
        if self.cycle is not None:
            self.cycle.message_event.set()  # so that whoever waits for a change is answered before the server has gone

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    @property
    def _others(self) -> dict[Doorway, asyncio.TimerHandle]:
        """This server's connections on which a request arrives, the oldest first, with their clocks."""
        return self._arriving.setdefault(self.server_state, {})

    def _start_clock(self) -> None:
        self._head_bytes = 0
        self._others[self] = self.loop.call_later(ARRIVAL_SECONDS, self.transport.abort)

    def _stop_clock(self) -> None:
        clock = self._others.pop(self, None)
        if clock is not None:
            clock.cancel()
