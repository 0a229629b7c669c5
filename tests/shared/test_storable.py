"""Which JSON the ledger can keep, held against Postgres itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DataError
from sqlalchemy.orm import Session

from shared.db import Sessions, transaction
from shared.storable import why_not_storable

TEXTS = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a\0b", "NUL"),
        ("\ud800", "surrogate"),
        ({"deep": [{"\udfff": 1}]}, "surrogate"),
        ([1, {"x": float("nan")}], "nan is not a number"),
        (float("-inf"), "-inf is not a number"),
    ],
)
def test_what_cannot_be_kept_is_told_in_a_sentence(value: Any, reason: str) -> None:
    assert reason in (why_not_storable(value) or "")


@pytest.mark.parametrize("value", ["é 漢字 \U0001f600", "", 0, None, {}, [[]], {"a": [1.5, True, "\x01\n"]}])
def test_ordinary_json_can_be_kept(value: Any) -> None:
    assert why_not_storable(value) is None


def test_a_long_text_is_not_repeated_whole() -> None:
    assert len(why_not_storable("x" * 10_000 + "\0") or "") < 120


def test_nesting_of_any_depth_is_walked() -> None:
    value: Any = "\0"
    for _ in range(50_000):
        value = [value]
    assert why_not_storable(value) is not None


def test_the_rule_is_the_one_of_postgres(sessions: Sessions) -> None:
    @given(value=VALUES)
    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def agree(value: Any) -> None:
        with transaction(sessions) as session:
            assert (why_not_storable(value) is None) == _kept(session, value)

    agree()


def _kept(session: Session, value: Any) -> bool:
    """Whether the value comes back from a jsonb column as it went in."""
    savepoint = session.begin_nested()
    try:
        written = json.dumps(value, ensure_ascii=False)
        found = session.scalar(text("SELECT CAST(:value AS jsonb)"), {"value": written})
    except (DataError, UnicodeEncodeError):
        savepoint.rollback()
        return False
    assert found == value or isinstance(value, float | list | dict)
    return True
