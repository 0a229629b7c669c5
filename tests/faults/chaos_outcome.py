"""What a run of chaos did, cost and found, and the page that tells it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import text

from shared.db import Sessions, transaction
from tests.faults.chaos_plan import KILLS_A_MINUTE, Plan


@dataclass(frozen=True)
class Times:
    """Seconds from submit to end, of jobs that succeeded."""

    num_jobs: int
    p50: float
    p95: float


@dataclass(frozen=True)
class Costs:
    """`requeues` and `lost_seconds` by cause: attempts that came to nothing, and the time until the next one began."""

    attempts: int
    requeues: dict[str, int]
    lost_seconds: dict[str, float]
    calm: Times
    chaos: Times


@dataclass
class Outcome:
    """`broken` is empty if every law holds."""

    plan: Plan
    began_at: datetime
    chaos_began_at: datetime | None = None
    killed: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    costs: Costs | None = None
    seconds: float = 0.0
    load_average: float = 0.0
    broken: list[str] = field(default_factory=list)

    def page(self) -> str:
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        killed = Counter(self.killed)
        yield from ("# Chaos", "")
        yield f"- seed {self.plan.seed}: {self.plan.seconds:g} s, {len(self.plan.errands)} jobs"
        yield f"- {self.began_at:%d %B %Y}, {os.cpu_count()} cores, load average at the end {self.load_average:.1f}"
        yield f"- took {self.seconds:.0f} s from the first server's start to the last look"
        yield f"- {'**broken**' if self.broken else 'every law held'}"
        yield from ("", "| killed | times |", "|---|---|")
        yield from (f"| {what} | {killed[what]} |" for what in KILLS_A_MINUTE)
        yield f"| all | {killed.total()} |"
        yield from ("", f"Jobs: {_counts(self.statuses)}; {self.statuses['failed'] or 'none'} failed.")
        yield f"What a customer's client gave up, so that its user began again: {_counts(self.refusals)}."
        if self.costs is not None:
            yield from self._cost_lines(self.costs)
        if self.broken:
            yield from ("", "## Broken", "", *(f"- {found}" for found in self.broken))

    def _cost_lines(self, costs: Costs) -> Iterator[str]:
        yield from ("", f"{costs.attempts} attempts. Those that came to nothing, and what they cost:", "")
        yield from ("| cause | attempts | seconds until the next one began |", "|---|---|---|")
        for cause, number in costs.requeues.items():
            yield f"| {cause} | {number} | {costs.lost_seconds[cause]:.0f} |"
        yield f"| all | {sum(costs.requeues.values())} | {sum(costs.lost_seconds.values()):.0f} |"
        yield from ("", "| from submit to end | jobs | p50 | p95 |", "|---|---|---|---|")
        for what, times in (("while nothing was killed", costs.calm), ("in the chaos", costs.chaos)):
            yield f"| {what} | {times.num_jobs} | {times.p50:.1f} s | {times.p95:.1f} s |"


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counter.most_common()) or "none"


ATTEMPTS = text("SELECT count(*) FROM job_events WHERE kind = 'claimed'")
REQUEUES = text("""
    SELECT cause, count(*) AS number, coalesce(sum(extract(epoch FROM next_at - claimed_at)), 0)::float AS seconds
    FROM (
        SELECT kind, data ->> 'cause' AS cause, lag(at) OVER moves AS claimed_at, lead(at) OVER moves AS next_at
        FROM job_events WHERE kind IN ('submitted', 'claimed', 'requeued', 'succeeded', 'failed', 'cancelled')
        WINDOW moves AS (PARTITION BY job_id ORDER BY sequence)
    ) AS move WHERE kind = 'requeued' GROUP BY cause ORDER BY count(*) DESC
""")
TIMES = text("""
    SELECT finished_at < :chaos_began_at AS is_calm, count(*) AS number,
           percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY extract(epoch FROM finished_at - created_at)::float)
               AS seconds
    FROM jobs WHERE status = 'succeeded' GROUP BY 1
""")


def costs(sessions: Sessions, chaos_began_at: datetime | None) -> Costs:
    """What the ledger tells of a run whose first kill was at that moment."""
    with transaction(sessions) as session:
        requeues = session.execute(REQUEUES).all()
        times = {
            row.is_calm: Times(row.number, *row.seconds)
            for row in session.execute(TIMES, {"chaos_began_at": chaos_began_at})
        }
        return Costs(
            attempts=session.execute(ATTEMPTS).scalar_one(),
            requeues={row.cause: row.number for row in requeues},
            lost_seconds={row.cause: row.seconds for row in requeues},
            calm=times.get(True, NO_JOBS),
            chaos=times.get(False, NO_JOBS),
        )


NO_JOBS = Times(0, 0.0, 0.0)
