"""Accounts and their API keys. A key is shown once; what is kept is its SHA-256."""

import hashlib
import secrets
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from shared.db import Sessions, transaction
from shared.errors import Unauthorized
from shared.models import Account, ApiKey

KEY_PREFIX = "brn_"


def ensure_account(sessions: Sessions, name: str) -> UUID:
    """The account of that name, made if it is not there."""
    with transaction(sessions) as session:
        session.execute(insert(Account).values(name=name).on_conflict_do_nothing(index_elements=["name"]))
        return session.scalars(select(Account.id).where(Account.name == name)).one()


def create_key(sessions: Sessions, account_id: UUID, name: str) -> str:
    """A new API key of the account; returned here and never again."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    with transaction(sessions) as session:
        session.add(ApiKey(account_id=account_id, name=name, key_sha256=_digest(key)))
    return key


def authenticate(sessions: Sessions, key: str) -> UUID:
    """The account that a key belongs to; raises Unauthorized for a wrong or revoked one."""
    with transaction(sessions) as session:
        account_id = session.scalar(
            select(ApiKey.account_id).where(ApiKey.key_sha256 == _digest(key), ApiKey.revoked_at.is_(None))
        )
    if account_id is None:
        raise Unauthorized
    return account_id


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
