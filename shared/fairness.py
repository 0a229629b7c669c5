"""Whose turn it is: the job that a worker takes next, as the part of shared/lifecycle.py's claim that only reads.

Fair between accounts, then priority, then age. Jobs that need the same and are of one account stand in one line; an
index holds the lines one behind the other, so that the lines are found by one step each, however long they are, and
what a worker cannot do costs it one step a kind of need; within a line, jobs that need more memory than it has, or wait
for their next attempt, are passed over one by one. Accounts that have nothing queued cost nothing. Of an
account's running jobs MAX_COUNTED are counted: beyond, whoever was served the longest ago goes first.
"""

MAX_COUNTED = 100

# A job is locked as it is found, and one that another worker is just taking is passed over.
NEXT_JOB = f"""
    need AS (
        (SELECT queue, requires FROM jobs WHERE status = 'queued' ORDER BY queue, requires LIMIT 1)
        UNION ALL
        SELECT next.queue, next.requires FROM need CROSS JOIN LATERAL (
            SELECT queue, requires FROM jobs
            WHERE status = 'queued' AND (queue, requires) > (need.queue, need.requires)
            ORDER BY queue, requires LIMIT 1
        ) AS next
    ), line AS (
        SELECT queue, requires, first.* FROM need CROSS JOIN LATERAL (
            SELECT account_id, priority, id FROM jobs
            WHERE status = 'queued' AND queue = need.queue AND requires = need.requires
            ORDER BY account_id, priority DESC, id LIMIT 1
        ) AS first
        WHERE queue = ANY(CAST(:queues AS text[])) AND requires <@ CAST(:capabilities AS text[])
        UNION ALL
        SELECT queue, requires, next.* FROM line CROSS JOIN LATERAL (
            SELECT account_id, priority, id FROM jobs
            WHERE status = 'queued' AND queue = line.queue AND requires = line.requires
              AND account_id > line.account_id
            ORDER BY account_id, priority DESC, id LIMIT 1
        ) AS next
    ), account AS MATERIALIZED (
        SELECT account_id, priority, id, (
                   SELECT count(*) FROM (
                       SELECT FROM jobs WHERE account_id = first.account_id AND status = 'running' LIMIT {MAX_COUNTED}
                   ) AS counted
               ) AS running,
               (SELECT max(started_at) FROM jobs WHERE account_id = first.account_id) AS served_at
        FROM (
            SELECT DISTINCT ON (account_id) account_id, priority, id FROM line ORDER BY account_id, priority DESC, id
        ) AS first
    ), chosen AS (
        SELECT job.id
        FROM (
            SELECT account_id FROM account ORDER BY running, served_at NULLS FIRST, priority DESC, id
        ) AS turn CROSS JOIN LATERAL (
            SELECT head.id FROM line CROSS JOIN LATERAL (
                SELECT id, priority FROM jobs
                WHERE status = 'queued' AND queue = line.queue AND requires = line.requires
                  AND account_id = line.account_id AND available_at <= now() AND required_memory_bytes <= :memory_bytes
                ORDER BY priority DESC, id LIMIT 1 FOR UPDATE SKIP LOCKED
            ) AS head
            WHERE line.account_id = turn.account_id ORDER BY head.priority DESC, head.id LIMIT 1
        ) AS job
        LIMIT 1
    )
"""
