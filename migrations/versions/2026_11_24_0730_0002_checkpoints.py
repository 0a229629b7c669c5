"""Indexes of the checkpoints, which the sweeper looks for among all artifacts, and of an account's kernel timings."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_artifacts_checkpoints", "artifacts", ["job_id"], postgresql_where=sa.text("role = 'checkpoint'")
    )
    op.create_index(
        "uq_artifacts_timings",
        "artifacts",
        ["account_id", "name"],
        unique=True,
        postgresql_where=sa.text("role = 'timings' AND status = 'ready'"),
    )


def downgrade() -> None:
    op.drop_index("uq_artifacts_timings", table_name="artifacts")
    op.drop_index("ix_artifacts_checkpoints", table_name="artifacts")
