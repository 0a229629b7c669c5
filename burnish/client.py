"""The Python client: submit a job, wait for it, take what it made.

    from burnish import Client

    Client().submit("job.yaml").wait().download("engines")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self
from uuid import UUID, uuid4

from burnish.connection import Connection, find_service
from burnish.download import download_file
from burnish.errors import BadInput, JobFailed
from burnish.events import LAST
from burnish.events import follow as follow_events
from burnish.job_file import draft, format_of, read_job_file
from burnish.upload import OnBytes, upload_file
from shared import schemas
from shared.report import Report, Verdict
from shared.schemas import Event, JobRequest, JobStatus

Order = str | Path | JobRequest | dict[str, Any]
OnEvent = Callable[[Event], None]


class Client:
    """A Burnish service, as one account sees it.

    Without arguments it takes BURNISH_URL and BURNISH_API_KEY, or the local mode that runs here. Every method raises
    the errors of `burnish.errors`: ServiceSaidNo with the service's own words, Unreachable when it does not answer.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout_seconds: float = 60.0) -> None:
        self._connection = Connection(*find_service(url, api_key), timeout_seconds=timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._connection.close()

    @property
    def url(self) -> str:
        return self._connection.url

    def submit(self, order: Order, *, idempotency_key: str | None = None, on_bytes: OnBytes | None = None) -> Job:
        """Upload the local files of an order and submit it; the same key again gives the same job.

        `order` is the path of a job file, a JobRequest, or a mapping like one in which paths (relative to the working
        directory) may stand for artifact ids.
        """
        request = self.prepare(order, on_bytes=on_bytes)
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        body = request.model_dump(mode="json")
        view = self._connection.ask(schemas.Job, "POST", "/v1/jobs", json=body, headers=headers)
        return Job(self._connection, view)

    def prepare(self, order: Order, *, on_bytes: OnBytes | None = None) -> JobRequest:
        """The request of an order, with its local files uploaded: for validate, then submit."""
        if isinstance(order, JobRequest):
            return order
        found = draft(order) if isinstance(order, dict) else read_job_file(Path(order))
        artifacts = dict[Path, UUID]()
        for file in found.files:
            if file.path not in artifacts:
                artifacts[file.path] = upload_file(self._connection, file.path, file.format, on_bytes).id
        return found.request(artifacts)

    def validate(self, order: Order, *, on_bytes: OnBytes | None = None) -> schemas.Validation:
        """Check an order to the end without submitting it, and take advice on it (`notes`).

        Its files are uploaded, and not again by submit.
        """
        body = self.prepare(order, on_bytes=on_bytes).model_dump(mode="json")
        return self._connection.ask(schemas.Validation, "POST", "/v1/jobs/validate", json=body)

    def upload(self, path: str | Path, *, on_bytes: OnBytes | None = None) -> UUID:
        """The artifact id of a file, which is sent only if the account does not have it already."""
        path = Path(path)
        return upload_file(self._connection, path, format_of(path), on_bytes).id

    def job(self, job_id: UUID | str) -> Job:
        """One job by its id."""
        view = self._connection.ask(schemas.Job, "GET", f"/v1/jobs/{_as_id(job_id)}")
        return Job(self._connection, view)

    def jobs(
        self, *, status: JobStatus | None = None, tag: str | None = None, limit: int | None = None
    ) -> Iterator[Job]:
        """The account's jobs, newest first, at most `limit` of them."""
        asked: dict[str, Any] = {"status": status, "tag": tag}
        parameters = {name: value for name, value in asked.items() if value is not None}
        remaining = limit
        while remaining is None or remaining > 0:
            page_size = min(remaining or PAGE_SIZE, PAGE_SIZE)
            asked_page = {**parameters, "limit": page_size}
            page = self._connection.ask(schemas.JobList, "GET", "/v1/jobs", params=asked_page)
            yield from (Job(self._connection, view) for view in page.items[:remaining])
            if page.next_cursor is None:
                return
            parameters["cursor"] = page.next_cursor
            remaining = None if remaining is None else remaining - len(page.items)

    def stages(self) -> list[schemas.StageKind]:
        """The stage kinds of the language, each with its schema."""
        return self._connection.ask(list[schemas.StageKind], "GET", "/v1/stages")

    def targets(self) -> list[schemas.Target]:
        """The engines that can be asked of build_engine."""
        return self._connection.ask(list[schemas.Target], "GET", "/v1/targets")

    def workers(self) -> list[schemas.Worker]:
        """The workers and what they can do."""
        return self._connection.ask(list[schemas.Worker], "GET", "/v1/workers")

    def version(self) -> schemas.Version:
        """The version of the service."""
        return self._connection.ask(schemas.Version, "GET", "/v1/version")


class Job:
    """A job of the service. `view` is how it was when it was last asked for; `refresh` asks again."""

    def __init__(self, connection: Connection, view: schemas.Job) -> None:
        self._connection = connection
        self.view = view

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.name!r} {self.status}>"

    @property
    def id(self) -> UUID:
        return self.view.id

    @property
    def url(self) -> str:
        return self.view.url

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def status(self) -> JobStatus:
        return self.view.status

    @property
    def verdict(self) -> Verdict | None:
        return self.view.verdict

    @property
    def headline(self) -> str | None:
        """The verdict in words, once the job has left a report and was asked for by itself (not in a list)."""
        return self.view.headline

    @property
    def has_ended(self) -> bool:
        return self.status in LAST

    def refresh(self) -> Self:
        """Ask the service how the job is now."""
        self.view = self._connection.ask(schemas.Job, "GET", self._path())
        return self

    def wait(self, *, on_event: OnEvent | None = None) -> Self:
        """Wait until the job has ended, telling each event from its first on.

        Raises:
            JobFailed: it failed or was cancelled. A job that succeeded may still not have met its goals: see `verdict`
                and `headline`.
        """
        for event in self.events(follow=True):
            if on_event is not None:
                on_event(event)
        if self.refresh().status != "succeeded":
            raise JobFailed(self)
        return self

    def events(self, *, follow: bool = False, after: int = 0) -> Iterator[Event]:
        """What has happened to the job since the sequence number `after`; with `follow`, until it has ended."""
        if follow:
            return follow_events(self._connection, self.id, after)
        return self._events(after)

    def logs(self, *, follow: bool = False) -> Iterator[str]:
        """The text of the job's log: what there is of the newest attempt's, or with `follow` all until it has ended."""
        if follow:
            return (str(event.data["text"]) for event in self.events(follow=True) if event.kind == "log")
        return iter([self._connection.send("GET", self._path("logs")).text])

    def cancel(self) -> Self:
        """Ask for the job's end; a job that has ended stays as it is."""
        self.view = self._connection.ask(schemas.Job, "POST", self._path("cancel"))
        return self

    def retry(self, *, idempotency_key: str | None = None) -> Job:
        """Submit the ended job's recipe again, as a new job."""
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        return Job(self._connection, self._connection.ask(schemas.Job, "POST", self._path("retry"), headers=headers))

    def report(self) -> Report:
        """The whole account of the job."""
        return self._connection.ask(Report, "GET", self._path("report"))

    def report_as(self, format: Literal["json", "csv", "md"]) -> str:
        """The report as text."""
        return self._connection.send("GET", self._path("report"), params={"format": format}).text

    def artifacts(self) -> list[schemas.Artifact]:
        """The files that the job made."""
        return self._connection.ask(schemas.ArtifactList, "GET", self._path("artifacts")).items

    def download(
        self,
        directory: str | Path = ".",
        *,
        name: str | None = None,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Download what the job delivers, or the artifact of that name; its sha256 is verified. Returns its path."""
        return download_file(self._connection, self.artifact(name), Path(directory), on_bytes)

    def artifact(self, name: str | None = None) -> schemas.Artifact:
        """The artifact of that name; without one, the engine (or else the model) that the job delivers."""
        found = self.artifacts()
        if name is not None:
            for artifact in found:
                if artifact.name == name:
                    return artifact
            raise BadInput(f"The job {self.id} has no artifact {name!r}.", hint=_names(found))
        delivered = self.report().final
        for role in ("engine", "model"):
            for artifact in found:
                if artifact.stage == delivered is not None and artifact.role == role:
                    return artifact
        raise BadInput(f"The job {self.id} delivered no engine.", hint=_names(found))

    def _events(self, after: int) -> Iterator[Event]:
        while True:
            asked = {"after": after, "limit": EVENTS_PAGE}
            found = self._connection.ask(schemas.EventList, "GET", self._path("events"), params=asked).items
            yield from found
            if len(found) < EVENTS_PAGE:
                return
            after = found[-1].sequence

    def _path(self, below: str = "") -> str:
        return f"/v1/jobs/{self.id}" + (f"/{below}" if below else "")


PAGE_SIZE = 100
EVENTS_PAGE = 1000


def _as_id(job_id: UUID | str) -> UUID:
    """A job's id; its URL is taken too."""
    try:
        return job_id if isinstance(job_id, UUID) else UUID(job_id.rstrip("/").rpartition("/")[2])
    except ValueError:
        raise BadInput(f"{job_id!r} is not a job's id.", hint="'burnish jobs' lists them.") from None


def _names(artifacts: list[schemas.Artifact]) -> str:
    return f"It has: {', '.join(artifact.name for artifact in artifacts)}." if artifacts else "It has none."
