"""Every runtime gives the same answers, takes any batch, and refuses with a sentence what it cannot run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.errors import StageFailed
from shared.recipe import ModelFormat
from tests.worker.workbench import Workbench, small_onnx
from worker import engines
from worker.context import Model, StageResult
from worker.engines.batching import in_fixed_batches

RUNTIMES = ("onnxruntime", "openvino")
IMAGES = np.random.default_rng(0).normal(size=(5, 1, 32, 32)).astype(np.float32)


def open_engine(runtime: str, model: Model, directory: Path, threads: int = 1) -> engines.Runner:
    """Built as a job builds it, then opened."""
    directory.mkdir(exist_ok=True)
    module = engines.load(runtime)
    files = Model(ModelFormat.ENGINE, module.build(model.candidates(runtime)[0], directory), precision=model.precision)
    runner: engines.Runner = module.open(files, threads)
    return runner


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_engine_agrees_with_pytorch(bench: Workbench, exported: Model, tmp_path: Path, runtime: str) -> None:
    expected = engines.load("torch eager").open(bench.source, 1).run(IMAGES)
    found = open_engine(runtime, exported, tmp_path).run(IMAGES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_runner_tells_what_it_is(exported: Model, tmp_path: Path, runtime: str, threads: int) -> None:
    runner = open_engine(runtime, exported, tmp_path, threads)
    assert (runner.engine, runner.precision, runner.threads) == (runtime, "fp32", threads)
    assert runner.versions[runtime]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_a_fixed_batch_takes_any_number_of_samples(tmp_path: Path, runtime: str, batch: int) -> None:
    small_onnx(tmp_path / "any.onnx")
    small_onnx(tmp_path / "fixed.onnx", batch=batch)
    free = open_engine(runtime, Model(ModelFormat.ONNX, tmp_path / "any.onnx"), tmp_path / "any")
    fixed = open_engine(runtime, Model(ModelFormat.ONNX, tmp_path / "fixed.onnx"), tmp_path / "fixed")
    np.testing.assert_allclose(fixed.run(IMAGES), free.run(IMAGES), atol=1e-5)


def test_stretches_are_padded_and_cut() -> None:
    seen = []

    def run(inputs: np.ndarray) -> list[np.ndarray]:
        seen.append(len(inputs))
        return [inputs + 1, inputs.sum(axis=(1, 2, 3))]

    more, sums = in_fixed_batches(run, IMAGES, 3)
    np.testing.assert_array_equal(more, IMAGES + 1)
    np.testing.assert_array_equal(sums, IMAGES.sum(axis=(1, 2, 3)))
    assert seen == [3, 3]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_outputs_do_not_change_with_the_next_run(exported: Model, tmp_path: Path, runtime: str) -> None:
    runner = open_engine(runtime, exported, tmp_path)
    before = runner.run(IMAGES[:1])
    kept = before.copy()
    runner.run(IMAGES[1:2])
    np.testing.assert_array_equal(before, kept)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_input_of_another_shape_is_refused_with_it(exported: Model, tmp_path: Path, runtime: str) -> None:
    runner = open_engine(runtime, exported, tmp_path)
    with pytest.raises(StageFailed, match=r"\[1, 3, 32, 32\]") as refused:
        runner.run(np.zeros((1, 3, 32, 32), dtype=np.float32))
    assert refused.value.code == "input_mismatch"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, runtime: str) -> None:
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08no model")
    with pytest.raises(StageFailed) as refused:
        open_engine(runtime, Model(ModelFormat.ONNX, tmp_path / "net.onnx"), tmp_path / "out")
    assert refused.value.code == "engine_failed"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_same_model_builds_the_same_bytes(
    exported: Model, quantized: StageResult, tmp_path: Path, runtime: str
) -> None:
    module = engines.load(runtime)
    for model in (exported, quantized.model):
        contents = []
        for name in ("a", "b"):
            directory = tmp_path / f"{model.precision}-{name}"
            directory.mkdir()
            built = module.build(model.candidates(runtime)[0], directory)
            contents.append([path.read_bytes() for path in module.files(built)])
        assert contents[0] == contents[1]


def test_openvino_uses_its_own_form_where_there_is_one(quantized: StageResult, exported: Model, tmp_path: Path) -> None:
    form = quantized.model.candidates("openvino")[0]
    built = engines.load("openvino").build(form, tmp_path)
    own = form.path
    assert built.with_suffix(".bin").read_bytes() == own.with_suffix(".bin").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_openvino_runs_fp32_in_fp32(exported: Model, tmp_path: Path) -> None:
    runner = open_engine("openvino", exported, tmp_path)
    config = runner.request.get_compiled_model()  # type: ignore[attr-defined]
    assert "float32" in str(config.get_property("INFERENCE_PRECISION_HINT"))
    assert config.get_property("INFERENCE_NUM_THREADS") == 1
    assert "LATENCY" in str(config.get_property("PERFORMANCE_HINT"))
