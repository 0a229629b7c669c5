"""What the ledger costs as it fills: claims, pages of the list, and sweeps on a short and on a long queue.

`make bench-ledger`. One PostgreSQL that waits for its disk, with one database for each length, asked in turns; keeps
the page in benchmarks/results/ledger.md, and ends with exit code 1 if a bar is missed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import click
import psycopg
from psycopg import sql
from rich.console import Console
from sqlalchemy import Engine, TextClause, text

from benchmarks.figures import Figure, Part, as_markdown, as_table, percentile, spread
from burnish.local.apps import environment_of, migrate_command
from burnish.local.servers import running_servers
from shared import accounts, browse, lifecycle, watchers, workers
from shared.db import Sessions, make_sessions, statements, transaction
from shared.ledger import Capacity
from shared.recipe import Recipe
from shared.settings import Settings
from shared.workers import Registration
from worker.environment import environment

RESULTS = Path(__file__).parent / "results" / "ledger.md"
SHORT, LONG = 1_000, 100_000
CLAIMERS, CLAIMS, ROUNDS = 16, 800, 9
DEPTHS, PAGE, PAGES = (0, 100, 50_000, 99_000, 150_000, 199_000), 20, 60
LISTS: dict[str, list[str]] = {  # the newer half of the jobs is queued, the older one succeeded
    "a page": [],
    "a page of queued or running jobs": ["queued", "running"],
    "a page of ended jobs": ["succeeded", "failed", "cancelled"],
    "a page of failed jobs, of which there are none": ["failed"],
}
DUE, SWEEPS = (0, 10, 50), 9
LEAST_OF_SHORT, LEAST_OF_BARE, MOST_OF_FIRST, MOST_OF_ALL, MOST_OF_SMALL = 0.8, 0.5, 1.5, 2.0, 1.5

RECIPE = Recipe.model_validate(
    {
        "source": {"onnx": "01990000-0000-7000-8000-000000000001"},
        "task": {"kind": "segmentation", "classes": ["other", "lesion"], "background": 0},
        "data": {"artifact": "01990000-0000-7000-8000-000000000002"},
        "stages": [{"kind": "quantize"}, {"kind": "build_engine"}],
    }
)
ABLE = Capacity("worker", ["default"], RECIPE.requirements(), memory_bytes=2**34)
FILL = """
    WITH made AS (
        INSERT INTO jobs (id, account_id, name, recipe, requires, timeout_seconds, max_attempts, status, attempt,
                          started_at, finished_at, last_sequence)
        SELECT uuidv7(), a.id, 'n', CAST(:recipe AS jsonb), CAST(:requires AS text[]), 60, 1000000, :status,
               (:status <> 'queued')::int, CASE WHEN :status <> 'queued' THEN now() END,
               CASE WHEN :status <> 'queued' THEN now() END, 1
        FROM accounts a, generate_series(1, :each) WHERE a.name = ANY(CAST(:names AS text[])) RETURNING id
    )
    INSERT INTO job_events (job_id, sequence, attempt, kind) SELECT id, 1, 0, 'submitted' FROM made
"""
AGAIN = """
    UPDATE jobs SET status = 'queued', lease_token = NULL, lease_expires_at = NULL, worker_id = NULL
    WHERE status = 'running'
"""
# The same rows with the same indexes and guards, through the same client; but whoever is first in the index is taken,
# and nothing is told of it.
BARE = text("""
    UPDATE jobs SET status = 'running', attempt = attempt + 1, worker_id = 'w', lease_token = gen_random_uuid(),
                    lease_expires_at = now() + interval '30 seconds', started_at = coalesce(started_at, now())
    WHERE id = (
        SELECT id FROM jobs WHERE status = 'queued'
        ORDER BY queue, requires, account_id, priority DESC, id LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    RETURNING id, recipe
""")
BAREST = text("""
    UPDATE bench_rows SET status = 'running' WHERE id = (
        SELECT id FROM bench_rows WHERE status = 'queued' ORDER BY priority DESC, id LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    RETURNING id, recipe
""")


@dataclass(frozen=True)
class Ledger:
    """A database of its own with so many queued jobs."""

    sessions: Sessions
    administration: psycopg.Connection
    account_id: UUID

    def tidy(self) -> None:
        """Have every job wait again, and the table as after a vacuum."""
        self.administration.execute(AGAIN)
        self.administration.execute("UPDATE bench_rows SET status = 'queued' WHERE status = 'running'")
        for table in ("jobs", "bench_rows"):
            self.administration.execute(sql.SQL("VACUUM ANALYZE {}").format(sql.Identifier(table)))


@click.command()
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="The page to write.")
def main(out: Path) -> None:
    """Measure everything, show it, and write it down."""
    begin, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as directory, _ledgers(Path(directory)) as (short, long):
        parts = [claims(short, long), pages(long), sweeps(short, long), crowds(short)]
    here = environment()
    facts = [
        f"{datetime.now(UTC):%d %B %Y}, {here.cpu}, {here.cores} cores, Python {here.python}",
        f"load average at the start: {load:.2f}",
        f"took {time.monotonic() - begin:.0f} s",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_markdown(parts, facts, "What the ledger costs as it fills"), encoding="utf-8")
    Console().print(as_table(parts, "What the ledger costs as it fills"))
    sys.exit(0 if all(figure.kept for part in parts for figure in part.figures) else 1)


@contextmanager
def _ledgers(directory: Path) -> Iterator[tuple[Ledger, Ledger]]:
    """A ledger with a short queue and one with a long one, the latter with as many ended jobs before it."""
    with running_servers(directory) as settings:
        subprocess.run(migrate_command(), env={**os.environ, **environment_of(settings)}, check=True)
        with _ledger(settings, "short", SHORT, ended=0) as short, _ledger(settings, "long", LONG, ended=LONG) as long:
            yield short, long


@contextmanager
def _ledger(settings: Settings, name: str, queued: int, ended: int) -> Iterator[Ledger]:
    head = settings.database_url.rpartition("/")[0]
    url = head.replace("+psycopg", "")
    with psycopg.connect(f"{url}/postgres", autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE burnish").format(sql.Identifier(name)))
    sessions = make_sessions(settings.model_copy(update={"database_url": f"{head}/{name}"}), pool_size=CLAIMERS)
    account_id = accounts.ensure_account(sessions, "bench")
    for status, each in (("succeeded", ended), ("queued", queued)):
        _fill(sessions, ["bench"], each, status)
    with psycopg.connect(f"{url}/{name}", autocommit=True) as administration:
        administration.execute("""
            CREATE TABLE bench_rows AS SELECT id, status, priority, recipe FROM jobs WHERE status = 'queued';
            ALTER TABLE bench_rows ADD PRIMARY KEY (id);
            CREATE INDEX ON bench_rows (priority DESC, id) WHERE status = 'queued'
        """)
        yield Ledger(sessions, administration, account_id)
    engine = sessions.kw["bind"]
    assert isinstance(engine, Engine)
    engine.dispose()


def _fill(sessions: Sessions, names: list[str], each: int, status: str) -> None:
    facts = {"recipe": RECIPE.model_dump_json(), "requires": RECIPE.requirements()}
    with transaction(sessions) as session:
        session.execute(text("SET LOCAL statement_timeout = 0"))
        session.execute(text(FILL), {**facts, "names": names, "each": each, "status": status})


# ---------------------------------------------------------------- claims


def claims(short: Ledger, long: Ledger) -> Part:
    """Claims a second from either ledger, and a bare loop's, in turns."""
    loops: dict[str, tuple[Ledger, Callable[[Ledger], object]]] = {
        "short": (short, _claim),
        "long": (long, _claim),
        "told": (long, _claim_and_tell),
        "bare": (long, lambda ledger: _execute(ledger, BARE)),
        "barest": (long, lambda ledger: _execute(ledger, BAREST)),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(ROUNDS + 1):
        for name in sorted(loops, reverse=number % 2 == 1):
            ledger, take = loops[name]
            ledger.tidy()
            rate = _rate(ledger, take)
            if number:  # the first round warms up
                rates[name].append(rate)
    of_short = [a / b for a, b in zip(rates["long"], rates["short"], strict=True)]
    of_bare = [a / b for a, b in zip(rates["long"], rates["bare"], strict=True)]
    of_barest = [a / b for a, b in zip(rates["long"], rates["barest"], strict=True)]
    return Part(
        title="Claims a second",
        method=(
            f"{CLAIMERS} threads with a connection each make {CLAIMS} claims; {ROUNDS} rounds of each loop in turns, "
            f"fsync on, every job put back and the tables vacuumed between them; median (lowest to highest). The bare "
            f"loop is one UPDATE of the first queued row of the same table, with SKIP LOCKED and nothing else: no "
            f"fairness, no question of what the worker can do, no event, nobody told; same client, same indexes."
        ),
        figures=[
            Figure(
                f"claims with {LONG:,} queued, of those with {SHORT:,}",
                spread(of_short, ".2f"),
                f"at least {LEAST_OF_SHORT:g}",
                percentile(of_short, 50) >= LEAST_OF_SHORT,
            ),
            Figure(
                f"claims with {LONG:,} queued, of a bare SKIP LOCKED loop's",
                spread(of_bare, ".2f"),
                f"at least {LEAST_OF_BARE:g}",
                percentile(of_bare, 50) >= LEAST_OF_BARE,
            ),
        ],
        details=[
            *(f"- {name}: {spread(rates[name], '.0f')} /s" for name in ("short", "long", "bare")),
            f"- long, and who watches the job told of each claim, as a worker does: {spread(rates['told'], '.0f')} /s",
            f"- for comparison, the bare loop on a table of four columns and two indexes, without guards: "
            f"{spread(rates['barest'], '.0f')} /s; claims are {spread(of_barest, '.2f')} of that",
        ],
    )


def _claim(ledger: Ledger) -> object:
    return lifecycle.claim(ledger.sessions, ABLE, lease_seconds=600)


def _claim_and_tell(ledger: Ledger) -> object:
    taken = lifecycle.claim(ledger.sessions, ABLE, lease_seconds=600)
    assert taken is not None
    watchers.tell(ledger.sessions, taken.lease.job_id)
    return taken


def _execute(ledger: Ledger, statement: TextClause) -> object:
    with statements(ledger.sessions) as connection:
        return connection.execute(statement).one_or_none()


def _rate(ledger: Ledger, take: Callable[[Ledger], object]) -> float:
    """Claims a second, each of CLAIMERS threads making its share of CLAIMS."""
    start = threading.Barrier(CLAIMERS + 1)

    def run() -> None:
        start.wait()
        for _ in range(CLAIMS // CLAIMERS):
            assert take(ledger) is not None

    with ThreadPoolExecutor(CLAIMERS) as pool:
        running = [pool.submit(run) for _ in range(CLAIMERS)]
        start.wait()
        begin = time.perf_counter()
        for future in running:
            future.result()
        return CLAIMS / (time.perf_counter() - begin)


# ---------------------------------------------------------------- pages of the list


def pages(long: Ledger) -> Part:
    """A page of the job list at several depths, in turns."""
    with transaction(long.sessions) as session:
        deep = text("SELECT id FROM jobs WHERE account_id = :a ORDER BY id DESC OFFSET :depth LIMIT 1")
        before = {
            depth: session.scalar(deep, {"a": long.account_id, "depth": depth}) if depth else None for depth in DEPTHS
        }
    taken_ms: dict[tuple[str, int], list[float]] = {(what, depth): [] for what in LISTS for depth in DEPTHS}
    for _ in range(PAGES):
        for (what, depth), taken in taken_ms.items():
            begin = time.perf_counter()
            browse.jobs(long.sessions, long.account_id, statuses=LISTS[what], before=before[depth], limit=PAGE)
            taken.append(1000 * (time.perf_counter() - begin))
    medians = {page: percentile(taken, 50) for page, taken in taken_ms.items()}
    figures, details = [], []
    for what in LISTS:
        worst = max(medians[what, depth] / medians[what, 0] for depth in DEPTHS)
        told, bar = f"at most {worst:.2f}", f"at most {MOST_OF_FIRST:g}"
        figures.append(Figure(f"{what}, at any depth, of its first", told, bar, worst <= MOST_OF_FIRST))
        details.append(f"- {what}: " + ", ".join(f"{medians[what, depth]:.2f} ms at {depth:,}" for depth in DEPTHS))
    dearest = max(medians[what, 0] for what in LISTS) / medians["a page", 0]
    told, bar = f"at most {dearest:.2f}", f"at most {MOST_OF_ALL:g}"
    figures.append(Figure("the first page of some statuses, of that of all", told, bar, dearest <= MOST_OF_ALL))
    return Part(
        title="A page of the job list",
        method=f"{PAGE} jobs with their stages, of an account that has {2 * LONG:,}; medians of {PAGES}, in turns.",
        figures=figures,
        details=details,
    )


# ---------------------------------------------------------------- sweeps


def sweeps(short: Ledger, long: Ledger) -> Part:
    """The questions that a sweeper asks of the ledger, with so many lapsed leases, on either ledger in turns."""
    taken_ms: dict[tuple[str, int], list[float]] = {}
    for ledger in (short, long):
        ledger.tidy()
    for _ in range(SWEEPS):
        for due in DUE:
            for name, ledger in (("short", short), ("long", long)):
                taken_ms.setdefault((name, due), []).append(_sweep_ms(ledger, due))
    medians = {key: percentile(taken, 50) for key, taken in taken_ms.items()}
    ratios = {due: medians["long", due] / medians["short", due] for due in DUE}
    worst = max(ratios.values())
    return Part(
        title="A sweep",
        method=(
            f"Lapsed leases requeued, reasons for waiting looked at, queues with work found: with {SHORT:,} queued "
            f"jobs, and with {LONG:,} queued and {LONG:,} ended ones; medians of {SWEEPS}, in turns."
        ),
        figures=[
            Figure(
                f"a sweep with {LONG:,} queued and as many ended, of one with {SHORT:,}",
                f"at most {worst:.2f}",
                f"at most {MOST_OF_SMALL:g}",
                worst <= MOST_OF_SMALL,
            )
        ],
        details=[
            f"- {due} leases lapsed: {medians['short', due]:.1f} ms and {medians['long', due]:.1f} ms" for due in DUE
        ],
    )


def _sweep_ms(ledger: Ledger, due: int) -> float:
    for _ in range(due):
        taken = lifecycle.claim(ledger.sessions, ABLE, lease_seconds=-1)
        assert taken is not None
    workers.register(ledger.sessions, Registration("w", "h", ["default"], ABLE.capabilities, 1, 2**34, {}))
    begin = time.perf_counter()
    assert lifecycle.sweep_leases(ledger.sessions) == due
    workers.explain_waiting(ledger.sessions)
    assert workers.queues_with_work(ledger.sessions) == ["default"]
    return 1000 * (time.perf_counter() - begin)


# ---------------------------------------------------------------- many accounts


def crowds(ledger: Ledger) -> Part:
    """One claim's time as accounts come to wait, and as accounts with nothing queued come."""
    details = []
    for waiting, idle in ((1, 0), (1, 5000), (100, 5000), (1000, 5000)):
        names = [f"idle-{number}" for number in range(idle)]
        more = [f"waiting-{number}" for number in range(waiting - 1)]
        with transaction(ledger.sessions) as session:
            made = "INSERT INTO accounts (id, name) SELECT uuidv7(), unnest(CAST(:n AS text[])) ON CONFLICT DO NOTHING"
            session.execute(text(made), {"n": names + more})
        _fill(ledger.sessions, more, 2, "queued")
        ledger.tidy()
        taken_ms = []
        for _ in range(60):
            begin = time.perf_counter()
            assert _claim(ledger) is not None
            taken_ms.append(1000 * (time.perf_counter() - begin))
        details.append(f"- {waiting:,} accounts wait, {idle:,} have nothing queued: {percentile(taken_ms, 50):.2f} ms")
    return Part("A claim among many accounts", "One claimer alone; medians of 60.", [], details)


if __name__ == "__main__":
    main()
