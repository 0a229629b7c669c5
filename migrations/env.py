"""How Alembic reaches the database: by the service's own settings, one migration at a time."""

from alembic import context
from sqlalchemy import create_engine, pool, text

from shared.models import Base
from shared.settings import get_settings

LOCK = 7_266_419_305  # any number that only these migrations use


def run() -> None:
    """Bring the schema to the asked revision; two that start at once run one after the other."""
    engine = create_engine(get_settings().database_url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        connection.commit()
        context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
    engine.dispose()


run()
