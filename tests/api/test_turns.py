"""A crowd is begun a few at a time, and the loop looks around between."""

from __future__ import annotations

import asyncio
import itertools

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from api.turns import AT_ONCE, NEVER_WAITS, Turns, Turnstile


def test_a_crowd_is_served_in_order_and_only_so_many_between_two_looks() -> None:
    async def crowd() -> None:
        turns, served, seen = Turns(), list[int](), [0]
        for number in range(10 * AT_ONCE):
            turns.call(lambda number=number: served.append(number))
        while len(served) < 10 * AT_ONCE:
            await asyncio.sleep(0)  # what else the loop has to do
            seen.append(len(served))
        assert served == sorted(served)
        assert max(after - before for before, after in itertools.pairwise(seen)) == AT_ONCE
        await asyncio.wait_for(turns.take(), 1)  # and the next crowd is served too

    asyncio.run(crowd())


def test_who_leaves_the_line_holds_up_nobody() -> None:
    async def line() -> None:
        turns = Turns()
        leaving, staying = asyncio.ensure_future(turns.take()), asyncio.ensure_future(turns.take())
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait_for(staying, 1)

    asyncio.run(line())


@pytest.mark.parametrize(("path", "waits"), [(NEVER_WAITS, False), ("/v1/jobs", True)])
def test_whoever_asks_whether_the_process_is_alive_never_waits(path: str, waits: bool) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def ask() -> None:
        turns, before = Turns(), list[int]()
        for number in range(5 * AT_ONCE):
            turns.call(lambda number=number: before.append(number))
        transport = httpx.ASGITransport(Turnstile(answer, turns))
        async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
            assert (await client.get(path)).status_code == 204
        assert (len(before) == 5 * AT_ONCE) == waits

    asyncio.run(ask())
