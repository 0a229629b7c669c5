"""Several targets of one job: each has its own engine, manifest and verdict, and what cannot run here is not judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import StageFailed
from shared.recipe import BuildEngine, Goal, ModelFormat
from shared.targets import TensorRtRtx
from tests.worker.test_engines_tensorrt import needs_rtx
from tests.worker.workbench import Drawer, Workbench, corrupted, only_int8, small_onnx, symmetric_int8
from worker import engines, stages
from worker.context import Form, Model, Progress, StageResult
from worker.engines import archive, tensorrt
from worker.engines.cuda import gpu
from worker.predict import load_engine

RTX = TensorRtRtx(target="tensorrt-rtx", compute_capability="8.9")
IMPOSSIBLE = Goal(metric="latency", kind="min_speedup", value=1e6)

needs_no_gpu = pytest.mark.skipif(not isinstance(gpu(), str), reason="this machine has a GPU, so engines run on it")


@pytest.fixture(scope="module")
def int8(quantized: StageResult) -> Model:
    return only_int8(quantized.model)


@pytest.fixture(scope="module")
def for_tensorrt(bench: Workbench, exported: Model, int8: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An int8 model with the form that TensorRT takes."""
    path = symmetric_int8(bench, exported, tmp_path_factory.mktemp("forms") / "tensorrt.onnx")
    return replace(int8, forms=(*int8.forms, Form("tensorrt", "int8", path), Form("any", "fp32", exported.path)))


def manifest_of(path: Path, directory: Path) -> archive.Manifest:
    directory.mkdir()
    return archive.read(path, directory)


# ---------------------------------------------------------------- on the CPU


def test_each_target_has_its_own_engine_manifest_and_verdict(bench: Workbench, int8: Model, tmp_path: Path) -> None:
    result = bench.run(BuildEngine(targets=["openvino", "onnxruntime"]), int8, tmp_path)
    assert [(one.target, one.engine) for one in result.targets] == [
        ("openvino", "openvino"),
        ("onnxruntime", "onnxruntime"),
    ]
    for one in result.targets:
        assert one.verdict == one.goals[0].outcome in ("met", "not_shown")
    assert list(result.model.files()) == ["engine", "engine.onnxruntime"]
    for role, path in result.model.files().items():
        assert path.stem == load_engine(path).manifest.target, role
    sizes = [one.engine_bytes for one in result.targets]
    assert sizes == [one.measurement and one.measurement.size_bytes for one in result.targets]


def test_the_stages_own_figures_are_those_of_the_delivered_target(
    bench: Workbench, int8: Model, tmp_path: Path
) -> None:
    result = bench.run(BuildEngine(targets=["openvino", "onnxruntime"]), int8, tmp_path)
    assert result.measurement == result.targets[0].measurement
    assert result.agreement == result.targets[0].agreement
    assert result.details["target"] == "openvino"


def test_a_target_that_meets_the_goals_is_delivered_before_an_earlier_one_that_does_not(
    bench: Workbench, int8: Model, tmp_path: Path
) -> None:
    own = next(form for form in int8.forms if form.engine == "openvino").path
    largest = 1.01 * int8.path.stat().st_size
    assert own.stat().st_size + own.with_suffix(".bin").stat().st_size > largest
    goals = [Goal(metric="size", kind="max_ratio", value=largest / bench.baseline.size_bytes)]
    result = bench.run(BuildEngine(targets=["openvino", "onnxruntime"]), int8, tmp_path, goals=goals)
    assert [(one.target, one.verdict) for one in result.targets] == [("onnxruntime", "met"), ("openvino", "missed")]
    larger = result.targets[1]
    assert larger.engine == "openvino"
    assert larger.measurement is not None
    [kept] = [entry for entry in larger.candidates if entry.kept]
    assert "though it misses max_ratio of size" in kept.reason
    assert len(result.model.engines) == 1  # it is packed too


def test_engines_of_two_targets_are_timed_once(bench: Workbench, int8: Model, tmp_path: Path) -> None:
    result = bench.run(BuildEngine(targets=["cpu-fastest", "openvino", "onnxruntime"]), int8, tmp_path)
    fastest = next(one for one in result.targets if one.target == "cpu-fastest")
    named = {one.target: one.measurement for one in result.targets}
    assert fastest.measurement == named[str(fastest.engine)]


def test_a_target_without_a_right_engine_is_told_and_the_others_are_delivered(
    bench: Workbench, exported: Model, tmp_path: Path
) -> None:
    symmetric = Model(
        ModelFormat.ONNX, symmetric_int8(bench, exported, tmp_path / "symmetric.onnx"), precision="int8"
    )
    wrong = corrupted(bench, symmetric, tmp_path / "corrupted")
    result = bench.run(BuildEngine(targets=["openvino", "onnxruntime"]), wrong, tmp_path / "out")
    delivered, failed = result.targets
    assert (delivered.target, delivered.verdict) == ("onnxruntime", "met")
    assert (failed.target, failed.engine, failed.verdict) == ("openvino", None, "missed")
    assert "outputs are wrong" in failed.candidates[0].reason
    assert list(result.model.files()) == ["engine"]


# ---------------------------------------------------------------- for a GPU that is not here


@needs_rtx
@needs_no_gpu
def test_an_rtx_engine_is_built_here_and_not_judged(bench: Workbench, for_tensorrt: Model, tmp_path: Path) -> None:
    result = bench.run(BuildEngine(targets=[RTX]), for_tensorrt, tmp_path, goals=[IMPOSSIBLE])
    (report,) = result.targets
    assert (report.target, report.engine, report.precision) == ("tensorrt-rtx-8.9", "tensorrt_rtx", "int8")
    assert not report.evaluated
    assert report.verdict == "not_evaluated"
    assert [goal.outcome for goal in report.goals] == ["not_evaluated"]
    assert report.measurement is not None
    assert report.measurement.method.engine == "onnxruntime"
    assert "figures are those of its ONNX in onnxruntime" in report.reason
    manifest = manifest_of(result.model.path, tmp_path / "unpacked")
    assert (manifest.engine, manifest.compute_capability, manifest.entry) == ("tensorrt_rtx", "8.9", "model.rtx")
    assert manifest.batches == BuildEngine().batches
    assert manifest.versions["tensorrt_rtx"]
    assert report.engine_bytes == (tmp_path / "unpacked" / "model.rtx").stat().st_size


@needs_rtx
@needs_no_gpu
def test_a_target_that_can_be_judged_is_delivered_before_one_that_cannot(
    bench: Workbench, for_tensorrt: Model, tmp_path: Path
) -> None:
    result = bench.run(BuildEngine(targets=[RTX, "onnxruntime"]), for_tensorrt, tmp_path)
    assert [one.target for one in result.targets] == ["onnxruntime", "tensorrt-rtx-8.9"]
    assert list(result.model.files()) == ["engine", "engine.tensorrt-rtx-8.9"]


@needs_rtx
def test_where_tensorrt_refuses_int8_its_fp32_is_built_and_the_refusal_told(
    bench: Workbench, int8: Model, exported: Model, tmp_path: Path
) -> None:
    model = replace(int8, forms=(Form("any", "fp32", exported.path),))
    (report,) = bench.run(BuildEngine(targets=[RTX]), model, tmp_path).targets
    assert report.precision == "fp32"
    refusal = next(one for one in report.candidates if not one.kept)
    assert refusal.precision == "int8"
    assert "(QuantizeLinear): a zero point other than 0 is not taken" in refusal.reason
    assert "quantize stage" in refusal.reason


@needs_rtx
@needs_no_gpu
def test_where_every_form_misses_the_quality_goal_the_first_that_is_taken_is_kept_and_all_refusals_are_told(
    bench: Workbench, int8: Model, exported: Model, tmp_path: Path
) -> None:
    model = replace(int8, forms=(Form("tensorrt", "int8", int8.path), Form("any", "fp32", exported.path)))
    perfect = Goal(metric="dice", kind="threshold", value=1.0)
    (report,) = bench.run(BuildEngine(targets=[RTX]), model, tmp_path, goals=[perfect]).targets
    assert [(one.precision, one.kept) for one in report.candidates] == [("fp32", True), ("int8", False)]
    assert "a zero point other than 0 is not taken" in report.candidates[1].reason


@needs_rtx
def test_an_rtx_engine_of_a_wrong_onnx_is_not_built(bench: Workbench, int8: Model, tmp_path: Path) -> None:
    small_onnx(tmp_path / "other.onnx")
    wrong = replace(int8, forms=(Form("tensorrt", "int8", tmp_path / "other.onnx"),))
    with pytest.raises(StageFailed, match="No engine is right: tensorrt_rtx int8: its outputs are wrong"):
        bench.run(BuildEngine(targets=[RTX]), wrong, tmp_path / "out")


@needs_rtx
@needs_no_gpu
def test_an_rtx_engine_that_is_run_without_a_gpu_says_what_it_needs(
    bench: Workbench, for_tensorrt: Model, tmp_path: Path
) -> None:
    result = bench.run(BuildEngine(targets=[RTX]), for_tensorrt, tmp_path)
    with pytest.raises(StageFailed, match="needs an NVIDIA GPU"):
        load_engine(result.model.path)


@needs_rtx
def test_progress_never_goes_back_while_an_rtx_engine_is_built(
    bench: Workbench, for_tensorrt: Model, tmp_path: Path
) -> None:
    told: list[tuple[float, str]] = []

    def progress(fraction: float, message: str = "") -> None:
        told.append((fraction, message))

    context = replace(bench.context(tmp_path), progress=progress)
    stages.load("build_engine").run(BuildEngine(targets=["onnxruntime", RTX]), for_tensorrt, context)
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert any(message.startswith("TensorRT: ") for _, message in told)


class Cancelled(Exception):
    pass


@needs_rtx
def test_cancelling_ends_the_build_of_an_rtx_engine(bench: Workbench, for_tensorrt: Model, tmp_path: Path) -> None:
    def progress(fraction: float, message: str = "") -> None:
        if message.startswith("TensorRT: "):
            raise Cancelled

    context = replace(bench.context(tmp_path), progress=progress)
    with pytest.raises(Cancelled):
        stages.load("build_engine").run(BuildEngine(targets=[RTX]), for_tensorrt, context)


@pytest.mark.gpu
def test_an_engine_for_this_machines_gpu_is_measured_on_it(
    bench: Workbench, for_tensorrt: Model, tmp_path: Path
) -> None:
    if isinstance(gpu(), str):
        pytest.skip(f"needs a GPU with TensorRT and pycuda: {gpu()}")
    (report,) = bench.run(BuildEngine(targets=["tensorrt"]), for_tensorrt, tmp_path).targets
    assert report.evaluated
    assert report.measurement is not None
    assert report.measurement.method.device.startswith("gpu: ")
    assert report.device_latency_ms is not None
    assert report.device_latency_ms.p50 <= report.measurement.latency_ms.p99


@pytest.mark.gpu
def test_a_later_job_builds_with_the_timings_of_an_earlier_one(
    bench: Workbench, for_tensorrt: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(gpu(), str):
        pytest.skip(f"needs a GPU with TensorRT and pycuda: {gpu()}")
    timings, known = Drawer(), list[bytes]()
    build = tensorrt.build

    def watched(model: Model, directory: Path, plan: tensorrt.Plan, progress: Progress) -> Path:
        assert plan.timing_cache is not None
        known.append(plan.timing_cache.read_bytes() if plan.timing_cache.exists() else b"")
        return build(model, directory, plan, progress)

    monkeypatch.setattr(tensorrt, "build", watched)
    stage = BuildEngine(targets=["tensorrt"])
    for job in ("first", "second"):
        (tmp_path / job).mkdir()
        stages.load("build_engine").run(stage, for_tensorrt, replace(bench.context(tmp_path / job), timings=timings))
    (kept,) = timings.kept.values()
    assert known[0] == b""
    assert 0 < len(known[-1]) <= len(kept.read_bytes())


def test_both_editions_are_one_module() -> None:
    assert engines.load("tensorrt") is engines.load("tensorrt_rtx")
