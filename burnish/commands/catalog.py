"""`burnish workers`, `stages`, `targets` and `version`: what the service is and can do."""

from __future__ import annotations

from importlib.metadata import version as installed_version

import click
from rich.markup import escape

from burnish.client import Client
from burnish.commands.service import as_json, with_service
from burnish.errors import BurnishError
from burnish.screen import Screen, age, size


@click.command()
@with_service
def workers(client: Client, screen: Screen) -> None:
    """List the workers and what they can do."""
    found = client.workers()
    if screen.as_json:
        screen.document(found)
        return
    rows = [
        [
            escape(worker.id),
            ("busy" if worker.busy else "idle") if worker.alive else f"silent for {age(worker.heartbeat_at)}",
            ", ".join(worker.queues),
            str(worker.cores),
            size(worker.memory_bytes),
            escape(", ".join(worker.capabilities)),
        ]
        for worker in found
    ]
    screen.table(["worker", "state", "queues", "cores", "memory", "can do"], rows)


@click.command()
@with_service
def stages(client: Client, screen: Screen) -> None:
    """List the stages that a recipe can have."""
    found = client.stages()
    if screen.as_json:
        screen.document(found)
        return
    rows = [[stage.kind, f"{stage.consumes} -> {stage.produces}", escape(stage.description)] for stage in found]
    screen.table(["stage", "from -> to", "what it does"], rows)


@click.command()
@with_service
def targets(client: Client, screen: Screen) -> None:
    """List the engines that build_engine can make."""
    found = client.targets()
    if screen.as_json:
        screen.document(found)
        return
    rows = [[target.name, str(target.workers), escape(target.description)] for target in found]
    screen.table(["target", "workers", "what it is"], rows)


@click.command()
@click.option("--url", metavar="URL", help="The service.  [default: BURNISH_URL, or local mode]")
@as_json
def version(url: str | None, as_json: bool) -> None:
    """Print the version of this program, and of the service if one answers."""
    screen, own = Screen(as_json), installed_version("burnish")
    service, why = None, ""
    try:
        with Client(url, timeout_seconds=5) as client:
            service = client.version()
    except BurnishError as error:
        why = error.detail
    if as_json:
        screen.document({"client": own, "service": service.version if service else None})
        return
    screen.line(f"burnish {own}")
    screen.line(f"service {service.version} ({client.url})" if service else f"service: {escape(why)}")
