"""Files: uploads that a client announces and completes, and what a job leaves for download. No byte passes here."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Body, Path, Request, Response
from fastapi.responses import RedirectResponse

from api.deps import AccountDep, JobId, SessionsDep, SettingsDep, StorageDep
from api.errors import GUARDED, OWNED, problems
from api.examples import AN_UPLOAD
from shared import browse, models, uploads
from shared.errors import (
    ArtifactDamaged,
    DigestMismatch,
    InvalidFile,
    StorageQuotaReached,
    UnsafeFormat,
    UploadIncomplete,
    UploadTooLarge,
)
from shared.schemas import Artifact, ArtifactList, Upload, UploadPart, UploadRequest
from shared.settings import Settings
from shared.storage import Storage

router = APIRouter(prefix="/v1", tags=["files"])

UploadId = Annotated[UUID, Path(description="The upload's id.")]
UploadBody = Annotated[
    UploadRequest, Body(openapi_examples={"weights": {"summary": "A network's weights", "value": AN_UPLOAD}})
]


@router.post(
    "/uploads",
    status_code=201,
    summary="Announce a file",
    operation_id="begin_upload",
    responses={
        200: {"model": Upload, "description": "The account has this very file, or has begun to send it."},
        **problems(*GUARDED, UploadTooLarge, StorageQuotaReached),
    },
)
def begin(
    announced: UploadBody,
    response: Response,
    account_id: AccountDep,
    sessions: SessionsDep,
    storage: StorageDep,
    settings: SettingsDep,
) -> Upload:
    """Tells where to PUT the file's bytes, in one part or several. A file that is there is not sent again."""
    artifact, is_new = uploads.begin(sessions, storage, settings, account_id, announced)
    response.status_code = 201 if is_new else 200
    return _view(artifact, storage, settings)


@router.get(
    "/uploads/{upload_id}", summary="Get an upload", operation_id="get_upload", responses=problems(*OWNED)
)
def get(
    upload_id: UploadId, account_id: AccountDep, sessions: SessionsDep, storage: StorageDep, settings: SettingsDep
) -> Upload:
    """Where an upload stands, with fresh URLs while its bytes are still to be sent."""
    return _view(uploads.find(sessions, account_id, upload_id), storage, settings)


@router.post(
    "/uploads/{upload_id}/complete",
    summary="Complete an upload",
    operation_id="complete_upload",
    responses=problems(*OWNED, UploadIncomplete, DigestMismatch, UnsafeFormat, InvalidFile),
)
def complete(
    upload_id: UploadId, account_id: AccountDep, sessions: SessionsDep, storage: StorageDep, settings: SettingsDep
) -> Upload:
    """Checks size, sha256 and header. A file that is refused is deleted; completing again changes nothing."""
    return _view(uploads.complete(sessions, storage, account_id, upload_id), storage, settings)


@router.get(
    "/jobs/{job_id}/artifacts", summary="List a job's files", operation_id="list_artifacts", responses=problems(*OWNED)
)
def list_artifacts(job_id: JobId, request: Request, account_id: AccountDep, sessions: SessionsDep) -> ArtifactList:
    """Oldest first: what each stage left, the logs, and the report."""
    return ArtifactList(items=[_file(request, found) for found in browse.artifacts(sessions, account_id, job_id)])


@router.get(
    "/jobs/{job_id}/artifacts/{name}",
    status_code=307,
    summary="Download a job's file",
    operation_id="get_artifact",
    response_class=RedirectResponse,
    responses={
        307: {"headers": {"Location": {"schema": {"type": "string"}}}, "description": "To where the bytes are."},
        **problems(*OWNED, ArtifactDamaged),
    },
)
def download(
    job_id: JobId,
    name: Annotated[str, Path(max_length=200, pattern=r"^[^/\\\x00-\x1f]+$", description="The file's name.")],
    account_id: AccountDep,
    sessions: SessionsDep,
    storage: StorageDep,
) -> RedirectResponse:
    """Redirects to a URL that gives the bytes for a while; compare them with the sha256 that the list tells."""
    found = browse.artifact(sessions, account_id, job_id, name)
    if not storage.holds(found):
        raise ArtifactDamaged(hint="Run the job again: POST /v1/jobs/{id}/retry.")
    return RedirectResponse(storage.presign_get(found.key, found.name), status_code=307)


def _view(artifact: models.Artifact, storage: Storage, settings: Settings) -> Upload:
    parts = uploads.parts(artifact, settings.upload_part_bytes)
    facts = {name: getattr(artifact, name) for name in Upload.model_fields if name != "parts"}
    sent = [
        UploadPart(number=number, url=_url(artifact, storage, number, size_bytes), offset=offset, size_bytes=size_bytes)
        for number, offset, size_bytes in parts
    ]
    return Upload.model_validate({**facts, "parts": sent})


def _url(artifact: models.Artifact, storage: Storage, number: int, size_bytes: int) -> str:
    if artifact.multipart_id is None:
        return storage.presign_put(artifact.key, size_bytes)
    return storage.presign_part(artifact.key, artifact.multipart_id, number)


def _file(request: Request, found: models.Artifact) -> Artifact:
    named = ("name", "role", "format", "attempt", "sha256", "size_bytes", "created_at")
    facts = {name: getattr(found, name) for name in named}
    url = f"{request.base_url}v1/jobs/{found.job_id}/artifacts/{found.name}"
    return Artifact.model_validate({**facts, "stage": found.stage_position, "url": url})
