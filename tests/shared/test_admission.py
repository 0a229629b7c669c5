"""Whether an order can be taken, asked of the ledger without HTTP."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event

from shared import accounts, workers
from shared.admission import CHILD_BYTES, SOURCE_COPIES, admit, outlook
from shared.db import Sessions, transaction
from shared.errors import ArtifactNotReady, CalibrationMissing, InvalidRecipe, ModelTooLarge, NotFound
from shared.models import Artifact
from shared.schemas import JobRequest
from shared.settings import Settings
from shared.workers import Registration

IMAGES = {"dtype": "F32", "shape": [4, 1, 8, 8]}
MASKS = {"dtype": "I32", "shape": [4, 8, 8]}
FITTING = {
    f"{part}.{name}": entry
    for part in ("calibration", "evaluation")
    for name, entry in (("images", IMAGES), ("masks", MASKS))
}


@pytest.fixture
def account_id(sessions: Sessions) -> UUID:
    return accounts.ensure_account(sessions, "ours")


def test_an_order_carries_what_was_asked_and_the_defaults(
    sessions: Sessions, settings: Settings, account_id: UUID
) -> None:
    source, data = _file(sessions, account_id, size_bytes=1000), _file(sessions, account_id, FITTING)
    order = admit(sessions, settings, account_id, _request(source, data, tags=["a"], priority=3, max_attempts=2))
    assert (order.account_id, order.tags, order.priority, order.max_attempts) == (account_id, ["a"], 3, 2)
    assert order.use_cache
    assert not admit(sessions, settings, account_id, _request(source, data, cache=False)).use_cache
    assert order.timeout_seconds == settings.job_timeout_seconds
    assert order.required_memory_bytes == CHILD_BYTES + 1000 * SOURCE_COPIES


def test_admitting_is_one_query(sessions: Sessions, settings: Settings, account_id: UUID) -> None:
    request = _request(_file(sessions, account_id), _file(sessions, account_id, FITTING))
    statements: list[str] = []
    engine = sessions.kw["bind"]
    event.listen(engine, "before_cursor_execute", lambda *facts: statements.append(facts[2]))
    admit(sessions, settings, account_id, request)
    assert len(statements) == 1


def test_weights_are_no_data_set(sessions: Sessions, settings: Settings, account_id: UUID) -> None:
    same = _file(sessions, account_id)
    with pytest.raises(CalibrationMissing, match=r"calibration\.images"):
        admit(sessions, settings, account_id, _request(same, same))


def test_a_foreign_file_reads_as_missing(sessions: Sessions, settings: Settings, account_id: UUID) -> None:
    stranger = accounts.ensure_account(sessions, "stranger")
    mine, theirs = _file(sessions, account_id), _file(sessions, stranger, FITTING)
    for missing in (theirs, uuid4()):
        with pytest.raises(NotFound) as caught:
            admit(sessions, settings, account_id, _request(mine, missing))
        assert caught.value.errors == [
            {"location": "recipe.data.artifact", "message": f"there is no upload {missing}"}
        ]


def test_a_file_that_a_job_left_is_no_upload(sessions: Sessions, settings: Settings, account_id: UUID) -> None:
    left, data = _file(sessions, account_id, role="model"), _file(sessions, account_id, FITTING)
    with pytest.raises(NotFound):
        admit(sessions, settings, account_id, _request(left, data))


def test_a_file_that_is_not_complete_is_told_apart(sessions: Sessions, settings: Settings, account_id: UUID) -> None:
    pending, data = _file(sessions, account_id, status="pending"), _file(sessions, account_id, FITTING)
    with pytest.raises(ArtifactNotReady, match="not complete") as caught:
        admit(sessions, settings, account_id, _request(pending, data))
    assert f"/v1/uploads/{pending}/complete" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("source_format", "data_format", "message"),
    [
        ("onnx", "safetensors", "recipe.source.weights must be a file in safetensors format, not onnx"),
        ("safetensors", "onnx", "recipe.data.artifact must be a file in safetensors or zip format, not onnx"),
    ],
)
def test_a_file_of_another_format_is_refused(
    sessions: Sessions, settings: Settings, account_id: UUID, source_format: str, data_format: str, message: str
) -> None:
    source = _file(sessions, account_id, format=source_format)
    data = _file(sessions, account_id, FITTING, format=data_format)
    with pytest.raises(InvalidRecipe, match=message):
        admit(sessions, settings, account_id, _request(source, data))


def test_data_is_held_against_the_stages(sessions: Sessions, settings: Settings, account_id: UUID) -> None:
    only_evaluation = {name: entry for name, entry in FITTING.items() if name.startswith("evaluation")}
    source, data = _file(sessions, account_id), _file(sessions, account_id, only_evaluation)
    with pytest.raises(CalibrationMissing):
        admit(sessions, settings, account_id, _request(source, data))
    half = [{"kind": "export_onnx"}, {"kind": "quantize", "scheme": "fp16"}]
    assert admit(sessions, settings, account_id, _request(source, data, stages=half))


def test_the_outlook_counts_able_workers_and_says_why_there_is_none(
    sessions: Sessions, settings: Settings, account_id: UUID
) -> None:
    request = _request(_file(sessions, account_id), _file(sessions, account_id, FITTING))
    order = admit(sessions, settings, account_id, request)
    assert outlook(sessions, order)[0] == 0
    able = order.recipe.requirements()
    for name, capabilities, memory_bytes in (("a", able, 2**40), ("b", able[1:], 2**40), ("c", able, 2**20)):
        registration = Registration(name, "h", ["default"], capabilities, 2, memory_bytes, {})
        workers.register(sessions, registration)
    assert outlook(sessions, order) == (1, None)
    workers.retire(sessions, "a")
    num_able, reason = outlook(sessions, order)
    assert num_able == 0
    assert reason is not None
    assert "GiB of memory" in reason.message


def test_a_model_larger_than_every_able_workers_memory_is_refused(
    sessions: Sessions, settings: Settings, account_id: UUID
) -> None:
    request = _request(_file(sessions, account_id, size_bytes=8 * 2**30), _file(sessions, account_id, FITTING))
    able = request.recipe.requirements()
    assert admit(sessions, settings, account_id, request)  # no worker is there: one that is large enough may come
    workers.register(sessions, Registration("small", "h", ["default"], able, 2, 16 * 2**30, {}))
    workers.register(sessions, Registration("large, but not able", "h", ["default"], [], 2, 2**40, {}))
    with pytest.raises(ModelTooLarge, match=r"needs about 33\.0 GiB of memory; the largest worker has 16\.0 GiB"):
        admit(sessions, settings, account_id, request)
    workers.register(sessions, Registration("large", "h", ["default"], able, 2, 2**40, {}))
    assert admit(sessions, settings, account_id, request)


def _request(source: UUID, data: UUID, stages: list[dict[str, Any]] | None = None, **facts: Any) -> JobRequest:
    chain = [{"kind": "export_onnx"}, {"kind": "quantize"}, {"kind": "build_engine"}]
    recipe = {
        "source": {"architecture": {"library": "torchvision", "name": "resnet18"}, "weights": str(source)},
        "task": {"kind": "segmentation", "classes": ["a", "b"]},
        "data": {"artifact": str(data)},
        "stages": stages or chain,
    }
    return JobRequest.model_validate({"name": "n", "recipe": recipe, **facts})


def _file(sessions: Sessions, account_id: UUID, tensors: dict[str, Any] | None = None, **facts: Any) -> UUID:
    """An upload's row; its bytes are not needed here."""
    given = {"role": "upload", "format": "safetensors", "size_bytes": 10, "status": "ready", **facts}
    row = Artifact(account_id=account_id, name="f", key=uuid4().hex, sha256="0" * 64, **given)
    row.summary = {"tensors": tensors or {}}
    with transaction(sessions) as session:
        session.add(row)
    return row.id
