"""`burnish report`, `download` and `predict`: what a job has made."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Literal

import click
from rich.markup import escape

from burnish.client import Client
from burnish.commands.jobs import job_id
from burnish.commands.service import as_json, with_service
from burnish.errors import BadInput
from burnish.progress import receiving
from burnish.screen import COLOURS, Screen, colour, size
from shared import figures
from shared.report import Report
from shared.tables import table

ENGINES = ("numpy", "onnxruntime", "openvino")


@click.command()
@job_id
@click.option("--format", "format", type=click.Choice(["md", "csv", "json"]), help="As text, for a file or a program.")
@with_service
def report(client: Client, screen: Screen, job_id: str, format: Literal["md", "csv", "json"] | None) -> None:
    """Print a job's report: every stage against the baseline, and the verdict on the goals.

    Speedups have a 95 % interval. A goal is met if its 95 % bound lies inside, not shown if only its value does.
    """
    if screen.as_json and format not in (None, "json"):
        raise click.UsageError(f"--json and --format {format} exclude each other.")
    job = client.job(job_id)
    if screen.as_json or format == "json":
        screen.document(job.report())
    elif format is not None:
        screen.text(job.report_as(format))
    else:
        _show(job.report(), job.url, screen)


def _show(found: Report, url: str, screen: Screen) -> None:
    screen.line(f"[bold]{escape(found.name)}[/]: {colour(found.verdict)}. {escape(found.reason)}")
    screen.line(escape(url))
    screen.line("")
    header, rows = table(found)
    screen.table(header, [[escape(cell) for cell in row] for row in rows])
    screen.line("")
    assumed = " (assumed)" if found.goals_assumed else ""
    for result in found.goals:
        limit = "" if result.bound is None else f" (95 % bound: {figures.quantity(result.goal, result.bound)})"
        screen.line(
            f"{figures.goal_name(result)}{assumed}, {figures.wanted(result.goal)}: {figures.reached(result)}{limit}, "
            f"[{COLOURS[result.outcome]}]{figures.outcome(result)}[/]"
        )
    for warning in found.warnings:
        screen.line(f"[yellow]warning[/]: {escape(warning)}")


@click.command()
@job_id
@click.option(
    "--output", metavar="DIR", type=click.Path(path_type=Path, file_okay=False), default=".", help="Where to put it."
)
@click.option("--name", help="Which of the job's files.  [default: the engine that it delivers]")
@with_service
def download(client: Client, screen: Screen, job_id: str, output: Path, name: str | None) -> None:
    """Download what a job delivers, and verify its sha256."""
    job = client.job(job_id)
    artifact = job.artifact(name)
    with receiving(artifact.name, screen.err) as on_bytes:
        path = job.download(output, name=artifact.name, on_bytes=on_bytes)
    if screen.as_json:
        facts = {"job": str(job.id), "url": job.url, "path": str(path), "name": artifact.name}
        screen.document({**facts, "sha256": artifact.sha256, "size_bytes": artifact.size_bytes})
        return
    screen.line(f"{escape(str(path))} ({size(artifact.size_bytes)}, sha256 {artifact.sha256})")
    screen.line(f"of {escape(job.url)}")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@as_json
def predict(engine: Path, image: Path, options: tuple[str, ...], as_json: bool) -> None:
    """Run a downloaded engine on one image, on this machine.

    OPTIONS are handed on: --output MASK.png for a segmentation, --threads N.
    """
    missing = [name for name in ENGINES if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"This installation cannot run engines: {', '.join(missing)} is missing.",
            hint="Install it with: pip install 'burnish[worker]'",
        )
    for path in (engine, image):
        if not path.is_file():
            raise BadInput(f"{path} is not there.")
    command = [sys.executable, "-P", "-m", "worker.predict", str(engine), str(image), *options]
    ended = subprocess.run([*command, "--json"] if as_json else command, check=False, stdout=subprocess.PIPE)
    if ended.returncode != 0:
        raise BadInput(f"{engine.name} could not be run on {image.name}.", hint="The reason stands above.")
    click.echo(ended.stdout.decode(), nl=False)
