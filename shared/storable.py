"""Which JSON the ledger can keep: Postgres has no NUL in text, UTF-8 no lone surrogate, and JSON no NaN."""

import math
from typing import Any


def why_not_storable(value: Any) -> str | None:
    """A sentence on the first thing in a JSON value that cannot be kept; None if all of it can."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if "\0" in item:
                return f"the text {_shown(item)} has a NUL character in it"
            if not item.isascii() and any("\ud800" <= character <= "\udfff" for character in item):
                return f"the text {_shown(item)} has half of a surrogate pair in it"
        elif isinstance(item, float):
            if not math.isfinite(item):
                return f"{item} is not a number that JSON has"
        elif isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return None


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "...")
