"""A job's files on their way in and out: fetched by digest, hashed again before they are stored."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from pydantic import BaseModel, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import checkpoints, timings
from shared.db import Sessions, transaction
from shared.errors import DatabaseUnavailable, DigestMismatch, NotFound, ServiceError, StorageUnavailable
from shared.ledger import Claim, Stored
from shared.log import get_logger
from shared.models import STAGE_DONE, Artifact, StageRun
from shared.recipe import BuildEngine, Recipe
from shared.report import Baseline, Report, StageReport
from shared.storage import Storage
from worker import wire
from worker.reuse import Reuse

M = TypeVar("M", bound=BaseModel)
MAX_CHECKPOINTS = 100  # names, of one attempt
LAST_SECONDS = 5.0  # for the log of an attempt that was stopped
PNG, MAX_PICTURE_BYTES = b"\x89PNG\r\n\x1a\n", 4 * 2**20
CHECKPOINT = ".checkpoint"  # in the name of no other file


class Forged(ValueError):
    """The child claimed something that is not so."""


class OtherVersion(ServiceError):
    """The job was written by another version of Burnish, whose words this one does not know."""

    code = "written_by_another_version"


class Custody:
    """The files of one attempt. Keys hold the attempt and the digest, so none is ever written twice."""

    def __init__(
        self,
        claim: Claim,
        storage: Storage,
        sessions: Sessions,
        directory: Path,
        moved: Callable[[], None] = lambda: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._claim, self._storage, self._sessions, self._directory = claim, storage, sessions, directory
        self._moved = moved  # called whenever some of a file has left
        self._interrupted = interrupted  # asked while one does
        self._names: set[tuple[int, str]] = set()  # of checkpoints
        self._num_checkpoints = self._num_timings = 0
        self.reuse: Reuse | None = None

    def fetch(self, threads: int, interrupted: Callable[[], bool]) -> wire.Ticket:
        """Bring the source, the data and what earlier attempts and jobs finished into the job's directory.

        Raises:
            OtherVersion: what is stored of the job is not in this version's words.
            NotFound, DigestMismatch, StorageUnavailable: a file is gone, damaged or out of reach.
            InterruptedError: `interrupted` said so.
        """
        recipe, baseline = _read(Recipe, self._claim.recipe, "job's recipe"), self._claim.baseline
        with transaction(self._sessions) as session:
            source = self._artifact(session, recipe.source.artifact_id)
            data = self._artifact(session, recipe.data.artifact)
        inputs = self._directory / "inputs"
        inputs.mkdir(exist_ok=True)
        finished = self._finished(self._claim.lease.job_id)
        known = {run.position: run.cache_key for run in finished}
        self.reuse = Reuse(self._claim, source.sha256, data.sha256, threads, known)
        return wire.Ticket(
            job_id=self._claim.lease.job_id,
            name=self._claim.name,
            attempt=self._claim.attempt,
            recipe=recipe,
            source=self._fetch(source, inputs / f"source.{source.format}", interrupted),
            source_sha256=source.sha256,
            data=self._fetch(data, inputs / f"data.{data.format}", interrupted),
            data_format="zip" if data.format == "zip" else "safetensors",
            data_sha256=data.sha256,
            baseline=None if baseline is None else _read(Baseline, baseline, "job's baseline"),
            finished=[self._bring(run, inputs, interrupted) for run in finished],
            cached=self.reuse.find(
                self._sessions,
                lambda found: self._finished(found.job_id),
                lambda run: self._bring(run, inputs / "cached", interrupted),
            ),
            checkpoints=self._checkpoints(inputs, interrupted),
            timings=self._timings(recipe, inputs, interrupted),
            threads=threads,
        )

    def store(self, said: wire.StageFinished) -> list[Stored]:
        """Hash and upload what a stage left.

        Raises:
            Forged: a file lies outside of the job's directory, is not a plain file, or is not what was in the cache.
            InterruptedError: as for every upload, where the attempt was stopped meanwhile.
        """
        kept = []
        position = str(said.report.position)
        names = [file.name for file in said.files]
        own = [name for name in names if name.startswith(f"{position}-") and CHECKPOINT not in name]
        if len(set(own)) < len(names):
            raise Forged(f"{', '.join(names)} are not names of stage {position}'s own files")
        for file in said.files:
            path = self._own(file.path)
            kept.append(self._put(path, file.role, file.name, file.format, position))
        if self.reuse is None or not self.reuse.is_honest(said.report, kept):
            raise Forged(f"stage {position} is not what was taken from the cache")
        return kept

    def cache_key(self, position: int) -> str | None:
        """What later jobs find a stage by that this attempt finished."""
        return self.reuse.key(position) if self.reuse is not None else None

    def store_checkpoint(self, said: wire.Checkpointed) -> Stored:
        """Hash and upload a checkpoint. Raises Forged as `store` does, and where there are too many names."""
        self._names.add((said.position, said.name))
        if len(self._names) > MAX_CHECKPOINTS:
            raise Forged(f"it keeps more than {MAX_CHECKPOINTS} checkpoints")
        self._num_checkpoints += 1
        name = f"{said.position}-{said.name}{CHECKPOINT}"
        return self._put(self._own(said.path), checkpoints.ROLE, name, "safetensors", f"kept/{self._num_checkpoints}")

    def store_timings(self, said: wire.Timed) -> Stored | None:
        """Hash and upload kernel timings; None where they are too large or storage is away: they only save time.

        Raises Forged as `store` does.
        """
        path = self._own(said.path)
        size_bytes = path.stat().st_size
        if size_bytes > timings.MAX_BYTES:
            get_logger().warning("timings_too_large", job_id=str(self._claim.lease.job_id), size_bytes=size_bytes)
            return None
        self._num_timings += 1
        try:
            return self._put(path, timings.ROLE, said.name, "timings", f"timings/{self._num_timings}")
        except StorageUnavailable as error:
            get_logger().warning("timings_lost", job_id=str(self._claim.lease.job_id), error=error.detail)
            return None

    def forget_stale_checkpoints(self) -> None:
        """Remove those of the job's that were replaced or whose stage has ended; what fails is left to the sweeper."""
        try:
            checkpoints.forget_stale(self._sessions, self._storage, self._claim.lease.job_id)
        except (StorageUnavailable, DatabaseUnavailable) as error:
            get_logger().warning("checkpoints_left", job_id=str(self._claim.lease.job_id), error=error.detail)

    def store_log(self, log: Path) -> list[Stored]:
        """Upload the attempt's log. Without storage there is none: the events hold its newest lines.

        Nor is it waited for longer than LAST_SECONDS where the attempt was stopped.
        """
        if not log.exists() or not log.stat().st_size:
            return []
        until = time.monotonic() + LAST_SECONDS
        try:
            return [self._put(log, "log", log.name, "text", "log", until)]
        except (StorageUnavailable, OSError) as error:
            get_logger().warning("log_lost", job_id=str(self._claim.lease.job_id), error=str(error))
            return []

    def store_picture(self) -> list[Stored]:
        """Upload the picture of one preprocessed sample, if the child left one; a job can do without."""
        if not (self._directory / wire.PICTURE).exists():
            return []
        try:
            path = self._own(Path(wire.PICTURE))
            with path.open("rb") as file:
                is_picture = path.stat().st_size <= MAX_PICTURE_BYTES and file.read(len(PNG)) == PNG
            return [self._put(path, "picture", path.name, "png", "picture")] if is_picture else []
        except (Forged, StorageUnavailable, OSError) as error:
            get_logger().warning("picture_lost", job_id=str(self._claim.lease.job_id), error=str(error))
            return []

    def store_report(self, report: Report) -> Stored:
        """Upload the report as the JSON file that the job's owner downloads."""
        content, name = report.model_dump_json(indent=2).encode(), "report.json"
        sha256 = hashlib.sha256(content).hexdigest()
        key = self._key("report", sha256, name)
        etag = self._storage.put_bytes(content, key)  # not by way of the disk, which may be full
        return Stored("report", name, "json", key, sha256, len(content), etag)

    def _own(self, told: Path) -> Path:
        path = self._directory / told
        if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(self._directory.resolve()):
            raise Forged(f"{told} is not a plain file of the job's directory")
        return path

    def _checkpoints(self, inputs: Path, interrupted: Callable[[], bool]) -> list[wire.Checkpoint]:
        """Those of unfinished stages. One that is gone or damaged costs time, never the job."""
        fetched = []
        for artifact in checkpoints.of_job(self._sessions, self._claim.lease.job_id):
            assert artifact.stage_position is not None
            name = artifact.name.removeprefix(f"{artifact.stage_position}-").removesuffix(CHECKPOINT)
            try:
                path = self._fetch(artifact, inputs / artifact.name, interrupted)
            except (NotFound, DigestMismatch) as error:
                get_logger().warning("checkpoint_lost", job_id=str(artifact.job_id), error=error.detail)
                continue
            fetched.append(wire.Checkpoint(position=artifact.stage_position, name=name, path=path))
        return fetched

    def _timings(self, recipe: Recipe, inputs: Path, interrupted: Callable[[], bool]) -> list[wire.Timing]:
        """The account's, where TensorRT is to measure. One that cannot be fetched costs time, never the job."""
        if not any("tensorrt" in stage.engines for stage in recipe.stages if isinstance(stage, BuildEngine)):
            return []
        place = inputs / "timings"  # apart: the names are those that an earlier child gave
        place.mkdir(exist_ok=True)
        fetched = []
        for artifact in timings.of_account(self._sessions, self._claim.account_id):
            try:
                path = self._fetch(artifact, place / artifact.name, interrupted)
            except (NotFound, DigestMismatch, StorageUnavailable) as error:
                get_logger().warning("timings_lost", job_id=str(self._claim.lease.job_id), error=error.detail)
                continue
            fetched.append(wire.Timing(name=artifact.name, path=path))
        return fetched

    def _artifact(self, session: Session, artifact_id: object) -> Artifact:
        mine = [Artifact.id == artifact_id, Artifact.account_id == self._claim.account_id, Artifact.status == "ready"]
        artifact = session.scalar(select(Artifact).where(*mine))
        if artifact is None:
            raise NotFound(f"artifact {artifact_id} is gone")
        return artifact

    def _finished(self, job_id: UUID) -> Sequence[StageRun]:
        done = [StageRun.job_id == job_id, StageRun.status.in_(STAGE_DONE), StageRun.report.is_not(None)]
        with transaction(self._sessions) as session:
            return session.scalars(select(StageRun).where(*done).order_by(StageRun.position)).all()

    def _bring(self, run: StageRun, inputs: Path, interrupted: Callable[[], bool]) -> wire.FinishedStage:
        """A finished stage's report, and its files in the order in which the report tells of them."""
        report = _read(StageReport, run.report, f"report of stage {run.position}")
        place = inputs / str(run.position)
        place.mkdir(parents=True, exist_ok=True)
        own = [Artifact.job_id == run.job_id, Artifact.stage_position == run.position]
        with transaction(self._sessions) as session:
            artifacts = {artifact.name: artifact for artifact in session.scalars(select(Artifact).where(*own))}
        files = dict[str, Path]()
        for note in report.artifacts:
            if note.name not in artifacts:
                raise NotFound(f"artifact {note.name} of job {run.job_id} is gone")
            files[note.role] = self._fetch(artifacts[note.name], place / note.name, interrupted)
        return wire.FinishedStage(report=report, files=files)

    def _fetch(self, artifact: Artifact, path: Path, interrupted: Callable[[], bool]) -> Path:
        self._storage.fetch(
            artifact.key, path, sha256=artifact.sha256, size_bytes=artifact.size_bytes, interrupted=interrupted
        )
        return path.relative_to(self._directory)

    def _put(self, path: Path, role: str, name: str, format: str, place: str, until: float = 0.0) -> Stored:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        key = self._key(place, sha256, name)
        etag = self._storage.put(
            path, key, moved=self._moved, interrupted=lambda: time.monotonic() >= until and self._interrupted()
        )
        return Stored(role, name, format, key, sha256, path.stat().st_size, etag)

    def _key(self, place: str, sha256: str, name: str) -> str:
        claim = self._claim
        return f"accounts/{claim.account_id}/jobs/{claim.lease.job_id}/{claim.attempt}/{place}/{sha256}/{name}"


def _read(kind: type[M], written: Any, what: str) -> M:
    """What the ledger has, in words of this version. Raises OtherVersion."""
    try:
        return kind.model_validate(written)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        told = f"The {what} was written by another version of Burnish: {place}: {problem['msg']}"
        raise OtherVersion(told) from None
