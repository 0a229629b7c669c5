"""What can go wrong on the user's side of the service, each with the exit status that the `burnish` command ends with.

A class's docstring is its default message. 1: the job failed or was cancelled; 2: the request or the files are at
fault; 3: the service is, or cannot be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.schemas import FieldError, Problem

if TYPE_CHECKING:
    from burnish.client import Job


class BurnishError(Exception):
    """Burnish could not do what was asked."""

    exit_status = 3
    code = "error"

    def __init__(
        self, detail: str | None = None, *, hint: str | None = None, errors: Sequence[FieldError] = ()
    ) -> None:
        self.detail = detail or (self.__doc__ or "").strip()
        self.hint = hint
        self.errors = list(errors)
        super().__init__(self.detail)


class BadInput(BurnishError):
    """The job file, or a file that it names, cannot be used."""

    exit_status = 2
    code = "bad_input"


class NoService(BurnishError):
    """No Burnish service is configured, and none runs here."""

    exit_status = 2
    code = "no_service"


class Unreachable(BurnishError):
    """The service cannot be reached."""

    code = "unreachable"


class BrokenDownload(BurnishError):
    """The bytes that arrived are not those that the service recorded."""

    code = "broken_download"


class ServiceSaidNo(BurnishError):
    """The service refused the request."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail, hint=problem.hint, errors=problem.errors)
        self.problem = problem
        self.code = problem.code
        self.exit_status = 2 if problem.fault == "user" else 3


class JobFailed(BurnishError):
    """The job failed or was cancelled; `job` is the job as it ended."""

    exit_status = 1
    code = "job_failed"

    def __init__(self, job: Job) -> None:
        reason = job.view.state_reason
        told = f": {reason.message}" if reason else ""
        super().__init__(f"The job {job.id} {_ENDED[job.status]}{told}", hint=reason.hint if reason else None)
        self.job = job


_ENDED = {"failed": "failed", "cancelled": "was cancelled"}
