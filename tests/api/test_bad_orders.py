"""Orders that cannot be met: each gets a sentence, the right status and code, and leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import func, select

from shared.db import transaction
from shared.models import IdempotencyKey, Job
from tests.api.desk import Desk, announce, data, recipe, weights

Body = dict[str, Any]


def _set(path: str, value: Any) -> Callable[[Body], None]:
    """An edit of a body: `recipe.stages.0.kind` set to a value."""

    def edit(body: Body) -> None:
        *parents, last = path.split(".")
        place: Any = body
        for step in parents:
            place = place[int(step)] if isinstance(place, list) else place[step]
        place[int(last) if isinstance(place, list) else last] = value

    return edit


# What is wrong, how the body says it, and the code, the place and the words of the answer.
WRONG: list[tuple[str, Callable[[Body], None], str, str, str]] = [
    (
        "stages that do not chain",
        _set("recipe.stages", [{"kind": "build_engine"}]),
        "invalid_recipe",
        "recipe",
        "stage 0 (build_engine) needs onnx, but holds torch: put an export_onnx stage before it",
    ),
    ("no stages", _set("recipe.stages", []), "invalid_recipe", "recipe.stages", "at least 1 item"),
    (
        "an unknown stage",
        _set("recipe.stages.0", {"kind": "sparkle"}),
        "invalid_recipe",
        "recipe.stages.0",
        "'export_onnx', 'quantize'",
    ),
    (
        "an unknown word in a stage",
        _set("recipe.stages.1.colour", "red"),
        "invalid_recipe",
        "recipe.stages.1.colour",
        "Extra inputs are not permitted",
    ),
    (
        "a scheme that is not there",
        _set("recipe.stages.1.scheme", "int4"),
        "invalid_recipe",
        "recipe.stages.1.scheme",
        "'int8_static', 'int8_dynamic' or 'fp16'",
    ),
    (
        "an unknown library",
        _set("recipe.source.architecture.library", "os"),
        "invalid_recipe",
        "recipe.source.architecture.library",
        "'torchvision', 'monai' or 'timm'",
    ),
    (
        "two quantizations",
        _set("recipe.stages", [{"kind": "export_onnx"}, {"kind": "quantize"}, {"kind": "quantize"}]),
        "invalid_recipe",
        "recipe",
        "a model is quantized once",
    ),
    (
        "a goal of another task",
        _set("recipe.goals", [{"metric": "top1", "kind": "max_drop", "value": 0.01}]),
        "invalid_recipe",
        "recipe",
        "top1 is not a metric of segmentation",
    ),
    (
        "a goal in percent",
        _set("recipe.goals", [{"metric": "dice", "kind": "max_drop", "value": 5}]),
        "invalid_recipe",
        "recipe.goals.0",
        "1 point is 0.01",
    ),
    (
        "two classes of one name",
        _set("recipe.task.classes", ["a", "a"]),
        "invalid_recipe",
        "recipe.task",
        "two classes have the same name",
    ),
    ("a misspelt field", _set("priorty", 1), "invalid_request", "priorty", "Extra inputs are not permitted"),
    ("a queue with spaces", _set("queue", "my queue"), "invalid_request", "queue", "should match pattern"),
    ("no name", _set("name", ""), "invalid_request", "name", "at least 1 character"),
    ("a NUL in the name", _set("name", "a\0b"), "invalid_request", "", "has a NUL character in it"),
    (
        "a lone surrogate in an argument",
        _set("recipe.source.architecture.arguments", {"x": ["\ud83d"]}),
        "invalid_request",
        "",
        "half of a surrogate pair",
    ),
    (
        "infinity in an argument",
        _set("recipe.source.architecture.arguments", {"x": float("inf")}),
        "invalid_request",
        "",
        "inf is not a number that JSON has",
    ),
    ("NaN as a scale", _set("recipe.data.preprocessing", {"scale": float("nan")}), "invalid_request", "", "nan is not"),
    ("an id that is none", _set("recipe.data.artifact", "x"), "invalid_recipe", "recipe.data.artifact", "valid UUID"),
]


def test_an_order_that_is_wrong_is_refused_where_it_is_wrong(desk: Desk, subtests: pytest.Subtests) -> None:
    right = desk.order()
    for what, edit, code, location, words in WRONG:
        body = copy.deepcopy(right)
        edit(body)
        for path in ("/v1/jobs", "/v1/jobs/validate"):
            with subtests.test(what, path=path):
                refused = desk.post(path, body, **{"Idempotency-Key": "k"})
                problem = refused.json()
                assert (refused.status_code, problem["code"], problem["fault"]) == (422, code, "user"), problem
                assert refused.headers["Content-Type"] == "application/problem+json"
                assert words in problem["detail"]
                assert location in [error["location"] for error in problem["errors"]]
                assert "Value error" not in refused.text
    _assert_nothing_written(desk)
    assert desk.submit(right)["status"] == "queued"


# What the files are, the order's parts and stages, and the answer.
MISFITS: list[tuple[str, Callable[[Desk], Body], int, str, str]] = [
    (
        "no calibration part",
        lambda desk: recipe(desk.upload(weights(), "safetensors"), desk.upload(data(("evaluation",)), "safetensors")),
        422,
        "calibration_missing",
        "Static int8 quantization needs calibration data",
    ),
    (
        "no evaluation part",
        lambda desk: recipe(desk.upload(weights(), "safetensors"), desk.upload(data(("calibration",)), "safetensors")),
        422,
        "evaluation_empty",
        "no evaluation samples",
    ),
    (
        "fewer masks than images",
        lambda desk: recipe(desk.upload(weights(), "safetensors"), desk.upload(data(num_masks=3), "safetensors")),
        422,
        "data_mismatch",
        "images has 4 samples, but",
    ),
    (
        "weights that are not there",
        lambda desk: recipe(str(uuid4()), desk.upload(data(), "safetensors")),
        404,
        "not_found",
        "there is no upload",
    ),
    (
        "data that is another account's",
        lambda desk: recipe(desk.upload(weights(), "safetensors"), _of_a_stranger(desk)),
        404,
        "not_found",
        "there is no upload",
    ),
    (
        "weights that were announced only",
        lambda desk: recipe(_announced(desk), desk.upload(data(), "safetensors")),
        409,
        "artifact_not_ready",
        "is not complete",
    ),
    (
        "weights as an onnx source",
        lambda desk: {
            **recipe(str(uuid4()), desk.upload(data(), "safetensors")),
            "source": {"onnx": desk.upload(weights(), "safetensors")},
            "stages": [{"kind": "quantize"}],
        },
        422,
        "invalid_recipe",
        "recipe.source.onnx must be a file in onnx format, not safetensors",
    ),
]


@pytest.mark.parametrize(("what", "make", "status", "code", "words"), MISFITS, ids=[row[0] for row in MISFITS])
def test_an_order_whose_files_do_not_fit_is_refused(
    desk: Desk, what: str, make: Callable[[Desk], Body], status: int, code: str, words: str
) -> None:
    body = {"name": "unet", "recipe": make(desk)}
    for path in ("/v1/jobs", "/v1/jobs/validate"):
        refused = desk.post(path, body, **{"Idempotency-Key": "k"})
        assert (refused.status_code, refused.json()["code"]) == (status, code), refused.text
        assert words in refused.json()["detail"]
    _assert_nothing_written(desk)


def test_a_body_that_is_no_json_is_refused(desk: Desk, subtests: pytest.Subtests) -> None:
    for content, status in (
        (b"{", 422),
        (b"", 422),
        (b"[]", 422),
        (b"\xff\xfe", 422),
        (b"[" * 100_000, 400),
        (b'{"name": ' + b"9" * 5000 + b"}", 400),
        (b'"' + b"x" * 2**20 + b'"', 413),
    ):
        with subtests.test(content=content[:20]):
            refused = desk.client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
            assert refused.status_code == status, refused.text
            assert refused.headers["Content-Type"] == "application/problem+json"
            assert refused.json()["detail"]


def test_parameters_out_of_range_are_refused(desk: Desk, subtests: pytest.Subtests) -> None:
    job = desk.submit()
    for path in (
        *("/v1/jobs?limit=0", "/v1/jobs?limit=101", "/v1/jobs?status=lost", "/v1/jobs?tag=%00", "/v1/jobs/nothing"),
        *(f"/v1/jobs/{job['id']}?wait=61", f"/v1/jobs/{job['id']}?wait=nan", f"/v1/jobs/{job['id']}/events?after=-1"),
        *(f"/v1/jobs/{job['id']}/events?after={2**31}", f"/v1/jobs/{job['id']}/logs?attempt=0"),
        *(f"/v1/jobs/{job['id']}/report?format=pdf", f"/v1/jobs/{job['id']}/artifacts/%00"),
    ):
        with subtests.test(path):
            refused = desk.client.get(path)
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request"), refused.text


def test_a_wrong_road_or_method_is_a_problem_too(desk: Desk) -> None:
    missing = desk.client.get("/v1/nothing")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    wrong = desk.client.put("/v1/jobs")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["Allow"]
    for answer in (missing, wrong):
        assert answer.headers["Content-Type"] == "application/problem+json"


def _of_a_stranger(desk: Desk) -> str:
    with desk.stranger() as stranger:
        return Desk(**{**desk.__dict__, "client": stranger}).upload(data(), "safetensors")


def _announced(desk: Desk) -> str:
    return str(desk.client.post("/v1/uploads", json=announce(weights(), "safetensors")).json()["id"])


def _assert_nothing_written(desk: Desk) -> None:
    with transaction(desk.sessions) as session:
        for table in (Job, IdempotencyKey):
            assert session.scalar(select(func.count()).select_from(table)) == 0
