"""What an attempt need not compute again: stages that an earlier job of the account made by the same recipe.

They are handed to the child with their files, and come back from it as stages of this job's own, `cached`: with the
figures of then where these hold on this machine, and measured again where it is another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path

from shared import cache
from shared.db import Sessions
from shared.errors import DigestMismatch, NotFound
from shared.ledger import Claim, Stored
from shared.log import get_logger
from shared.models import StageRun
from shared.report import StageReport
from worker import wire
from worker.environment import cpu_name, gpu_name

FROM = "cached_from"  # in a stage report's details
ROOT = Path(__file__).parents[1]
Bring = Callable[[StageRun], wire.FinishedStage]


class Reuse:
    """The stage cache as one attempt sees it: its stages' keys, and what was handed to the child."""

    def __init__(
        self, claim: Claim, source_sha256: str, data_sha256: str, threads: int, finished: Mapping[int, str | None]
    ) -> None:
        self._claim = claim
        self._finished = finished
        self._keys = cache.keys(claim, source_sha256, data_sha256, made_by(threads), finished)
        self._handed: dict[int, StageReport] = {}

    def key(self, position: int) -> str | None:
        """What the stage at a position is to be found by, once it is done."""
        return self._keys.get(position)

    def find(
        self, sessions: Sessions, runs_of: Callable[[cache.Found], Sequence[StageRun]], bring: Bring
    ) -> wire.Cached | None:
        """The stages to come that need not be computed; from one that is gone or damaged on, they need."""
        sought = [key for position, key in self._keys.items() if position not in self._finished]
        found = cache.find(sessions, self._claim, sought) if self._claim.use_cache and sought else None
        if found is None:
            return None
        stages = []
        for run in runs_of(found):
            if run.position in self._finished or run.position > found.last:
                continue
            try:
                stages.append(self._hand_over(run, bring(run)))
            except (NotFound, DigestMismatch) as error:
                get_logger().warning(
                    "cache_damaged", job_id=str(run.job_id), position=run.position, error=error.detail
                )
                break
        return wire.Cached(baseline=found.baseline, stages=stages) if stages else None

    def is_honest(self, report: StageReport, stored: Sequence[Stored]) -> bool:
        """Whether a finished stage says that it is cached only if it is what was handed over, to the byte."""
        told, handed = report.details.get(FROM), self._handed.get(report.position)
        if told is None:
            return report.status != "cached"
        # a stage that another job dropped may meet this job's goals, or the other way round
        outcomes = {"cached", "dropped"} if handed is not None and handed.measurement is not None else set()
        if handed is None or report.status not in {handed.status, *outcomes} or not isinstance(told, dict):
            return False
        same_origin = {**told, "measured_again": False} == handed.details[FROM]
        files = [(file.role, file.name, file.format, file.sha256) for file in stored]
        return same_origin and files == [(note.role, note.name, note.format, note.sha256) for note in handed.artifacts]

    def _hand_over(self, run: StageRun, kept: wire.FinishedStage) -> wire.FinishedStage:
        report = kept.report
        origin = report.details.get(FROM)
        if origin is None or origin["measured_again"]:  # its figures are that job's own
            finished_at = run.finished_at.isoformat() if run.finished_at else None
            origin = {"job": str(run.job_id), "attempt": run.attempt, "finished_at": finished_at}
            origin |= {"seconds": report.seconds, "measured_again": False}
        outcome = "cached" if report.status == "succeeded" else report.status
        handed = report.model_copy(update={"status": outcome, "details": {**report.details, FROM: origin}})
        self._handed[run.position] = handed
        return wire.FinishedStage(report=handed, files=kept.files)


@lru_cache
def made_by(threads: int) -> str:
    """Digest of what makes a stage's files here: the code, every installed package, and the kind of machine.

    Not of which machine it is: files are as good on another one of its kind, where figures are not.
    """
    digest = hashlib.sha256()
    for path in sorted(path for room in ("shared", "worker") for path in (ROOT / room).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode() + path.read_bytes())
    # without those that setuptools carries inside, which show once something has imported it
    installed = [package for package in distributions() if "_vendor" not in str(package.locate_file(""))]
    packages = sorted({f"{package.name} {package.version}" for package in installed})
    digest.update(json.dumps([packages, cpu_name(), gpu_name(), threads]).encode())
    return digest.hexdigest()
