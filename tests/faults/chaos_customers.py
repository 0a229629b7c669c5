"""The customers of a run of chaos: each submits its jobs over HTTP, insists as a user would, and remembers its 202s."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from burnish import Client
from burnish.errors import ServiceSaidNo, Unreachable
from shared.schemas import Job
from tests.api import desk
from tests.faults.chaos_plan import Errand
from tests.faults.tiny_child import faultless

T = TypeVar("T")


class Customer:
    """One account's errands, in a thread. `acknowledged` holds the id that each errand's 202 told."""

    def __init__(self, client: Client, directory: Path, errands: list[Errand]) -> None:
        self._client, self._directory, self._errands = client, directory, errands
        self._thread = threading.Thread(target=self._run, name="customer", daemon=True)
        self._stopped = threading.Event()
        self._elapsed: Callable[[], float] = float
        self.acknowledged: dict[Errand, UUID] = {}
        self.refusals: Counter[str] = Counter()  # that were to be tried again
        self.complaints: list[str] = []  # of refusals that were not

    def start(self, elapsed: Callable[[], float]) -> None:
        """Begin; `elapsed` tells the seconds of the run."""
        self._elapsed = elapsed
        self._thread.start()

    def join(self, timeout_seconds: float) -> None:
        """Wait until all is submitted; what is not by then is a complaint."""
        self._thread.join(timeout_seconds)
        self._stopped.set()
        for errand in self._errands:
            if errand not in self.acknowledged:
                self.complaints.append(f"errand {errand.number} of {errand.account} was never acknowledged")

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._client.close()

    def jobs(self) -> dict[UUID, Job]:
        """The account's jobs, as the service lists them."""
        return {job.id: job.view for job in self._client.jobs()}

    def _run(self) -> None:
        for at_seconds, deed in sorted(self._agenda(), key=lambda entry: entry[0]):
            if not self._stopped.wait(max(0.0, at_seconds - self._elapsed())):
                deed()

    def _agenda(self) -> Iterator[tuple[float, Callable[[], None]]]:
        for errand in self._errands:
            yield errand.at_seconds, partial(self._submit, errand)
            if errand.cancel_after_seconds is not None:
                yield errand.at_seconds + errand.cancel_after_seconds, partial(self._cancel, errand)

    def _submit(self, errand: Errand) -> None:
        weights, data = write_files(self._directory, errand)
        order = {
            "name": errand.script,
            "recipe": {
                **desk.recipe(str(weights), str(data)),
                "stages": [{"kind": kind} for kind in errand.kinds],
            },
            "max_attempts": 10,  # of which kills of workers take some
        }
        job = self._insist(lambda: self._client.submit(order, idempotency_key=errand.idempotency_key))
        if job is not None:
            self.acknowledged[errand] = job.id

    def _cancel(self, errand: Errand) -> None:
        if errand in self.acknowledged:
            self._insist(lambda: self._client.job(self.acknowledged[errand]).cancel())

    def _insist(self, ask: Callable[[], T]) -> T | None:
        """Ask until the answer is yes; None if the run ends before."""
        while not self._stopped.is_set():
            try:
                return ask()
            except Unreachable:
                self.refusals["unreachable"] += 1
            except ServiceSaidNo as error:
                self.refusals[error.code] += 1
                if not error.problem.retryable:
                    self.complaints.append(f"refused: {error.problem.status} {error.code}: {error.detail}")
                    self._stopped.wait(1)
        return None


def write_files(directory: Path, errand: Errand) -> tuple[Path, Path]:
    """The errand's network, of weights that no other has, and the data, which all share."""
    weights, data = directory / f"{errand.number}.safetensors", directory / "data.safetensors"
    weights.write_bytes(weights_of(errand))
    if not data.exists():
        data.write_bytes(DATA)
    return weights, data


def weights_of(errand: Errand) -> bytes:
    unique = hashlib.sha256(errand.idempotency_key.encode()).digest()
    return desk.weights()[: -len(unique)] + unique


DATA = desk.data(("train", "calibration", "evaluation"))


def faultless_result(errand: Errand) -> dict[str, str]:
    """sha256 by name of what the job's stages leave when nothing happens to it."""
    left = faultless(errand.script, errand.kinds, weights_of(errand) + DATA)
    return dict(zip(errand.result_names(), left, strict=True))
