"""Jobs: submit, validate, get, list, cancel, retry, and the report."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Body, Header, Query, Request, Response
from itsdangerous import BadSignature, URLSafeSerializer
from sqlalchemy import RowMapping

from api.deps import AccountDep, DoorbellDep, JobId, JobMoved, SessionsDep, SettingsDep, etag, matches
from api.errors import GUARDED, OWNED, problems
from api.examples import A_JOB
from shared import browse, lifecycle, repeats
from shared.admission import admit, advice, outlook
from shared.errors import (
    ArtifactNotReady,
    CalibrationMissing,
    Conflict,
    DataMismatch,
    EvaluationEmpty,
    IdempotencyConflict,
    InvalidCursor,
    InvalidRecipe,
    ModelTooLarge,
    ReportNotReady,
    TooManyJobs,
)
from shared.report import Report
from shared.schemas import Job, JobList, JobRequest, JobStatus, StateReason, Tag, Validation
from shared.settings import Settings
from shared.tables import to_csv, to_markdown

POLL_SECONDS = "2"  # told to clients that ask again and again; `wait` and the event stream are better

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="The same key with the same body gives the same job, once."),
]
JobBody = Annotated[JobRequest, Body(openapi_examples={"segmentation": {"summary": "int8 U-Net", "value": A_JOB}})]
REFUSALS = (*OWNED, InvalidRecipe, DataMismatch, EvaluationEmpty, CalibrationMissing, ArtifactNotReady, ModelTooLarge)
ACCEPTED: dict[str, Any] = {
    "description": "The job is in the ledger; a worker will take it.",
    "headers": {"Location": {"schema": {"type": "string"}}, "Retry-After": {"schema": {"type": "integer"}}},
}


@router.post(
    "",
    status_code=202,
    summary="Submit a job",
    operation_id="submit_job",
    responses={202: ACCEPTED, **problems(*REFUSALS, IdempotencyConflict, TooManyJobs)},
)
def submit(
    order: JobBody,
    request: Request,
    response: Response,
    account_id: AccountDep,
    sessions: SessionsDep,
    settings: SettingsDep,
    doorbell: DoorbellDep,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Validates the whole order, writes it to the ledger and answers; nothing is written if anything is wrong."""
    admitted = admit(sessions, settings, account_id, order)
    job_id, is_new = lifecycle.submit(sessions, admitted, idempotency_key, settings.max_active_jobs_per_account)
    if is_new:
        doorbell.ring(admitted.queue)
    return _accepted(request, response, browse.job(sessions, account_id, job_id))


@router.post(
    "/validate", summary="Check a job without submitting it", operation_id="validate_job", responses=problems(*REFUSALS)
)
def validate(order: JobBody, account_id: AccountDep, sessions: SessionsDep, settings: SettingsDep) -> Validation:
    """The same checks and the same problems as a submit; says whether a live worker can run the job, and what in the
    recipe may surprise: goals that are assumed, and losses that the evaluation part is too small to show.
    """
    admitted = admit(sessions, settings, account_id, order)
    num_capable, reason = outlook(sessions, admitted)
    return Validation(
        requires=admitted.recipe.requirements(),
        required_memory_bytes=admitted.required_memory_bytes,
        capable_workers=num_capable,
        waiting_reason=StateReason.model_validate(reason.as_dict()) if reason else None,
        notes=advice(sessions, admitted),
    )


@router.get("", summary="List jobs", operation_id="list_jobs", responses=problems(*GUARDED, InvalidCursor))
def list_jobs(
    request: Request,
    account_id: AccountDep,
    sessions: SessionsDep,
    settings: SettingsDep,
    status: Annotated[list[JobStatus], Query(description="Only jobs in one of these.")] = [],  # noqa: B006
    tag: Annotated[list[Tag], Query(description="Only jobs that have all of these.")] = [],  # noqa: B006
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(max_length=500, description="`next_cursor` of the page before.")] = None,
) -> JobList:
    """Newest first. A cursor belongs to the account and to the filters that it was given for."""
    signer = _cursor_signer(settings, account_id, status, tag)
    before = _read_cursor(signer, cursor) if cursor is not None else None
    found = browse.jobs(sessions, account_id, statuses=status, tags=tag, before=before, limit=limit + 1)
    page = [_view(request, row) for row in found[:limit]]
    more = len(found) > limit
    return JobList(items=page, next_cursor=signer.dumps(page[-1].id.hex) if more else None)


@router.get(
    "/{job_id}",
    summary="Get a job, waiting for a change if asked",
    operation_id="get_job",
    dependencies=[JobMoved],
    response_model=Job,
    responses={
        200: {"headers": {"ETag": {"schema": {"type": "string"}}}},
        304: {"description": "The job is as the ETag in If-None-Match says."},
        **problems(*OWNED),
    },
)
def get(
    job_id: JobId,
    request: Request,
    response: Response,
    account_id: AccountDep,
    sessions: SessionsDep,
    if_none_match: Annotated[str | None, Header(description="The ETag of the state that you know.")] = None,
) -> Job | Response:
    """With `wait`, answers once the job is no longer what If-None-Match says, has ended, or the time is up."""
    job = _view(request, browse.job(sessions, account_id, job_id))
    tag = etag(job.last_sequence)
    if matches(if_none_match, tag):
        return Response(status_code=304, headers={"ETag": tag})
    response.headers["ETag"] = tag
    return job


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    operation_id="cancel_job",
    response_model=Job,
    responses={202: {"model": Job, "description": "Asked of the worker that runs it."}, **problems(*OWNED)},
)
def cancel(
    job_id: JobId, request: Request, response: Response, account_id: AccountDep, sessions: SessionsDep
) -> Job:
    """A job that waits ends at once; one that runs is stopped by its worker. Asking again changes nothing."""
    status = lifecycle.cancel(sessions, account_id, job_id)
    response.status_code = 202 if status == "running" else 200
    return _view(request, browse.job(sessions, account_id, job_id))


@router.post(
    "/{job_id}/retry",
    status_code=202,
    summary="Run an ended job again",
    operation_id="retry_job",
    responses={202: ACCEPTED, **problems(*OWNED, Conflict, IdempotencyConflict, TooManyJobs)},
)
def retry(
    job_id: JobId,
    request: Request,
    response: Response,
    account_id: AccountDep,
    sessions: SessionsDep,
    settings: SettingsDep,
    doorbell: DoorbellDep,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """A new job with the same recipe, whose `retry_of` names the old one."""
    limit = settings.max_active_jobs_per_account
    new_id, is_new = repeats.retry(sessions, account_id, job_id, idempotency_key, limit)
    job = browse.job(sessions, account_id, new_id)
    if is_new:
        doorbell.ring(job["queue"])
    return _accepted(request, response, job)


@router.get(
    "/{job_id}/report",
    summary="Get a job's report",
    operation_id="get_report",
    response_model=Report,
    responses={
        200: {"content": {"text/csv": {"schema": {"type": "string"}}, "text/markdown": {"schema": {"type": "string"}}}},
        **problems(*OWNED, ReportNotReady),
    },
)
def report(
    job_id: JobId,
    account_id: AccountDep,
    sessions: SessionsDep,
    format: Annotated[Literal["json", "csv", "md"], Query(description="All of it, its table, or a page.")] = "json",
) -> Report | Response:
    """Every figure with its method, every stage against the baseline, and the verdict on the goals."""
    found = browse.report(sessions, account_id, job_id)
    if format == "csv":
        return Response(to_csv(found), media_type="text/csv")
    if format == "md":
        return Response(to_markdown(found), media_type="text/markdown")
    return found


# ---------------------------------------------------------------- how a job is shown


def _accepted(request: Request, response: Response, row: RowMapping) -> Job:
    job = _view(request, row)
    response.headers["Location"] = job.url
    response.headers["Retry-After"] = POLL_SECONDS
    response.headers["ETag"] = etag(job.last_sequence)
    return job


def _view(request: Request, row: RowMapping) -> Job:
    return Job.model_validate({**row, "url": f"{request.base_url}v1/jobs/{row['id']}"})


def _cursor_signer(
    settings: Settings, account_id: UUID, statuses: list[JobStatus], tags: list[Tag]
) -> URLSafeSerializer:
    """Signs cursors so that they hold for one account and one set of filters."""
    bound_to = json.dumps([str(account_id), sorted(statuses), sorted(tags)])
    salt = "jobs." + hashlib.sha256(bound_to.encode()).hexdigest()
    return URLSafeSerializer(settings.secret_key.get_secret_value(), salt=salt)


def _read_cursor(signer: URLSafeSerializer, cursor: str) -> UUID:
    try:
        return UUID(signer.loads(cursor))
    except BadSignature:
        raise InvalidCursor(hint="Send next_cursor as it came, with the same filters.") from None
