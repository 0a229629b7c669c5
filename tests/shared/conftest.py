"""What the tests of the ledger end with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.db import Sessions
from tests.audit import audit


@pytest.fixture
def ledger_in_order(sessions: Sessions) -> Iterator[None]:
    """The ledger keeps its laws whatever the test did."""
    yield
    assert audit(sessions) == []
