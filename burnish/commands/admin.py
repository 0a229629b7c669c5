"""`burnish admin`: what only who runs the service may do, straight on its database."""

from __future__ import annotations

from pathlib import Path

import click

from burnish.admin import create_key, find_settings
from burnish.commands.service import as_json
from burnish.screen import Screen


@click.group()
def admin() -> None:
    """Run the service: needs its settings (BURNISH_DATABASE_URL and secrets), or local mode."""


@admin.group()
def key() -> None:
    """API keys."""


@key.command()
@click.option("--account", metavar="NAME", help="Whose key; made if there is none of that name.")
@click.option("--name", default="made by burnish admin", show_default=True, help="What the key is for.")
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), help="Local mode's directory.")
@as_json
def create(account: str | None, name: str, directory: Path | None, as_json: bool) -> None:
    """Make an API key and print it: the only time that it is shown."""
    settings, default_account = find_settings(directory)
    account = account or default_account
    made, screen = create_key(settings, account, name), Screen(as_json)
    if as_json:
        screen.document({"account": account, "name": name, "api_key": made})
        return
    screen.say(f"A key of the account {account!r}; it is not shown again:")
    screen.text(made)
