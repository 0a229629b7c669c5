"""What this worker hears of the broker's queues: rings. Whatever else lies in them is dropped, counted and told.

A message is looked at before Celery decodes it, because what Celery cannot decode would end it. Of a ring, nothing is
believed but that it is one: Celery is handed a message that was written here.
"""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any, Literal

import redis
from kombu.transport import redis as kombu_redis
from pydantic import BaseModel, Field, TypeAdapter

from shared.doorbell import RING_TASK
from shared.log import get_logger

MAX_RING_BYTES = 4096  # Celery's own are below 1,000


class Headers(BaseModel):
    task: Literal["burnish.drain"]  # RING_TASK


class Message(BaseModel):
    """What must be so of a ring as Celery sends it."""

    content_type: Literal["application/json"] = Field(alias="content-type")
    headers: Headers
    body: str  # JSON in base64


# The positional arguments are the queue, and there are no others; what Celery would do next is not listened to.
_BODY: TypeAdapter[tuple[tuple[str], dict[str, None], Any]] = TypeAdapter(tuple[tuple[str], dict[str, None], Any])
num_dropped = 0  # by this process


def ring_of(found: bytes) -> bytes | None:
    """The ring that a queue's item is, written anew; None if it is none."""
    if len(found) > MAX_RING_BYTES:
        return None
    try:
        message = Message.model_validate_json(found)
        (queue,), keywords, _ = _BODY.validate_json(base64.b64decode(message.body, validate=True))
    except ValueError:
        return None
    return None if keywords else _ring(queue)


def _ring(queue: str) -> bytes:
    number = str(uuid.uuid4())
    body = base64.b64encode(json.dumps([[queue], {}, {}]).encode()).decode()
    message = {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": RING_TASK, "id": number, "lang": "py"},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": number,
        },
    }
    return json.dumps(message).encode()


class Client(redis.Redis):
    """A connection to the broker on which an item that is no ring looks as if none had come."""

    def parse_response(self, connection: Any, command_name: str | bytes, **options: Any) -> Any:
        answer = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name != "BRPOP" or not answer:
            return answer
        queue, found = answer
        ring = ring_of(found)
        if ring is None:
            _count(queue, found)
        return ring and (queue, ring)


def _count(queue: bytes, found: bytes) -> None:
    global num_dropped  # noqa: PLW0603
    num_dropped += 1
    get_logger().warning("message_dropped", queue=queue.decode(), size_bytes=len(found), so_far=num_dropped)


class Channel(kombu_redis.Channel):
    def _get_client(self) -> type[redis.Redis]:
        return Client


class Transport(kombu_redis.Transport):
    """Kombu's, by way of Client. To it, a broker that refuses (read-only, full, locked) is one that is away."""

    Channel = Channel
    connection_errors = (*kombu_redis.Transport.connection_errors, redis.ResponseError)
