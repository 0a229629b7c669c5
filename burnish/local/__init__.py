"""The whole service on one machine: PostgreSQL, Valkey, S3, api and workers as child processes of one command."""

from __future__ import annotations

import os
from pathlib import Path

from burnish.local.place import find_place


def find_local(directory: Path | None = None) -> tuple[str, str] | None:
    """URL and API key of the service to talk to; None if there is none.

    BURNISH_URL and BURNISH_API_KEY come first; then the service that runs in `directory`, or without one in
    `.burnish` here or in the nearest parent that has it.
    """
    url, key = os.environ.get("BURNISH_URL"), os.environ.get("BURNISH_API_KEY")
    if directory is None and url and key:
        return url, key
    place = find_place(directory)
    state = place.read_state()
    if state is None or not state.is_up:
        return None
    return state.url, place.api_key.read_text().strip()
