"""What the workshop's tests share: one small job, trained and measured once, and a worker on the tests' servers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shared.db import Sessions
from shared.recipe import BuildEngine, ExportOnnx, Goal, Quantize
from shared.settings import Settings
from shared.storage import Storage
from tests.faults.ground import Ground, audited, tiny_jobs
from tests.worker.workbench import Workbench, only_int8, set_up
from tests.worker.workshop import Workshop
from worker.context import Model, StageResult

torch.set_num_threads(1)  # tests run side by side, and threads that wait for a core spin


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return set_up(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def exported(bench: Workbench) -> Model:
    return bench.run(ExportOnnx(), bench.source, bench.directory / "exported").model


@pytest.fixture(scope="session")
def quantized(bench: Workbench, exported: Model) -> StageResult:
    return bench.run(Quantize(calibration_samples=16), exported, bench.directory / "quantized")


@pytest.fixture(scope="session")
def engine(bench: Workbench, quantized: StageResult) -> Path:
    """An int8 engine's zip, as a job delivers it that must be small."""
    goals = [Goal(metric="size", kind="max_ratio", value=0.6)]
    return bench.run(BuildEngine(), only_int8(quantized.model), bench.directory / "built", goals=goals).model.path


@pytest.fixture
def workshop(settings: Settings, sessions: Sessions, storage: Storage, tmp_path: Path) -> Workshop:
    """One worker's tools on the test's own servers, and an account with a network and data."""
    return Workshop(settings, sessions, storage, tmp_path)


@pytest.fixture
def ground(settings: Settings, sessions: Sessions, storage: Storage, tmp_path: Path) -> Iterator[Ground]:
    """A worker whose jobs' process computes nothing but digests; the ledger is in order after each test."""
    with audited(sessions, storage, tmp_path), tiny_jobs(settings, sessions, storage, tmp_path) as made:
        yield made
