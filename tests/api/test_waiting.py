"""Waiting for a job: long polls that wake, streams that lose and double nothing, and a thousand of them at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import httpx
import psycopg
from httpx_sse import ServerSentEvent, connect_sse

from api import events as stream
from shared import browse, lifecycle
from shared.ledger import Claim, Progress, Reason
from tests.api.desk import Desk, wait_until

# ---------------------------------------------------------------- long polls


def test_a_long_poll_answers_as_soon_as_the_job_changes(desk: Desk) -> None:
    job = desk.submit()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(desk.client.get, job["url"], params={"wait": 30}, headers={"If-None-Match": '"1"'})
        _until_watched(desk)
        assert not waiting.done()
        began = time.monotonic()
        desk.claim()
        answer = waiting.result(timeout=10)
    assert (answer.status_code, answer.json()["status"]) == (200, "running")
    assert time.monotonic() - began < 1
    assert desk.app.state.service.changes.num_watched == 0


def test_a_long_poll_without_a_known_state_waits_for_the_next_change(desk: Desk) -> None:
    job = desk.submit()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(desk.client.get, job["url"], params={"wait": 30})
        _until_watched(desk)
        desk.claim()
        assert waiting.result(timeout=10).json()["last_sequence"] == 2


def test_a_long_poll_behind_the_state_answers_at_once(desk: Desk) -> None:
    job = desk.submit()
    desk.claim()
    answer = desk.client.get(job["url"], params={"wait": 30}, headers={"If-None-Match": '"1"'}, timeout=5)
    assert answer.json()["last_sequence"] == 2


def test_a_long_poll_of_an_ended_job_answers_at_once(desk: Desk) -> None:
    job = desk.submit()
    desk.client.post(f"{job['url']}/cancel")
    assert desk.client.get(job["url"], params={"wait": 30}, timeout=5).json()["status"] == "cancelled"
    known = desk.client.get(job["url"], params={"wait": 30}, headers={"If-None-Match": '"2"'}, timeout=5)
    assert known.status_code == 304


def test_a_long_poll_whose_time_is_up_says_that_nothing_changed(desk: Desk) -> None:
    job = desk.submit()
    answer = desk.client.get(job["url"], params={"wait": 0.1}, headers={"If-None-Match": '"1"'})
    assert answer.status_code == 304
    assert desk.client.get(job["url"], params={"wait": 0.1}).status_code == 200


def test_another_jobs_change_wakes_nobody(desk: Desk) -> None:
    first, second = desk.submit(), desk.submit()
    headers = {"If-None-Match": '"1"'}
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(desk.client.get, first["url"], params={"wait": 1}, headers=headers)
        _until_watched(desk)
        desk.client.post(f"{second['url']}/cancel")
        assert waiting.result(timeout=10).status_code == 304


def test_waiting_goes_on_when_the_listener_is_cut_off(desk: Desk) -> None:
    job = desk.submit()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(desk.client.get, job["url"], params={"wait": 30}, headers={"If-None-Match": '"1"'})
        _until_watched(desk)
        with psycopg.connect(desk.settings.database_url.replace("+psycopg", ""), autocommit=True) as administration:
            cut = administration.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND query LIKE 'LISTEN%'"
            ).fetchall()
        assert cut == [(True,)]
        desk.claim()
        assert waiting.result(timeout=10).json()["status"] == "running"


# ---------------------------------------------------------------- events


def test_events_are_listed_from_where_the_reader_stands(desk: Desk) -> None:
    job = _ended_job(desk)
    events = desk.client.get(f"{job['url']}/events").json()["items"]
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert [event["kind"] for event in events] == ["submitted", "claimed", *["progress"] * 5, "failed"]
    later = desk.client.get(f"{job['url']}/events", params={"after": 2, "limit": 3}).json()["items"]
    assert later == events[2:5]


def test_a_stream_tells_everything_and_ends_with_the_job(desk: Desk) -> None:
    job = desk.submit()
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(lambda: list(_stream(desk.client, job)))
        _until_watched(desk)
        _run(desk, desk.claim())
        told = reading.result(timeout=15)
    assert [int(event.id) for event in told] == list(range(1, 9))
    assert told[0].event == "submitted"
    assert told[-1].event == "failed"
    assert told[-1].json()["data"]["message"] == "It broke."


def test_a_stream_goes_on_after_the_last_event_that_was_seen(desk: Desk) -> None:
    job = desk.submit()
    claim = desk.claim()
    seen: list[str] = []
    for number in range(4):  # each time the reader is cut off after what is new
        lifecycle.heartbeat(desk.sessions, claim.lease, 60, Progress(0, number / 4, "training"))
        for event in _stream(desk.client, job, seen[-1] if seen else None):
            seen.append(event.id)
            if event.event == "progress":
                break
    lifecycle.settle(desk.sessions, claim.lease, "failed", Reason("bug", "It broke."))
    seen += [event.id for event in _stream(desk.client, job, seen[-1])]
    assert seen == [str(number) for number in range(1, 8)]


def test_a_stream_with_nothing_more_to_tell_says_so(desk: Desk) -> None:
    job = _ended_job(desk)
    headers = {"Accept": "text/event-stream", "Last-Event-ID": "8"}
    assert desk.client.get(f"{job['url']}/events", headers=headers).status_code == 204


def test_a_stream_that_waits_says_that_it_is_still_there(desk: Desk, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "KEEP_ALIVE_SECONDS", 0.05)
    job = desk.submit()
    with desk.client.stream("GET", f"{job['url']}/events", headers={"Accept": "text/event-stream"}) as answer:
        lines = answer.iter_lines()
        assert any(line == ": still here" for line in lines)


def test_a_stream_longer_than_a_page_is_told_whole(desk: Desk, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "PAGE", 3)
    job = _ended_job(desk)
    assert [int(event.id) for event in _stream(desk.client, job)] == list(range(1, 9))


def test_a_stream_of_a_foreign_job_is_not_found(desk: Desk) -> None:
    job = desk.submit()
    with desk.stranger() as stranger:
        answer = stranger.get(f"{job['url']}/events", headers={"Accept": "text/event-stream"})
    assert answer.status_code == 404


def test_a_reader_that_goes_away_is_forgotten(desk: Desk) -> None:
    job = desk.submit()
    for _ in _stream(desk.client, job):
        break
    changes = desk.app.state.service.changes
    lifecycle.cancel(desk.sessions, desk.account_id, UUID(job["id"]))
    wait_until(lambda: changes.num_watched == 0)


def test_hundreds_wait_at_once_in_a_handful_of_threads_and_all_wake(desk: Desk) -> None:
    job = desk.submit()
    num_readers = 300

    async def read_all() -> list[str]:
        limits = httpx.Limits(max_connections=num_readers + 1)
        headers = {"Authorization": f"Bearer {desk.key}"}
        async with httpx.AsyncClient(limits=limits, timeout=60, trust_env=False, headers=headers) as client:
            polls = [
                client.get(job["url"], params={"wait": 60}, headers={"If-None-Match": '"1"'})
                for _ in range(num_readers)
            ]
            waiting = asyncio.gather(*polls)
            await asyncio.to_thread(wait_until, lambda: _num_watchers(desk, job) == num_readers, 30)
            assert threading.active_count() < 80
            health = await client.get(f"{desk.url}/healthz", timeout=1)
            assert health.status_code == 200
            await asyncio.to_thread(desk.claim)
            return [answer.json()["status"] for answer in await waiting]

    assert asyncio.run(read_all()) == ["running"] * num_readers


def _until_watched(desk: Desk) -> None:
    """Until somebody waits, and the listener that will wake them listens."""
    wait_until(lambda: desk.app.state.service.changes.num_watched == 1)
    with psycopg.connect(desk.settings.database_url.replace("+psycopg", ""), autocommit=True) as link:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%%'"
        wait_until(lambda: link.execute(query).fetchone() == (1,))


def _num_watchers(desk: Desk, job: dict[str, Any]) -> int:
    watchers: dict[UUID, set[asyncio.Event]] = desk.app.state.service.changes._watchers
    return len(watchers.get(UUID(job["id"]), ()))


def _stream(client: httpx.Client, job: dict[str, Any], last_event_id: str | None = None) -> Iterator[ServerSentEvent]:
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    with connect_sse(client, "GET", f"{job['url']}/events", headers=headers) as source:
        yield from source.iter_sse()


def _ended_job(desk: Desk) -> dict[str, Any]:
    job = desk.submit()
    _run(desk, desk.claim())
    assert browse.standing(desk.sessions, desk.account_id, UUID(job["id"])).ended
    return job


def _run(desk: Desk, claim: Claim) -> None:
    """Five signs of progress, and a sad end."""
    for number in range(5):
        lifecycle.heartbeat(desk.sessions, claim.lease, 60, Progress(None, number / 5, "measuring"))
    lifecycle.settle(desk.sessions, claim.lease, "failed", Reason("bug", "It broke."))
