"""Jobs over HTTP: submitted whole or not at all, listed in signed pages, cancelled and retried."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, text

from shared import lifecycle, workers
from shared.db import transaction
from shared.ledger import Reason
from shared.models import IdempotencyKey, Job, JobEvent, StageRun
from shared.workers import Registration
from tests.api.desk import CAPABILITIES, Desk, wait_until

# ---------------------------------------------------------------- submit


def test_a_submit_is_accepted_with_the_job_and_where_to_find_it(desk: Desk) -> None:
    answer = desk.client.post("/v1/jobs", json={**desk.order(), "tags": ["a", "b"], "priority": 5})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == job["url"] == f"{desk.url}/v1/jobs/{job['id']}"
    assert answer.headers["Retry-After"] == "2"
    assert (job["status"], job["attempt"], job["tags"], job["priority"]) == ("queued", 0, ["a", "b"], 5)
    assert [stage["kind"] for stage in job["stages"]] == ["export_onnx", "quantize", "build_engine"]
    assert desk.client.get(job["url"]).json() == job


def test_a_submit_asks_for_memory_by_the_size_of_its_model(desk: Desk) -> None:
    desk.submit()
    with transaction(desk.sessions) as session:
        assert session.scalars(select(Job.required_memory_bytes)).one() > 2**30


def test_a_submit_rings_its_queue(desk: Desk) -> None:
    import redis

    desk.submit({**desk.order(), "queue": "night"})
    with redis.Redis.from_url(desk.settings.broker_url) as broker:
        wait_until(lambda: broker.llen("night") == 1)


def test_the_same_key_and_body_give_the_same_job_however_often_at_once(desk: Desk) -> None:
    body = desk.order()
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda n: desk.submit(body, key=f"key-{n % 5}"), range(50)))
    assert len({job["id"] for job in jobs}) == 5
    assert _count(desk, Job) == 5
    assert _count(desk, IdempotencyKey) == 5
    assert _count(desk, JobEvent) == 5
    assert _count(desk, StageRun) == 15


def test_the_same_key_for_another_body_is_a_conflict(desk: Desk) -> None:
    body = desk.order()
    desk.submit(body, key="k")
    other = desk.client.post("/v1/jobs", json={**body, "name": "other"}, headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    assert _count(desk, Job) == 1


def test_keys_of_two_accounts_do_not_meet(desk: Desk) -> None:
    desk.submit(key="k")
    with desk.stranger() as stranger:
        theirs = Desk(**{**desk.__dict__, "client": stranger})
        theirs.submit(key="k")
    assert _count(desk, Job) == 2


# ---------------------------------------------------------------- validate


def test_validate_says_what_a_job_needs_and_writes_nothing(desk: Desk) -> None:
    found = desk.client.post("/v1/jobs/validate", json=desk.order()).json()
    assert found["valid"] is True
    assert "stage:quantize" in found["requires"]
    assert found["capable_workers"] == 0
    assert found["waiting_reason"]["code"] == "no_worker"
    assert _count(desk, Job) == 0


def test_validate_advises_on_what_would_surprise_later(desk: Desk) -> None:
    goals = [{"metric": "dice", "kind": "max_drop", "value": 0.5}]
    named = desk.client.post("/v1/jobs/validate", json=desk.order(goals=goals)).json()["notes"]
    assert [note["location"] for note in named] == ["recipe.data.artifact", "recipe.goals.0"]
    assumed = desk.client.post("/v1/jobs/validate", json=desk.order()).json()["notes"]
    assert assumed[0]["location"] == "recipe.goals"
    assert assumed[0]["message"].startswith("No goal is named, so this one is assumed: max_drop of dice")


def test_validate_counts_the_workers_that_can_do_it(desk: Desk) -> None:
    for name, capabilities in (("able", CAPABILITIES), ("poor", CAPABILITIES[:2])):
        workers.register(desk.sessions, Registration(name, "h", ["default"], capabilities, 2, 2**40, {}))
    found = desk.client.post("/v1/jobs/validate", json=desk.order()).json()
    assert (found["capable_workers"], found["waiting_reason"]) == (1, None)


def test_validate_refuses_what_a_submit_refuses_in_the_same_words(desk: Desk) -> None:
    body = desk.order(stages=[{"kind": "build_engine"}])
    validated, submitted = (desk.client.post(path, json=body) for path in ("/v1/jobs/validate", "/v1/jobs"))
    assert validated.status_code == submitted.status_code == 422
    assert validated.json()["detail"] == submitted.json()["detail"]


# ---------------------------------------------------------------- get


def test_a_known_state_is_answered_304(desk: Desk) -> None:
    job = desk.submit()
    first = desk.client.get(job["url"])
    assert first.headers["ETag"] == '"1"'
    for known in ('"1"', 'W/"1"', '"7", "1"', "*"):
        again = desk.client.get(job["url"], headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
    desk.claim()
    changed = desk.client.get(job["url"], headers={"If-None-Match": '"1"'})
    assert (changed.status_code, changed.json()["status"], changed.headers["ETag"]) == (200, "running", '"2"')


# ---------------------------------------------------------------- list


def test_pages_hold_every_job_once_newest_first(desk: Desk) -> None:
    body = desk.order()
    ids = [desk.submit(body)["id"] for _ in range(7)]
    pages = _pages(desk, {"limit": 3})
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [job["id"] for page in pages for job in page] == ids[::-1]


def test_a_new_job_does_not_move_the_pages_that_follow(desk: Desk) -> None:
    body = desk.order()
    ids = [desk.submit(body)["id"] for _ in range(4)]
    first = desk.client.get("/v1/jobs", params={"limit": 2}).json()
    desk.submit(body)
    second = desk.client.get("/v1/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in second["items"]] == ids[1::-1]


def test_filters_choose_by_status_and_by_all_tags(desk: Desk) -> None:
    body = desk.order()
    both = desk.submit({**body, "tags": ["a", "b"]})
    one = desk.submit({**body, "tags": ["a"]})
    desk.client.post(f"{one['url']}/cancel")
    for params, expected in (
        ({"tag": ["a"]}, [one, both]),
        ({"tag": ["a", "b"]}, [both]),
        ({"status": ["cancelled"]}, [one]),
        ({"status": ["cancelled", "queued"]}, [one, both]),
        ({"status": ["running"]}, []),
    ):
        found = desk.client.get("/v1/jobs", params=params).json()["items"]
        assert [job["id"] for job in found] == [job["id"] for job in expected], params


def test_a_cursor_that_was_changed_or_belongs_elsewhere_is_refused(desk: Desk) -> None:
    body = desk.order()
    for _ in range(3):
        desk.submit(body)
    cursor = desk.client.get("/v1/jobs", params={"limit": 1}).json()["next_cursor"]
    value, _, signature = cursor.partition(".")
    forged = f"{value}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"
    other_filters = {"limit": 1, "status": "queued", "cursor": cursor}
    with desk.stranger() as stranger:
        refusals = [
            desk.client.get("/v1/jobs", params={"cursor": forged}),
            desk.client.get("/v1/jobs", params={"cursor": value}),
            desk.client.get("/v1/jobs", params={"cursor": "é"}),
            desk.client.get("/v1/jobs", params=other_filters),
            stranger.get("/v1/jobs", params={"limit": 1, "cursor": cursor}),
        ]
    assert {(refusal.status_code, refusal.json()["code"]) for refusal in refusals} == {(422, "invalid_cursor")}


# ---------------------------------------------------------------- cancel and retry


def test_a_waiting_job_is_cancelled_at_once_and_again_is_no_error(desk: Desk) -> None:
    job = desk.submit()
    for _ in range(2):
        answer = desk.client.post(f"{job['url']}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert answer.json()["last_sequence"] == 2


def test_a_running_job_is_asked_to_stop(desk: Desk) -> None:
    job = desk.submit()
    claim = desk.claim()
    for _ in range(3):
        answer = desk.client.post(f"{job['url']}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (202, "running")
        assert answer.json()["cancel_requested_at"]
    assert lifecycle.heartbeat(desk.sessions, claim.lease, 60).cancel_requested


def test_an_ended_job_runs_again_as_a_new_one(desk: Desk) -> None:
    job = desk.submit()
    early = desk.client.post(f"{job['url']}/retry")
    assert (early.status_code, early.json()["code"]) == (409, "conflict")
    lifecycle.settle(desk.sessions, desk.claim().lease, "failed", Reason("bug", "It broke."))
    again = desk.client.post(f"{job['url']}/retry")
    assert again.status_code == 202
    assert again.headers["Location"] == again.json()["url"] != job["url"]
    assert (again.json()["retry_of"], again.json()["status"]) == (job["id"], "queued")
    assert again.json()["recipe"] == job["recipe"]


def test_a_job_in_another_versions_language_is_shown_and_its_retry_says_what_is_wrong(desk: Desk) -> None:
    job = desk.submit()
    lease = desk.claim().lease
    with transaction(desk.sessions) as session:
        session.execute(text("UPDATE jobs SET recipe = recipe || '{\"retired\": 1}'"))
    lifecycle.settle(desk.sessions, lease, "succeeded", None, {"verdict": "met", "retired": 1})
    assert desk.client.get(job["url"]).json()["recipe"]["retired"] == 1
    assert [listed["id"] for listed in desk.client.get("/v1/jobs").json()["items"]] == [job["id"]]
    refusals = {422: desk.client.post(f"{job['url']}/retry"), 409: desk.client.get(f"{job['url']}/report")}
    for code, refused in refusals.items():
        assert refused.status_code == code, refused.text
        assert "version" in refused.json()["detail"]


def test_a_retry_with_a_key_happens_once(desk: Desk) -> None:
    job = desk.submit()
    desk.client.post(f"{job['url']}/cancel")
    ids = {
        desk.client.post(f"{job['url']}/retry", headers={"Idempotency-Key": "again"}).json()["id"] for _ in range(3)
    }
    assert len(ids) == 1


@pytest.mark.parametrize("path", ["", "/events", "/logs", "/artifacts", "/artifacts/x", "/report"])
def test_a_job_that_does_not_exist_is_not_found(desk: Desk, path: str) -> None:
    missing = uuid4()
    answer = desk.client.get(f"/v1/jobs/{missing}{path}")
    assert (answer.status_code, answer.json()["detail"]) == (404, f"there is no job {missing}")


def _pages(desk: Desk, params: dict[str, Any]) -> list[list[dict[str, Any]]]:
    pages, cursor = [], None
    while True:
        page = desk.client.get("/v1/jobs", params={**params, **({"cursor": cursor} if cursor else {})}).json()
        pages.append(page["items"])
        cursor = page["next_cursor"]
        if cursor is None:
            return pages


def _count(desk: Desk, table: type[Any]) -> int:
    with transaction(desk.sessions) as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_ids_are_uuids_of_version_7(desk: Desk) -> None:
    assert UUID(desk.submit()["id"]).version == 7
