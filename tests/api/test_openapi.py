"""The API against its own description: every route, with input that it describes and input that it does not."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case
from schemathesis.config import SchemathesisConfig
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance

from api.examples import A_JOB
from api.main import create_app
from shared.schemas import JobRequest
from shared.settings import Settings
from tests.api.desk import Desk

DESCRIBED = create_app(Settings(local=True)).openapi()
OPERATIONS = [
    (f"{method.upper()} {path}", operation)
    for path, methods in DESCRIBED["paths"].items()
    for method, operation in methods.items()
]

# What these take cannot all be told by a schema: how stages chain, whose signature a cursor bears, what is too large.
STRICTER = {
    *("POST /v1/jobs", "POST /v1/jobs/validate", "POST /v1/uploads"),
    *("GET /v1/jobs", "GET /v1/jobs/{job_id}/events"),
}


@pytest.fixture
def job(desk: Desk) -> dict[str, Any]:
    return desk.submit()


def test_every_route_keeps_its_contract(desk: Desk, job: dict[str, Any], subtests: pytest.Subtests) -> None:
    config = SchemathesisConfig.from_dict({"base-url": desk.url})
    schema = schemathesis.openapi.from_dict(desk.app.openapi(), config=config)
    for label, _ in OPERATIONS:
        with subtests.test(label):
            _try_out(schema, label, job["id"], {"Authorization": f"Bearer {desk.key}"})


def _try_out(schema: BaseSchema, label: str, job_id: str, headers: dict[str, str]) -> None:
    operation = schema.find_operation_by_label(label)
    assert operation is not None
    excused: list[Any] = [positive_data_acceptance] if label in STRICTER else []

    @given(case=operation.as_strategy())
    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def keeps(case: Case[Any]) -> None:
        _aim(case, job_id)
        case.call_and_validate(headers=headers, excluded_checks=excused)

    keeps()


def _aim(case: Case[Any], job_id: str) -> None:
    """Let half of the calls meet a job that is there, and none wait long."""
    if "job_id" in case.path_parameters and len(str(case.path_parameters["job_id"])) % 2 == 0:
        case.path_parameters["job_id"] = job_id
    if isinstance(case.query.get("wait"), int | float):
        case.query["wait"] = min(case.query["wait"], 0.05)


def test_the_description_of_every_route_is_complete() -> None:
    ids = [operation["operationId"] for _, operation in OPERATIONS]
    assert len(set(ids)) == len(ids) == 20
    for label, operation in OPERATIONS:
        assert operation["summary"], label
        failures = {status: told for status, told in operation["responses"].items() if int(status) >= 400}
        for status, told in failures.items():
            media_types = list(told["content"])
            expected = ["application/json"] if label == "GET /readyz" else ["application/problem+json"]
            assert media_types == expected, (label, status)
        if "security" in operation:
            assert {"401", "503"} <= set(failures), label
        if "{" in label:
            assert "404" in failures, label


def test_the_key_is_part_of_the_description() -> None:
    (scheme,) = DESCRIBED["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    unguarded = {label for label, operation in OPERATIONS if "security" not in operation}
    assert unguarded == {"GET /healthz", "GET /readyz", "GET /v1/version"}


def test_the_example_of_a_job_is_one_that_would_be_taken() -> None:
    assert JobRequest.model_validate(A_JOB).recipe.requirements()
    for path in ("/v1/jobs", "/v1/jobs/validate"):
        body = DESCRIBED["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert [example["value"] for example in body["examples"].values()] == [A_JOB]


def test_every_reference_leads_somewhere() -> None:
    schemas = DESCRIBED["components"]["schemas"]
    pending: list[Any] = [DESCRIBED]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            reference = item.get("$ref")
            if isinstance(reference, str):
                assert reference.removeprefix("#/components/schemas/") in schemas, reference
            pending += item.values()
        elif isinstance(item, list):
            pending += item
