"""Migrations: the tables that the models describe, there and back, by the command that production runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text

from shared.db import Sessions, transaction
from shared.models import Base
from shared.settings import Settings

ROOT = Path(__file__).parents[2]
Alembic = Callable[..., str]


@pytest.fixture
def alembic(settings: Settings) -> Alembic:
    environment = {**os.environ, "BURNISH_LOCAL": "1", "BURNISH_DATABASE_URL": settings.database_url}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "alembic", "-c", "migrations/alembic.ini", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def _schema(sessions: Sessions) -> list[str]:
    """Tables, columns, constraints, indexes, functions and triggers, as the server describes them."""
    with transaction(sessions) as session:
        rows = session.scalars(
            text("""
                SELECT format('%s.%s %s %s %s', table_name, column_name, data_type, is_nullable, column_default)
                FROM information_schema.columns WHERE table_schema = 'public'
                UNION ALL SELECT conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
                    WHERE connamespace = 'public'::regnamespace
                UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
                UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
                UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
            """)
        ).all()
    return sorted(rows)


def test_the_migrations_make_what_the_models_describe(alembic: Alembic) -> None:
    assert "No new upgrade operations detected" in alembic("check")


def test_down_and_up_again_gives_the_same_schema(sessions: Sessions, alembic: Alembic) -> None:
    before = _schema(sessions)
    alembic("downgrade", "base")
    with transaction(sessions) as session:
        assert inspect(session.connection()).get_table_names() == ["alembic_version"]
        assert session.scalar(text("SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace")) == 0
    alembic("upgrade", "head")
    assert _schema(sessions) == before


def test_two_that_migrate_at_once_run_one_after_the_other(
    settings: Settings, sessions: Sessions, alembic: Alembic
) -> None:
    alembic("downgrade", "base")
    environment = {**os.environ, "BURNISH_LOCAL": "1", "BURNISH_DATABASE_URL": settings.database_url}
    command = [sys.executable, "-m", "alembic", "-c", "migrations/alembic.ini", "upgrade", "head"]
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=60)[1] is not None and process.returncode for process in both] == [0, 0]
    with transaction(sessions) as session:
        assert set(inspect(session.connection()).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_migrations_are_one_line_of_history_with_dated_names() -> None:
    scripts = ScriptDirectory.from_config(Config(str(ROOT / "migrations/alembic.ini")))
    assert len(scripts.get_heads()) == 1
    for revision in scripts.walk_revisions():
        name = Path(revision.path).name
        assert name[:15].replace("_", "").isdigit(), name
        assert f"_{revision.revision}_" in name
        assert revision.doc.endswith(".")


def test_every_constraint_has_a_name_of_the_convention() -> None:
    for table in Base.metadata.tables.values():
        for constraint in table.constraints:
            assert str(constraint.name)[:3] in ("pk_", "fk_", "uq_", "ck_"), (table.name, constraint)
