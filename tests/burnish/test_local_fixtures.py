"""The tests' own fixtures: each test alone on real servers."""

import pytest
import redis
from sqlalchemy import text

from shared.db import Sessions, transaction
from shared.settings import Settings
from shared.storage import Storage


@pytest.mark.parametrize("attempt", range(4))
def test_every_test_finds_an_empty_migrated_database_bucket_and_broker(
    attempt: int, sessions: Sessions, storage: Storage, settings: Settings
) -> None:
    with transaction(sessions) as session:
        assert session.scalar(text("SELECT count(*) FROM accounts")) == 0
        session.execute(text("INSERT INTO accounts (id, name) VALUES (gen_random_uuid(), 'only here')"))
    assert list(storage.list_keys()) == []
    storage.put_bytes(b"only here", "key")
    with redis.Redis.from_url(settings.broker_url) as broker:
        assert broker.dbsize() == 0
        broker.set("only", "here")
