"""Whether an order can be taken: everything is checked before anything is written."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import text

from shared.advice import notes
from shared.datasets import check_data
from shared.db import Sessions, reads, transaction
from shared.errors import ArtifactNotReady, InvalidRecipe, ModelTooLarge, NotFound
from shared.ledger import Order, Reason, input_digest
from shared.recipe import ModelFormat, Recipe
from shared.schemas import JobRequest, Note
from shared.settings import Settings
from shared.uploads import ROLE
from shared.workers import alive, waiting_reason

# What a child needs before it holds a model, and how often the model lies in memory at the worst moment: its weights,
# the network built from them, the exported graph, and the runtime's own copy while a candidate is compared with it.
CHILD_BYTES = 2**30
SOURCE_COPIES = 4
LARGE_BYTES = 4 * 2**30  # below, a submit is spared the look at the workers

_SOURCE = {ModelFormat.TORCH: ("weights", "safetensors"), ModelFormat.ONNX: ("onnx", "onnx")}


def admit(sessions: Sessions, settings: Settings, account_id: UUID, request: JobRequest) -> Order:
    """The order that a request makes, if its files are there and fit; one query.

    Raises:
        NotFound, ArtifactNotReady: a file that the recipe names is not the account's, or not complete.
        InvalidRecipe: a file has another format than its place in the recipe asks for.
        DataMismatch, EvaluationEmpty, CalibrationMissing: the data set does not fit the task or the stages.
        ModelTooLarge: workers that could do the job are there, and none of them has the memory for it.
    """
    recipe = request.recipe
    files = _files(sessions, account_id, recipe)
    word, format = _SOURCE[recipe.source.format]
    source = _demand(files, recipe.source.artifact_id, f"recipe.source.{word}", (format,))
    data = _demand(files, recipe.data.artifact, "recipe.data.artifact", ("safetensors", "zip"))
    unlabelled = recipe.parts_without_labels()
    check_data(data.summary, data.format, recipe.task, recipe.parts(), recipe.data.preprocessing, unlabelled)
    order = Order(
        account_id=account_id,
        name=request.name,
        recipe=recipe,
        timeout_seconds=request.timeout_seconds or settings.job_timeout_seconds,
        max_attempts=request.max_attempts or settings.max_attempts,
        tags=request.tags,
        queue=request.queue,
        priority=request.priority,
        use_cache=request.cache,
        required_memory_bytes=CHILD_BYTES + SOURCE_COPIES * source.size_bytes,
        input_sha256=input_digest(recipe, source.sha256, data.sha256),
    )
    if order.required_memory_bytes > LARGE_BYTES:
        _demand_memory(sessions, order)
    return order


def advice(sessions: Sessions, order: Order) -> list[Note]:
    """Advice on a request that is valid."""
    data = _files(sessions, order.account_id, order.recipe)[order.recipe.data.artifact]
    return notes(order.recipe, data.summary, data.format)


def _demand_memory(sessions: Sessions, order: Order) -> None:
    with transaction(sessions) as session:
        workers = alive(session)
    asked = (order.queue, order.recipe.requirements())
    able = [worker for worker in workers if waiting_reason([worker], *asked, memory_bytes=0) is None]
    if able and waiting_reason(able, *asked, memory_bytes=order.required_memory_bytes) is not None:
        largest = max(worker.memory_bytes for worker in able)
        raise ModelTooLarge(
            f"the job needs about {order.required_memory_bytes / 2**30:.1f} GiB of memory; the largest worker has "
            f"{largest / 2**30:.1f} GiB",
            hint="Send a smaller model, or have a larger worker started.",
        )


def outlook(sessions: Sessions, order: Order) -> tuple[int, Reason | None]:
    """How many live workers can run an order, and why it would wait if none can."""
    with transaction(sessions) as session:
        workers = alive(session)
    asked = (order.queue, order.recipe.requirements(), order.required_memory_bytes)
    reasons = [waiting_reason([worker], *asked) for worker in workers]
    return reasons.count(None), waiting_reason(workers, *asked)


FILES = text("""
    SELECT id, format, status, size_bytes, sha256, CASE WHEN id = :data_id THEN summary END AS summary FROM artifacts
    WHERE id IN (:source_id, :data_id) AND account_id = :account_id AND role = :role
""")


def _files(sessions: Sessions, account_id: UUID, recipe: Recipe) -> dict[UUID, Any]:
    """The recipe's files by id, with the header's summary of the data set only."""
    ids = {"source_id": recipe.source.artifact_id, "data_id": recipe.data.artifact}
    with reads(sessions) as connection:
        rows = connection.execute(FILES, {**ids, "account_id": account_id, "role": ROLE})
        return {row.id: row for row in rows}


def _demand(files: dict[UUID, Any], artifact_id: UUID, location: str, formats: tuple[str, ...]) -> Any:
    file = files.get(artifact_id)
    if file is None:
        message = f"there is no upload {artifact_id}"
        raise NotFound(message, errors=[{"location": location, "message": message}])
    if file.status != "ready":
        message = f"upload {artifact_id} is not complete"
        hint = f"Send its bytes, then POST /v1/uploads/{artifact_id}/complete."
        raise ArtifactNotReady(message, hint=hint, errors=[{"location": location, "message": message}])
    if file.format not in formats:
        message = f"{location} must be a file in {' or '.join(formats)} format, not {file.format}"
        raise InvalidRecipe(message, errors=[{"location": location, "message": message}])
    return file
