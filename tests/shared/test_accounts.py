"""Accounts and their keys: shown once, kept as a digest, dead once revoked."""

from __future__ import annotations

import hashlib

import pytest
from sqlalchemy import select

from shared import accounts
from shared.db import Sessions, transaction
from shared.errors import Unauthorized
from shared.models import Account, ApiKey
from tests.shared.ledger_desk import at_once, execute


def test_an_account_is_made_once_by_its_name(sessions: Sessions) -> None:
    first = accounts.ensure_account(sessions, "clinic")
    assert accounts.ensure_account(sessions, "clinic") == first
    assert accounts.ensure_account(sessions, "another") != first


def test_ten_that_make_the_same_account_at_once_get_the_same(sessions: Sessions) -> None:
    made = at_once(*[lambda: accounts.ensure_account(sessions, "clinic")] * 10)
    assert len(set(made)) == 1
    with transaction(sessions) as session:
        assert session.scalars(select(Account.id)).all() == made[:1]


def test_a_key_opens_its_own_account(sessions: Sessions) -> None:
    mine, theirs = (accounts.ensure_account(sessions, name) for name in ("mine", "theirs"))
    first, second = (accounts.create_key(sessions, mine, name) for name in ("laptop", "server"))
    other = accounts.create_key(sessions, theirs, "laptop")
    assert [accounts.authenticate(sessions, key) for key in (first, second, other)] == [mine, mine, theirs]
    assert len({first, second, other}) == 3


def test_a_key_is_kept_as_its_digest_alone(sessions: Sessions) -> None:
    key = accounts.create_key(sessions, accounts.ensure_account(sessions, "clinic"), "laptop")
    assert key.startswith(accounts.KEY_PREFIX)
    assert len(key) >= len(accounts.KEY_PREFIX) + 43
    with transaction(sessions) as session:
        row = session.scalars(select(ApiKey)).one()
        kept = [str(value) for value in row.__dict__.values()]
    assert row.key_sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert not any(key in value for value in kept)


@pytest.mark.parametrize("wrong", ["", "brn_", "brn_" + "A" * 43, "é", "\x00", "x" * 10_000])
def test_a_wrong_key_opens_nothing(sessions: Sessions, wrong: str) -> None:
    accounts.create_key(sessions, accounts.ensure_account(sessions, "clinic"), "laptop")
    with pytest.raises(Unauthorized):
        accounts.authenticate(sessions, wrong)


def test_a_key_with_one_letter_changed_opens_nothing(sessions: Sessions) -> None:
    key = accounts.create_key(sessions, accounts.ensure_account(sessions, "clinic"), "laptop")
    for changed in (key[:-1], key + "A", key.swapcase(), " " + key):
        with pytest.raises(Unauthorized):
            accounts.authenticate(sessions, changed)


def test_a_revoked_key_opens_nothing_and_the_others_still_do(sessions: Sessions) -> None:
    owner = accounts.ensure_account(sessions, "clinic")
    revoked, kept = (accounts.create_key(sessions, owner, name) for name in ("lost", "kept"))
    execute(sessions, "UPDATE api_keys SET revoked_at = now() WHERE name = 'lost'")
    with pytest.raises(Unauthorized):
        accounts.authenticate(sessions, revoked)
    assert accounts.authenticate(sessions, kept) == owner
