"""How Alembic reaches the database: by the service's own settings, one migration at a time, beside a living service.

A migration waits for a table only shortly, because everyone else waits behind it; if it does not get it, it lets
everything go and begins again. So that none is killed as one half of a deadlock, that is sooner than the server looks
for those.
"""

import random
import threading
import time

from alembic import context
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.exc import OperationalError

from shared.models import Base
from shared.settings import get_settings

LOCK = 7_266_419_305  # any number that only these migrations use
LOCK_SECONDS = 0.5
PATIENCE_SECONDS = 300.0
TOO_LATE = ("55P03", "40P01")  # the lock was not to be had in time, or by nobody


def run() -> None:
    """Bring the schema to the asked revision; two that start at once run one after the other."""
    engine = create_engine(get_settings().database_url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        while not ours(connection):
            threading.Event().wait(random.uniform(0.1, LOCK_SECONDS))
        connection.execute(text(f"SET lock_timeout = {1000 * LOCK_SECONDS:.0f}"))
        connection.commit()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not migrated(connection, is_last=time.monotonic() > deadline):
            threading.Event().wait(random.uniform(0.1, LOCK_SECONDS))
    engine.dispose()


def ours(connection: Connection) -> bool:
    """Whether nobody else migrates. Asked again and again: who builds an index would wait for a query that waits."""
    is_ours = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": LOCK}))
    connection.commit()
    return is_ours


def migrated(connection: Connection, *, is_last: bool) -> bool:
    """Whether all of it is done; else nothing is. The last time, what stood in the way is raised."""
    context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
    try:
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
    except OperationalError as error:
        if is_last or getattr(error.orig, "sqlstate", None) not in TOO_LATE:
            raise
        connection.rollback()
        return False
    return True


run()
