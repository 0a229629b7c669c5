"""What every command that talks to a service has: --url, --api-key and --json."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from burnish.client import Client
from burnish.screen import Screen

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout.")


def with_service(command: Callable[..., None]) -> Callable[..., None]:
    """Hand a command its `client` and its `screen`."""

    @click.option("--url", metavar="URL", help="The service.  [default: BURNISH_URL, or local mode]")
    @click.option("--api-key", metavar="KEY", help="Your key.  [default: BURNISH_API_KEY, or local mode's]")
    @as_json
    @wraps(command)
    def with_client(url: str | None, api_key: str | None, as_json: bool, **arguments: Any) -> None:
        with Client(url, api_key) as client:
            command(client=client, screen=Screen(as_json), **arguments)

    return with_client
