"""What the service itself costs on this machine: `make bench-service`.

Everything runs locally on the same cores. Shows each figure beside its bar, keeps the page in
benchmarks/results/service.md, and ends with exit code 1 if a bar is missed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console

from benchmarks import claims, memory, overhead, submits
from benchmarks.figures import Part, as_markdown, as_table
from benchmarks.stand import running_service
from worker.environment import environment

RESULTS = Path(__file__).parent / "results" / "service.md"
PACKAGES = ("fastapi", "uvicorn", "sqlalchemy", "psycopg", "celery", "torch", "onnxruntime", "openvino", "nncf")


@click.command()
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="The page to write.")
def main(out: Path) -> None:
    """Measure everything, show it, and write it down."""
    console, begin = Console(stderr=True), time.monotonic()
    load = os.getloadavg()[0]
    parts = []
    for part in _parts():
        parts.append(part)
        for figure in part.figures:
            console.print(f"{figure.what}: {figure.measured}; {figure.bar}", highlight=False)
    facts = [*_environment(), f"load average at the start: {load:.2f}", f"took {time.monotonic() - begin:.0f} s"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_markdown(parts, facts), encoding="utf-8")
    Console().print(as_table(parts))
    sys.exit(0 if all(figure.kept for part in parts for figure in part.figures) else 1)


def _parts() -> Iterator[Part]:
    """Each part's figures as soon as they are there."""
    yield submits.measure()
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as directory:
        example = overhead.prepare(Path(directory))
        with running_service(Path(directory) / "service") as stand:
            order = overhead.warm_up(stand, example)
            yield overhead.measure(stand, order, example)
            yield claims.measure(stand, order, example.data)
            yield memory.measure(stand, order)


def _environment() -> list[str]:
    here = environment()
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return [
        f"{datetime.now(UTC):%d %B %Y}, burnish {version('burnish')}, Python {here.python}",
        f"{here.cpu}, {here.cores} cores, {here.memory_bytes / 2**30:.0f} GiB",
        packages,
    ]


if __name__ == "__main__":
    main()
