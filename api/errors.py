"""How the front desk says no: every error is application/problem+json (RFC 9457)."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from shared.errors import NotFound, ServiceError, StorageUnavailable, Unauthorized, Unavailable, UserError
from shared.log import get_logger
from shared.recipe import stage_kinds
from shared.schemas import FieldError, Problem

MEDIA_TYPE = "application/problem+json"


def add_handlers(app: FastAPI) -> None:
    """Have every error that a route can end in answered as a problem."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)


def problems(*causes: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can fail for these causes, beside those that any route has."""
    told: dict[int | str, dict[str, Any]] = {}
    every: tuple[type[ServiceError], ...] = (*causes, Unavailable)
    for cause in every:
        entry = told.setdefault(cause.status, {"description": "", "content": {MEDIA_TYPE: {"schema": _PROBLEM}}})
        sentences = [entry["description"], f"`{cause.code}`: {(cause.__doc__ or '').strip()}"]
        entry["description"] = "\n\n".join(filter(None, sentences))
        if headers := _HEADERS.get(cause.status):
            entry["headers"] = headers
    return told


# What every route behind an API key can answer.
GUARDED = (Unauthorized, UserError, StorageUnavailable)
OWNED = (*GUARDED, NotFound)

_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    429: {"Retry-After": {"schema": {"type": "integer"}}},
    503: {"Retry-After": {"schema": {"type": "integer"}}},
}


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="burnish"'
    if error.status >= 500:
        get_logger().warning("unavailable", code=error.code, path=request.url.path, cause=repr(error.__cause__))
    problem = _problem(
        request,
        error.status,
        detail=error.detail,
        code=error.code,
        fault=error.fault,
        stage=error.stage,
        hint=error.hint,
        retryable=error.retryable,
        errors=error.errors,
    )
    return _answer(problem, headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [_field_error(entry) for entry in error.errors()]
    first = found[0]
    detail = f"{first.location}: {first.message}" if first.location else first.message
    if len(found) > 1:
        detail += f" (and {len(found) - 1} more)"
    code = "invalid_recipe" if all(entry.location.startswith("recipe") for entry in found) else "invalid_request"
    return _answer(_problem(request, 422, detail=detail, code=code, fault="user", errors=found))


async def _http_error(request: Request, error: Exception) -> Response:
    """Refusals of the framework itself: no such route, a method that it does not have, a body too large or broken."""
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_").replace("-", "_")
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return _answer(_problem(request, error.status_code, detail=detail, code=code, fault="user"), error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    """A bug of ours. The client gets a number to tell us; the trace stays in the log."""
    error_id = uuid4().hex
    get_logger().error("unexpected", error_id=error_id, path=request.url.path, exc_info=error)
    detail = f"Something went wrong on our side. If it happens again, tell us its number: {error_id}."
    return _answer(_problem(request, 500, detail=detail, code=ServiceError.code, fault="platform"))


def _problem(request: Request, status: int, **facts: Any) -> Problem:
    title = HTTPStatus(status).phrase
    return Problem.model_validate(
        {"title": title, "status": status, "instance": request.url.path, "retryable": False, **facts}
    )


def _answer(problem: Problem, headers: Any = None) -> Response:
    return Response(problem.model_dump_json(exclude_none=True), problem.status, headers, MEDIA_TYPE)


def _field_error(entry: dict[str, Any]) -> FieldError:
    if entry["type"] == "json_invalid":
        message = f"The body is not JSON: {entry['ctx']['error']} at character {entry['loc'][-1]}."
        return FieldError(location="", message=message)
    return FieldError(location=_location(entry["loc"]), message=str(entry["msg"]).removeprefix("Value error, "))


def _location(path: Sequence[int | str]) -> str:
    """Where in the request, as its author wrote it: without 'body' and pydantic's names of a union's members."""
    kept: list[str] = []
    for step in map(str, path[1:] if path[:1] == ("body",) else path):
        in_source = kept[-1:] == ["source"] and step in ("torch", "onnx") and step != path[-1]
        in_stage = kept[-2:-1] == ["stages"] and step in stage_kinds()
        if not in_source and not in_stage:
            kept.append(step)
    return ".".join(kept)


