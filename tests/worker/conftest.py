"""What the workshop's tests share: one small job, trained and measured once."""

from pathlib import Path

import pytest

from shared.recipe import BuildEngine, ExportOnnx, Quantize
from tests.worker.workbench import Workbench, set_up
from worker.context import Model, StageResult


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
    """An engine's zip, as a job delivers it."""
    return bench.run(BuildEngine(), quantized.model, bench.directory / "built").model.path
