"""Kernel timings: one file a name and account, the newest wins, and what was replaced lapses after an hour."""

from __future__ import annotations

import threading
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, update

from shared import lifecycle, timings, uploads
from shared.accounts import ensure_account
from shared.db import Sessions, transaction
from shared.errors import LeaseLost, NotFound
from shared.ledger import Capacity, Claim, Lease, Order, Stored
from shared.models import Artifact
from shared.recipe import Recipe
from shared.storage import Storage
from tests.shared.ledger_desk import lost_answer

RECIPE = {
    "source": {"onnx": str(uuid4())},
    "task": {"kind": "classification", "classes": ["no", "yes"]},
    "data": {"artifact": str(uuid4())},
    "stages": [{"kind": "build_engine", "targets": ["tensorrt"]}],
}
H100, A10 = "timing-11.1.0-NVIDIA-H100-9.0", "timing-11.1.0-NVIDIA-A10-8.6"


def claimed(sessions: Sessions, account: str = "hospital") -> Claim:
    recipe = Recipe.model_validate(RECIPE)
    lifecycle.submit(sessions, Order(ensure_account(sessions, account), "job", recipe, timeout_seconds=60.0))
    found = lifecycle.claim(sessions, Capacity("worker", ["default"], recipe.requirements(), 2**40), 60.0)
    assert found is not None
    return found


@pytest.fixture
def claim(sessions: Sessions) -> Claim:
    return claimed(sessions)


def stored(name: str = H100) -> Stored:
    """A file as it would be stored; its bytes matter only to those who fetch them."""
    sha256 = uuid4().hex * 2
    return Stored(timings.ROLE, name, "timings", f"timings-test/{sha256}/{name}", sha256, 1)


def keys(sessions: Sessions, account_id: UUID) -> list[str]:
    return [found.key for found in timings.of_account(sessions, account_id)]


def lapse(sessions: Sessions) -> None:
    """Let the hour pass."""
    pending = [Artifact.role == timings.ROLE, Artifact.status == "pending"]
    with transaction(sessions) as session:
        assert session.scalar(select(func.min(Artifact.expires_at)).where(*pending)) is not None
        session.execute(update(Artifact).where(*pending).values(expires_at=func.now() - timings.GRACE))


def test_the_newest_of_a_name_is_found_and_the_one_before_stays_readable_for_an_hour(
    sessions: Sessions, storage: Storage, claim: Claim
) -> None:
    before, newest, another = stored(), stored(), stored(A10)
    for file in (before, newest, another):
        storage.put_bytes(b"timings", file.key)
        timings.keep(sessions, claim.lease, file)
    assert keys(sessions, claim.account_id) == [another.key, newest.key]
    assert timings.forget_lapsed(sessions, storage) == 0
    assert storage.stat(before.key).size_bytes == len(b"timings")
    lapse(sessions)
    assert timings.forget_lapsed(sessions, storage) == 1
    with pytest.raises(NotFound):
        storage.stat(before.key)
    assert keys(sessions, claim.account_id) == [another.key, newest.key]
    for file in (newest, another):
        storage.remove(file.key)


def test_they_outlive_their_job_and_are_found_by_their_own_account_alone(sessions: Sessions, claim: Claim) -> None:
    file = stored()
    timings.keep(sessions, claim.lease, file)
    lifecycle.settle(sessions, claim.lease, "succeeded", None, {"verdict": "met"})
    other = claimed(sessions, "another hospital")
    assert keys(sessions, claim.account_id) == [file.key]
    assert keys(sessions, other.account_id) == []
    timings.keep(sessions, other.lease, stored())
    assert keys(sessions, claim.account_id) == [file.key]


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "not committed"])
def test_those_whose_commit_is_not_answered_are_kept_once(sessions: Sessions, claim: Claim, committed: bool) -> None:
    before, newest = stored(), stored()
    timings.keep(sessions, claim.lease, before)
    with lost_answer(sessions, committed=committed):
        timings.keep(sessions, claim.lease, newest)
    timings.keep(sessions, claim.lease, newest)
    with transaction(sessions) as session:
        kept = session.execute(select(Artifact.key, Artifact.status).order_by(Artifact.id)).all()
    assert kept == [(before.key, "pending"), (newest.key, "ready")]


def test_what_was_replaced_meanwhile_is_not_the_newest_again(sessions: Sessions, claim: Claim) -> None:
    before, newest = stored(), stored()
    for file in (before, newest, before):
        timings.keep(sessions, claim.lease, file)
    assert keys(sessions, claim.account_id) == [newest.key]


def test_two_jobs_that_write_at_once_leave_one_winner(sessions: Sessions, claim: Claim) -> None:
    files = {claim.lease: [stored() for _ in range(8)], claimed(sessions).lease: [stored() for _ in range(8)]}

    def write(lease: Lease) -> None:
        for file in files[lease]:
            timings.keep(sessions, lease, file)

    threads = [threading.Thread(target=write, args=(lease,)) for lease in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    [winner] = keys(sessions, claim.account_id)
    assert winner in [written[-1].key for written in files.values()]


def test_an_account_keeps_its_newest_files_and_no_more(sessions: Sessions, claim: Claim) -> None:
    files = [stored(f"timing-{number:02}") for number in range(timings.MAX_FILES + 2)]
    for file in files:
        timings.keep(sessions, claim.lease, file)
    assert keys(sessions, claim.account_id) == [file.key for file in files[2:]]


def test_a_worker_that_lost_its_lease_keeps_nothing(sessions: Sessions, claim: Claim) -> None:
    with pytest.raises(LeaseLost):
        timings.keep(sessions, Lease(claim.lease.job_id, uuid4()), stored())
    assert keys(sessions, claim.account_id) == []


def test_they_are_no_upload_of_the_accounts(sessions: Sessions, claim: Claim) -> None:
    timings.keep(sessions, claim.lease, stored())
    [found] = timings.of_account(sessions, claim.account_id)
    with pytest.raises(NotFound):
        uploads.find(sessions, claim.account_id, found.id)
