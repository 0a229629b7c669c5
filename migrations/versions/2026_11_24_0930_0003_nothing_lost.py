"""Quarantined inputs, who wrote an event, the stage cache, what accounts have, and whether a file is what it was."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# A commit that notifies waits for every other that does, and for the disk meanwhile. Claims come in bursts, so the
# worker tells of its claim by itself, after the commit.
NOTIFY = """
CREATE OR REPLACE TRIGGER notify AFTER INSERT ON job_events FOR EACH ROW
    WHEN (NEW.kind NOT IN ({kinds})) EXECUTE FUNCTION notify_job_event()
"""

# What an account has is counted by triggers, so that it is right whoever writes: the service of either version, a
# backup that comes back, a hand. Each connection counts into one of 16 rows: a row that all wrote would have every
# commit of an account wait for the disk behind the one before.
COUNT = """
CREATE FUNCTION add_usage(of_account uuid, jobs bigint, bytes numeric) RETURNS void LANGUAGE sql AS $$
    INSERT INTO account_usage (account_id, slot, active_jobs, stored_bytes)
    SELECT id, pg_backend_pid() % 16, jobs, bytes FROM accounts WHERE id = of_account
    ON CONFLICT (account_id, slot) DO UPDATE
    SET active_jobs = account_usage.active_jobs + excluded.active_jobs,
        stored_bytes = account_usage.stored_bytes + excluded.stored_bytes
$$;
CREATE FUNCTION count_new_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM add_usage(account_id, count(*), 0) FROM new_jobs WHERE status IN ('queued', 'running') GROUP BY account_id;
    RETURN NULL;
END $$;
CREATE FUNCTION count_gone_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM add_usage(OLD.account_id, -1, 0);
    RETURN NULL;
END $$;
CREATE FUNCTION count_new_uploads() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM add_usage(account_id, 0, sum(size_bytes)) FROM new_artifacts WHERE role = 'upload' GROUP BY account_id;
    RETURN NULL;
END $$;
CREATE FUNCTION count_gone_upload() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM add_usage(OLD.account_id, 0, -OLD.size_bytes);
    RETURN NULL;
END $$;
CREATE TRIGGER count_new AFTER INSERT ON jobs REFERENCING NEW TABLE AS new_jobs
    FOR EACH STATEMENT EXECUTE FUNCTION count_new_jobs();
CREATE TRIGGER count_ended AFTER UPDATE OF status ON jobs FOR EACH ROW
    WHEN (OLD.status IN ('queued', 'running') AND NEW.status NOT IN ('queued', 'running'))
    EXECUTE FUNCTION count_gone_job();
CREATE TRIGGER count_gone AFTER DELETE ON jobs FOR EACH ROW
    WHEN (OLD.status IN ('queued', 'running')) EXECUTE FUNCTION count_gone_job();
CREATE TRIGGER count_new AFTER INSERT ON artifacts REFERENCING NEW TABLE AS new_artifacts
    FOR EACH STATEMENT EXECUTE FUNCTION count_new_uploads();
CREATE TRIGGER count_gone AFTER DELETE ON artifacts FOR EACH ROW
    WHEN (OLD.role = 'upload') EXECUTE FUNCTION count_gone_upload();
SELECT add_usage(account_id, count(*), 0) FROM jobs WHERE status IN ('queued', 'running') GROUP BY account_id;
SELECT add_usage(account_id, 0, sum(size_bytes)) FROM artifacts WHERE role = 'upload' GROUP BY account_id;
"""

# Whether an account may have one more job, held for the transaction that asks. Far from the limit many may ask at
# once: however many there are, they are no more than the server has connections, so together they cannot pass it.
# Near it they ask one after the other. What is counted is counted again once the lock is there.
ROOM = """
CREATE FUNCTION has_room(of_account uuid, most integer) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    door bigint := hashtextextended('burnish jobs of ' || of_account, 0);
    margin integer := current_setting('max_connections');
    active bigint;
BEGIN
    SELECT coalesce(max_active_jobs, most) INTO most FROM accounts WHERE id = of_account;
    SELECT coalesce(sum(active_jobs), 0) INTO active FROM account_usage WHERE account_id = of_account;
    IF active < most - margin THEN
        PERFORM pg_advisory_xact_lock_shared(door);
    ELSE
        PERFORM pg_advisory_xact_lock(door);
        margin := 0;
    END IF;
    SELECT coalesce(sum(active_jobs), 0) INTO active FROM account_usage WHERE account_id = of_account;
    RETURN active < most - margin;
END $$;
"""
COUNTERS = {
    "jobs": {"count_new": "count_new_jobs", "count_ended": "count_gone_job", "count_gone": "count_gone_job"},
    "artifacts": {"count_new": "count_new_uploads", "count_gone": "count_gone_upload"},
}


def upgrade() -> None:
    op.create_table(
        "quarantines",
        sa.Column("account_id", sa.Uuid(), nullable=False),
        sa.Column("input_sha256", sa.TEXT(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["accounts.id"], name=op.f("fk_quarantines_account_id_accounts"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("account_id", "input_sha256", name=op.f("pk_quarantines")),
    )
    op.add_column("jobs", sa.Column("input_sha256", sa.TEXT(), nullable=True))
    op.add_column("job_events", sa.Column("lease_token", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("use_cache", sa.Boolean(), server_default=sa.text("true"), nullable=False))
    op.add_column("stage_runs", sa.Column("cache_key", sa.TEXT(), nullable=True))
    op.add_column("artifacts", sa.Column("etag", sa.TEXT(), nullable=True))
    op.execute(NOTIFY.format(kinds="'submitted', 'claimed'"))
    op.add_column("accounts", sa.Column("max_active_jobs", sa.Integer(), nullable=True))
    op.add_column("accounts", sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True))
    op.create_table(
        "account_usage",
        sa.Column("account_id", sa.Uuid(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("active_jobs", sa.Integer(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id"], ["accounts.id"], name=op.f("fk_account_usage_account_id_accounts"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("account_id", "slot", name=op.f("pk_account_usage")),
    )
    op.execute(COUNT)
    op.execute(ROOM)


def downgrade() -> None:
    for table, triggers in COUNTERS.items():
        for trigger in triggers:
            op.execute(f"DROP TRIGGER {trigger} ON {table}")
    for function in sorted({name for triggers in COUNTERS.values() for name in triggers.values()}):
        op.execute(f"DROP FUNCTION {function}()")
    op.execute("DROP FUNCTION has_room(uuid, integer); DROP FUNCTION add_usage(uuid, bigint, numeric)")
    op.drop_table("account_usage")
    for column in ("max_stored_bytes", "max_active_jobs"):
        op.drop_column("accounts", column)
    op.execute(NOTIFY.format(kinds="'submitted'"))
    op.drop_column("artifacts", "etag")
    op.drop_column("stage_runs", "cache_key")
    op.drop_column("jobs", "use_cache")
    op.drop_column("job_events", "lease_token")
    op.drop_column("jobs", "input_sha256")
    op.drop_table("quarantines")
