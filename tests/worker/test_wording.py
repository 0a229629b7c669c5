"""Texts as the ledger and the report can keep them."""

from __future__ import annotations

import pytest

from shared.storable import why_not_storable
from worker.wording import legible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é and 😀\n", "plain, é and 😀\n"),
        ("e\0vil", "e\\x00vil"),
        ("\ud83d alone \udfff", "\\ud83d alone \\udfff"),
    ],
)
def test_what_cannot_be_kept_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert legible(text) == shown
    assert why_not_storable(shown) is None


@pytest.mark.parametrize(
    ("text", "shown"), [("12345", "12345"), ("123456", "1234…"), ("\0" * 9, "\\x00…"), ("", "")]
)
def test_what_is_too_long_ends_in_an_ellipsis(text: str, shown: str) -> None:
    assert legible(text, 5) == shown
