"""What a submit that wrote nothing was: the same one as before, by its idempotency key or by its very job."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from shared.errors import IdempotencyConflict

EARLIER = text("""
    SELECT job_id, request_sha256 FROM idempotency_keys WHERE account_id = :account_id AND key = :key
    UNION ALL SELECT id, :request_sha256 FROM jobs WHERE CAST(:key AS text) IS NULL AND id = :id
""")


def find(connection: Connection, submitted: dict[str, Any]) -> UUID | None:
    """The job that was made before of what is submitted; None if there is none.

    Raises:
        IdempotencyConflict: the key was used for another request.
    """
    earlier = connection.execute(EARLIER, submitted).one_or_none()
    if earlier is None:
        return None
    if earlier.request_sha256 != submitted["request_sha256"]:
        raise IdempotencyConflict(hint="Use a new key for a new request, or send the same body again.")
    job_id: UUID = earlier.job_id
    return job_id
