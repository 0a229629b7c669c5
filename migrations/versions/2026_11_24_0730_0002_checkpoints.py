"""An index of the checkpoints, which the sweeper looks for among all artifacts."""

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


def downgrade() -> None:
    op.drop_index("ix_artifacts_checkpoints", table_name="artifacts")
