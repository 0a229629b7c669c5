"""Networks that nobody here trained, through the service and by hand.

    python -m benchmarks.foreign [--only NAME ...] [--service-only | --by-hand-only] [--again] [--work DIR]

Packages, trainings, engines and the row of each network are kept under build/foreign, so that the same command goes on
where it was cut off. The page has the rows of all networks that are kept, also with --only. Writes
benchmarks/results/foreign.md and foreign.json; exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.foreign.delivery import Delivery, deliver
from benchmarks.foreign.networks import NETWORKS, Network
from benchmarks.foreign.packages import PACKAGES, unpack
from benchmarks.foreign.page import Found, bars, page
from benchmarks.foreign.rows import Row, measure
from benchmarks.stand import running_service
from worker.environment import environment

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), metavar="NAME", default=list(NETWORKS))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--service-only", action="store_true", help="run the jobs and keep what they deliver")
    which.add_argument("--by-hand-only", action="store_true", help="leave the service out; nothing is kept but engines")
    parser.add_argument("--again", action="store_true", help="forget what the service delivered of these networks")
    parser.add_argument("--without-goals", action="store_true", help="jobs that have no goal")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "foreign")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "foreign.md")
    options = parser.parse_args()

    work: Path = options.work.resolve()
    cases = [Case(NETWORKS[name], work) for name in options.only]
    if options.again:
        for case in cases:
            case.forget()
    if not options.by_hand_only:
        run_jobs(cases, work, with_goal=not options.without_goals)
    if options.service_only:
        return
    for case in cases:
        case.row(with_service=not options.by_hand_only)
    if options.by_hand_only:
        return
    rows = [case.row() for case in (Case(network, work) for network in NETWORKS.values()) if case.row_path.exists()]
    write_page(rows, work, options.out, with_goal=not options.without_goals)
    sys.exit(0 if all(figure.kept for figure in bars(rows, NETWORKS)) else 1)


@dataclass(frozen=True)
class Case:
    """One network, and the folder with what was made of it."""

    network: Network
    work: Path

    @property
    def folder(self) -> Path:
        return self.work / "networks" / self.network.name

    @property
    def delivery(self) -> Delivery:
        return Delivery(self.folder / "service")

    @property
    def row_path(self) -> Path:
        return self.folder / "row.json"

    def forget(self) -> None:
        shutil.rmtree(self.delivery.folder, ignore_errors=True)
        self.row_path.unlink(missing_ok=True)

    def row(self, with_service: bool = True) -> Row:
        """The row as it was kept, or measured now."""
        if with_service and self.row_path.exists():
            return Row.model_validate_json(self.row_path.read_text(encoding="utf-8"))
        source = self.network.source(self.work)
        row = measure(self.network, source, self.work, self.folder, self.delivery if with_service else None)
        if with_service:
            self.row_path.write_text(row.model_dump_json(indent=1), encoding="utf-8")
        for line in summary(row):
            print(line, flush=True)
        return row


def run_jobs(cases: Sequence[Case], work: Path, with_goal: bool) -> None:
    """The jobs of all networks that have nothing delivered yet, one after the other, on one service."""
    missing = [case for case in cases if not case.delivery.is_there]
    with ExitStack() as stack:
        stand = stack.enter_context(running_service(work / "service")) if missing else None
        for case in missing:
            assert stand is not None
            source = case.network.source(work)
            found = deliver(case.network, source, stand, work, case.delivery.folder, with_goal)
            report = found.report()
            print(f"{case.network.name}: {found.refusal or (report.reason if report else '')}", flush=True)


def summary(row: Row) -> list[str]:
    """The row as lines of text."""
    lines = [f"{row.network}: {row.goal}"]
    for engine in (*row.engines, *([row.delivered] if row.delivered else [])):
        scores = ", ".join(f"{name} {value:.4f}" for name, value in engine.scores.items())
        goal = "met" if engine.meets_goal else "missed"
        lines.append(
            f"  {engine.name:<18} {engine.kind:<18} {engine.latency_ms:8.3f} ms {engine.speedup.value:6.2f}x "
            f"{engine.size_bytes / 1000:8.0f} KB  {goal:<6}  {scores}"
        )
    return lines + [f"  {name}: {words}" for name, words in row.failures.items()]


def write_page(rows: Sequence[Row], work: Path, out: Path, with_goal: bool) -> None:
    found = Found(rows, list(NETWORKS), [unpack(name, work) for name in PACKAGES], environment(), with_goal)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = page(found)
    out.write_text(text, encoding="utf-8")
    document = {
        "environment": found.environment.model_dump(),
        "packages": {each.package.requirement: each.sha256 for each in found.packages},
        "rows": [row.model_dump() for row in rows],
    }
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(text)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
