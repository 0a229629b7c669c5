"""The fixture `desk`: the whole service but its workers, listening on a port."""

from collections.abc import Iterator

import pytest

from shared.db import Sessions
from shared.settings import Settings
from shared.storage import Storage
from tests.api.desk import Desk, open_desk


@pytest.fixture
def desk(settings: Settings, sessions: Sessions, storage: Storage) -> Iterator[Desk]:
    with open_desk(settings, sessions, storage) as opened:
        yield opened
