"""Indexes that stay cheap however many jobs there are, built beside the living service: nobody waits for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Columns = list[str | sa.TextClause]
QUEUED = sa.text("status = 'queued'")
TOLD_MD5 = sa.text("md5(COALESCE(state_reason ->> 'message', ''))")
PRIORITY = sa.text("priority DESC")

NEW: dict[str, tuple[str, Columns, dict[str, Any]]] = {
    "ix_jobs_next": ("jobs", ["queue", "requires", "account_id", PRIORITY, "id"], {"postgresql_where": QUEUED}),
    "ix_jobs_waiting": (
        *("jobs", ["queue", "requires", TOLD_MD5, "required_memory_bytes"]),
        {"postgresql_where": QUEUED},
    ),
    "ix_jobs_finished": ("jobs", ["finished_at"], {"postgresql_where": sa.text("finished_at IS NOT NULL")}),
    "ix_jobs_list_by_status": ("jobs", ["account_id", "status", "id"], {}),
    "ix_stage_runs_cache_key": ("stage_runs", ["cache_key"], {"postgresql_where": sa.text("cache_key IS NOT NULL")}),
    "ix_idempotency_keys_job_id": ("idempotency_keys", ["job_id"], {}),
    "uq_artifacts_timings": (
        *("artifacts", ["account_id", "name"]),
        {"unique": True, "postgresql_where": sa.text("role = 'timings' AND status = 'ready'")},
    ),
}
OLD: dict[str, tuple[str, Columns, dict[str, Any]]] = {
    "ix_jobs_claim": ("jobs", ["account_id", PRIORITY, "id"], {"postgresql_where": QUEUED}),
    "ix_jobs_queue": ("jobs", ["queue", "available_at"], {"postgresql_where": QUEUED}),
}


def upgrade() -> None:
    replace(OLD, NEW)


def downgrade() -> None:
    replace(NEW, OLD)


def replace(gone: Iterable[str], made: dict[str, tuple[str, Columns, dict[str, Any]]]) -> None:
    """Build what is made, then drop what is gone; whatever an interrupted run left half built is built anew."""
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # it waits for those who came before it, and nobody waits for it
        for name, (table, columns, options) in made.items():
            drop(name)
            op.create_index(name, table, columns, postgresql_concurrently=True, **options)
        for name in gone:
            drop(name)


def drop(name: str) -> None:
    op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
