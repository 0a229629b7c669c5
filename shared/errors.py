"""Every way in which the service says no: one class a cause.

A class's docstring is its default message; its status, code and fault stand on the class. The front desk turns
any of them into application/problem+json, the workshop into a job's `state_reason`.
"""

from collections.abc import Sequence
from typing import Any, Literal

Fault = Literal["user", "platform"]


class ServiceError(Exception):
    """The service could not do what was asked."""

    status: int = 500
    code: str = "internal_error"
    fault: Fault = "platform"
    retryable: bool = False
    retry_after_seconds: int | None = None

    def __init__(
        self,
        detail: str | None = None,
        *,
        hint: str | None = None,
        stage: str | None = None,
        errors: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.detail = detail or (self.__doc__ or "").strip()
        self.hint = hint
        self.stage = stage
        self.errors = list(errors)
        super().__init__(self.detail)


class UserError(ServiceError):
    """The request cannot be met as it is."""

    status = 422
    code = "invalid_request"
    fault: Fault = "user"


class Unauthorized(UserError):
    """The API key is missing or not known. Send it as 'Authorization: Bearer <key>'."""

    status = 401
    code = "unauthorized"


class NotFound(UserError):
    """There is no such thing, or it belongs to another account."""

    status = 404
    code = "not_found"


class InvalidRecipe(UserError):
    """The recipe does not hold together."""

    code = "invalid_recipe"


class BackupRefused(UserError):
    """The backup cannot be taken back as it is."""

    code = "backup_refused"


class CalibrationMissing(UserError):
    """Static int8 quantization needs calibration data, and the data set has no calibration part."""

    code = "calibration_missing"


class DataMismatch(UserError):
    """The data set does not fit the task."""

    code = "data_mismatch"


class EvaluationEmpty(UserError):
    """The data set has no evaluation samples, so nothing that is built could be checked."""

    code = "evaluation_empty"


class UnsafeFormat(UserError):
    """The file's format can carry code, so it is not accepted."""

    code = "unsafe_format"


class InvalidFile(UserError):
    """The file is not what its format says."""

    code = "invalid_file"


class DigestMismatch(UserError):
    """The bytes that arrived are not the bytes that were announced."""

    code = "digest_mismatch"


class ModelTooLarge(UserError):
    """The model needs more memory than any worker has."""

    code = "model_too_large"


class UploadIncomplete(UserError):
    """The upload has not arrived, or not all of it."""

    status = 409
    code = "upload_incomplete"


class UploadTooLarge(UserError):
    """The file is larger than this service accepts."""

    status = 413
    code = "upload_too_large"


class ArtifactNotReady(UserError):
    """The artifact was announced, but its upload was not completed."""

    status = 409
    code = "artifact_not_ready"


class ArtifactDamaged(ServiceError):
    """The stored file is not what was recorded any more, so it is not served."""

    code = "artifact_damaged"


class IdempotencyConflict(UserError):
    """This Idempotency-Key was already used for a different request."""

    status = 409
    code = "idempotency_conflict"


class Conflict(UserError):
    """The job's state does not allow this."""

    status = 409
    code = "conflict"


class TooManyJobs(UserError):
    """The account has as many jobs queued or running as it may have."""

    status = 429
    code = "too_many_jobs"
    retryable = True
    retry_after_seconds = 30


class StorageQuotaReached(UserError):
    """The account's uploads would have more bytes than they may have."""

    status = 429
    code = "storage_quota_reached"
    retryable = True
    retry_after_seconds = 600


class ReportNotReady(UserError):
    """The job has no report yet."""

    status = 409
    code = "report_not_ready"


class InvalidCursor(UserError):
    """The cursor was not made by this service for this list."""

    status = 422
    code = "invalid_cursor"


class StageFailed(UserError):
    """The model, the data or the recipe is at fault; another attempt would fail the same way."""

    code = "stage_failed"

    def __init__(self, detail: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(detail, hint=hint)
        if code:
            self.code = code


class Unavailable(ServiceError):
    """A server behind this service does not answer. Try again shortly."""

    status = 503
    code = "unavailable"
    retryable = True
    retry_after_seconds = 2


class TooManyWaiting(Unavailable):
    """As many clients wait for jobs to change as this process can hold. Ask without waiting, or again shortly."""

    code = "too_many_waiting"


class DatabaseUnavailable(Unavailable):
    """The database does not answer. Nothing was changed that you were not told of; try again shortly."""

    code = "database_unavailable"


class CommitUnknown(DatabaseUnavailable):
    """The database went away as this was written, so it may have been. Look, or send the same again with its key."""

    code = "commit_unknown"


class OtherTables(DatabaseUnavailable):
    """The database's tables are of another version of the service, as while it is replaced. Try again shortly."""

    code = "other_tables"


class StorageUnavailable(Unavailable):
    """The object storage does not answer. Try again shortly."""

    code = "storage_unavailable"


class LeaseLost(ServiceError):
    """Another worker holds this job now, or it has ended; this worker's writes are refused."""

    status = 409
    code = "lease_lost"
    retryable = True
