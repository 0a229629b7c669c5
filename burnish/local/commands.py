"""`burnish local up | status | down`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from burnish.local import launch
from burnish.local.place import DIRECTORY_NAME, LocalFailed, State

_directory = click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"Where everything is kept.  [default: {DIRECTORY_NAME} here or in the nearest parent]",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def local() -> None:
    """Run the whole service on this machine, as child processes of one command."""


@local.command()
@_directory
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="How many.")
@click.option("--detach", is_flag=True, help="Return once it is ready, and leave it running.")
@_as_json
def up(directory: Path | None, port: int, workers: int, detach: bool, as_json: bool) -> None:
    """Start the service; Ctrl-C, or `down` from elsewhere, stops it."""

    def announce(running: launch.Running, is_new: bool) -> None:
        if as_json:
            facts = {"url": running.url, "api_key_path": str(running.api_key_path), "started": is_new}
            click.echo(json.dumps(facts))
            return
        click.echo(f"Burnish {'is ready' if is_new else 'is running already'}: {running.url}")
        click.echo(f"API key: {running.api_key_path}")
        if is_new:
            click.echo("Stop it with: burnish local down" if detach else "Ctrl-C stops it.")

    try:
        launch.up(directory, port, workers, detach, announce)
    except LocalFailed as error:
        raise click.ClickException(str(error)) from error


@local.command()
@_directory
@_as_json
def status(directory: Path | None, as_json: bool) -> None:
    """Show what runs; exits with 3 if the service is not ready."""
    state = launch.status(directory)
    click.echo(json.dumps(asdict(state), indent=2) if as_json else _table(state))
    if state.phase != "ready":
        raise SystemExit(3)


@local.command()
@_directory
@_as_json
def down(directory: Path | None, as_json: bool) -> None:
    """Stop the service; its data stays for the next `up`."""
    try:
        was_running = launch.down(directory)
    except LocalFailed as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps({"stopped": was_running}))
    else:
        click.echo("Stopped." if was_running else "Nothing was running.")


def _table(state: State) -> str:
    lines = [f"{state.phase}{': ' + state.url if state.phase == 'ready' else ''}"]
    for name, service in state.services.items():
        line = f"  {name:<12}{service.phase:<12}"
        if service.pid is not None:
            line += f"pid {service.pid:<8}"
        if service.restarts:
            line += f"restarted {service.restarts}x, last exit status {service.last_exit}"
        lines.append(line.rstrip())
    if state.message:
        lines.append(state.message)
    return "\n".join(lines)
