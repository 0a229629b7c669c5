"""A measured figure with the bar it is held against, and how figures are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number, in words, its bar, and whether it keeps it."""

    what: str
    measured: str
    bar: str
    kept: bool


@dataclass(frozen=True)
class Part:
    """What one part of the bench found: its figures, how they were taken, and what lies behind them."""

    title: str
    method: str
    figures: list[Figure]
    details: list[str] = field(default_factory=list)


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def spread(values: Sequence[float], form: str) -> str:
    """Median, lowest and highest, each written as `form` says."""
    low, median, high = (f"{percentile(values, percent):{form}}" for percent in (0, 50, 100))
    return f"{median} ({low} to {high})"


def as_table(parts: Sequence[Part], title: str = "What the service costs") -> Table:
    """One table of all figures."""
    table = Table(title=title)
    for column in ("figure", "measured", "bar", ""):
        table.add_column(column)
    for part in parts:
        for figure in part.figures:
            table.add_row(figure.what, figure.measured, figure.bar, "kept" if figure.kept else "[bold red]MISSED[/]")
        table.add_section()
    return table


def as_markdown(parts: Sequence[Part], environment: Sequence[str], title: str = "What the service costs") -> str:
    """The page that is kept: the environment, every figure, and part by part how it was taken."""
    lines = [f"# {title}", "", *(f"- {fact}" for fact in environment), ""]
    lines += ["| figure | measured | bar | |", "|---|---|---|---|"]
    for part in parts:
        for figure in part.figures:
            lines.append(
                f"| {figure.what} | {figure.measured} | {figure.bar} | {'kept' if figure.kept else '**missed**'} |"
            )
    for part in parts:
        lines += ["", f"## {part.title}", "", part.method, *([""] if part.details else []), *part.details]
    return "\n".join(lines) + "\n"
