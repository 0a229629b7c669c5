"""A TCP proxy between the service and one of its servers, which can be told to be a bad network."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CHUNK_BYTES = 2**16
LOOK_SECONDS = 0.005


def through(proxy: Proxy, url: str) -> str:
    """The same URL by way of the proxy."""
    found = urlsplit(url)
    return found._replace(netloc=f"{found.netloc.rpartition(':')[0]}:{proxy.port}").geturl()


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None, url
    return port


class Proxy:
    """Passes bytes on from 127.0.0.1:`port` to a server's port there, in a thread of its own.

    Every method may be called at any time and from any thread. What it says holds for bytes to come, on connections
    old and new, until `heal`.
    """

    def __init__(self, upstream_port: int) -> None:
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._door: socket.socket | None = None
        self.port = 0
        self.num_connections = 0  # so far
        self.num_answers_lost = 0  # so far
        self.heal()

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._refuse())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ------------------------------------------------------------ what the network does

    def heal(self) -> None:
        """Pass everything on at once, also what a blackhole has kept."""
        self.delay_seconds = 0.0
        self.bytes_per_second: float | None = None
        self.bytes_left: int | None = None
        self.is_blackhole = False
        self._unanswered: tuple[bytes, int | None, int] | None = None
        self._num_requests = 0

    def delay(self, seconds: float) -> None:
        """Hold every chunk back for so long, both ways."""
        self.delay_seconds = seconds

    def throttle(self, bytes_per_second: float) -> None:
        """Pass on so much, each way of each connection."""
        self.bytes_per_second = bytes_per_second

    def cut_after(self, num_bytes: int) -> None:
        """Break the connection on which so many more bytes, both ways and of all connections, have passed; once."""
        self.bytes_left = num_bytes

    def blackhole(self) -> None:
        """Pass nothing on and close nothing: each side looks to the other as if it thought for ever."""
        self.is_blackhole = True

    def lose_answer(self, request: bytes, times: int | None = 1, every: int = 1) -> None:
        """Pass on what holds `request`, wait for the server's answer, and break the connection instead of giving it.

        So many `times`, or always if that is None; with `every` 2, for each second such request.
        """
        self._unanswered, self._num_requests = (request, times, every), 0

    def cut(self) -> None:
        """Break every connection that there is."""
        self._call(self._cut())

    def refuse(self) -> None:
        """Break every connection and take no new ones: the server is down."""
        self._call(self._refuse())

    def accept(self) -> None:
        """Take connections again: the server is up."""
        self._call(self._listen())

    # ------------------------------------------------------------ within the loop

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _listen(self) -> None:
        if self._door is None:
            door = socket.create_server(("127.0.0.1", self.port))
            door.setblocking(False)
            self.port = door.getsockname()[1]
            self._door = door
            self._loop.add_reader(door, self._take, door)

    def _take(self, door: socket.socket) -> None:
        """Accept a connection. No task does it: one that is cancelled as a client comes loses the client's socket."""
        try:
            taken, _ = door.accept()
        except OSError:  # the client has left again
            return
        taken.setblocking(False)
        self.num_connections += 1
        connection = _Connection(self, taken)
        task = self._loop.create_task(connection.run(self._upstream_port))
        self._connections[task] = connection
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).taken.close()  # it may have been cut before it began

    async def _refuse(self) -> None:
        if self._door is not None:
            self._loop.remove_reader(self._door)
            self._door.close()
            self._door = None
        await self._cut()

    async def _cut(self) -> None:
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(list(self._connections))

    def loses_answer(self, sent: bytes) -> bool:
        """Whether what was sent is a request whose answer is to be lost."""
        if self._unanswered is None or self._unanswered[0] not in sent:
            return False
        request, times, every = self._unanswered
        self._num_requests += 1
        if self._num_requests % every:
            return False
        if times is not None:
            self._unanswered = (request, times - 1, every) if times > 1 else None
        return True

    def overlap_bytes(self) -> int:
        """How much of such a request may be in one chunk without being the whole of it."""
        return 0 if self._unanswered is None else len(self._unanswered[0]) - 1

    def chunk_bytes(self) -> int:
        """How much passes at once: where it is slow, what passes in a twentieth of a second."""
        return CHUNK_BYTES if self.bytes_per_second is None else max(10, int(self.bytes_per_second / 20))

    def takes(self, num_bytes: int) -> bool:
        """Whether so many bytes may still pass before the cut."""
        if self.bytes_left is None:
            return True
        self.bytes_left -= num_bytes
        if self.bytes_left >= 0:
            return True
        self.bytes_left = None
        return False


class _Connection:
    """One connection: two streams, each pumped by a task of its own."""

    def __init__(self, proxy: Proxy, taken: socket.socket) -> None:
        self._proxy, self.taken = proxy, taken
        self._is_unanswered = False

    async def run(self, upstream_port: int) -> None:
        writers: list[asyncio.StreamWriter] = []
        with suppress(OSError, asyncio.CancelledError):
            try:
                reader, writer = await asyncio.open_connection(sock=self.taken)
                writers.append(writer)
                await self._passable()
                server_reader, server_writer = await asyncio.open_connection("127.0.0.1", upstream_port)
                writers.append(server_writer)
                await self._pump_both((reader, writer), (server_reader, server_writer))
            finally:
                for opened in writers:
                    opened.transport.abort()

    async def _pump_both(self, client: Streams, server: Streams) -> None:
        pumps = [
            asyncio.ensure_future(self._pump(client[0], server[1], is_request=True)),
            asyncio.ensure_future(self._pump(server[0], client[1], is_request=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_request: bool) -> None:
        proxy, before = self._proxy, b""
        while chunk := await reader.read(proxy.chunk_bytes()):
            await self._passable()
            if proxy.delay_seconds:
                await asyncio.sleep(proxy.delay_seconds)
            if proxy.bytes_per_second is not None:
                await asyncio.sleep(len(chunk) / proxy.bytes_per_second)
            if is_request:
                sent = before + chunk
                self._is_unanswered |= proxy.loses_answer(sent)
                before = sent[len(sent) - proxy.overlap_bytes() :]
            elif self._is_unanswered:
                proxy.num_answers_lost += 1
                return
            if not proxy.takes(len(chunk)):
                return
            writer.write(chunk)
            await writer.drain()

    async def _passable(self) -> None:
        while self._proxy.is_blackhole:
            await asyncio.sleep(LOOK_SECONDS)
