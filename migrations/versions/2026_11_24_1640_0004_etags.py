"""The etag of each stored file, by which one that was written anew is known without reading it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("artifacts", sa.Column("etag", sa.Text))


def downgrade() -> None:
    op.drop_column("artifacts", "etag")
