"""The fastest engine that is right is kept; one whose outputs are wrong never is."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from shared.errors import StageFailed
from shared.recipe import BuildEngine, Goal, ModelFormat
from tests.worker.workbench import Workbench, corrupted, small_onnx
from worker import engines, stages
from worker.benchmark import side_by_side
from worker.context import Model, StageResult
from worker.engines import archive
from worker.evaluate import evaluate, parity, parity_inputs, run_in_batches
from worker.loading import digest
from worker.predict import load_engine


@pytest.fixture(scope="module")
def built(bench: Workbench, quantized: StageResult) -> StageResult:
    return bench.run(BuildEngine(), quantized.model, bench.directory / "built-for-tests")


def test_the_fastest_is_kept_and_every_candidate_is_told(built: StageResult) -> None:
    assert {candidate.engine for candidate in built.candidates} == {"onnxruntime", "openvino"}
    kept = [candidate for candidate in built.candidates if candidate.kept]
    assert len(kept) == 1
    assert kept[0].measurement is not None
    latencies = [found.measurement.latency_ms.p50 for found in built.candidates if found.measurement]
    assert kept[0].measurement.latency_ms.p50 == min(latencies)
    assert built.measurement == kept[0].measurement
    assert built.parity == kept[0].parity
    assert built.details["engine"] == kept[0].engine
    assert all(candidate.reason for candidate in built.candidates)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_named_target_is_the_only_candidate(
    bench: Workbench, quantized: StageResult, tmp_path: Path, target: Any
) -> None:
    result = bench.run(BuildEngine(targets=[target]), quantized.model, tmp_path)
    assert [(found.engine, found.kept) for found in result.candidates] == [(target, True)]
    assert load_engine(result.model.path).manifest.engine == target


def test_an_fp32_model_is_built_for_both_runtimes(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    result = bench.run(BuildEngine(), exported, tmp_path)
    assert {(found.engine, found.precision) for found in result.candidates} == {
        ("onnxruntime", "fp32"),
        ("openvino", "fp32"),
    }
    assert all(found.parity and found.parity.relative_error < 1e-4 for found in result.candidates)


# ---------------------------------------------------------------- wrong engines


def test_an_engine_with_wrong_outputs_is_never_kept_however_fast(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    result = bench.run(BuildEngine(), corrupted(bench, quantized.model, tmp_path / "wrong"), tmp_path / "out")
    wrong = next(found for found in result.candidates if found.engine == "openvino")
    assert not wrong.kept
    assert wrong.measurement is None
    assert wrong.parity is not None
    assert not wrong.parity.passed
    assert "outputs are wrong" in wrong.reason
    assert load_engine(result.model.path).manifest.engine == "onnxruntime"


def test_without_any_right_engine_the_stage_fails(bench: Workbench, quantized: StageResult, tmp_path: Path) -> None:
    wrong = corrupted(bench, quantized.model, tmp_path / "wrong")
    with pytest.raises(StageFailed, match="No engine is right: openvino: its outputs are wrong") as refused:
        bench.run(BuildEngine(targets=["openvino"]), wrong, tmp_path / "out")
    assert refused.value.code == "no_engine"


def test_a_tolerance_that_int8_cannot_meet_fails_with_both_reasons(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    with pytest.raises(StageFailed, match=r"onnxruntime: .*tolerance 1e-06.*openvino: .*tolerance 1e-06"):
        bench.run(BuildEngine(tolerance=1e-6), quantized.model, tmp_path)


def test_a_form_that_a_runtime_refuses_is_told_and_not_kept(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    (tmp_path / "broken.xml").write_text("<net/>")
    broken = replace(quantized.model, variants={"openvino": tmp_path / "broken.xml"})
    result = bench.run(BuildEngine(), broken, tmp_path / "out")
    refused = next(found for found in result.candidates if found.engine == "openvino")
    assert not refused.kept
    assert "OpenVINO refuses the model" in refused.reason


# ---------------------------------------------------------------- goals


def test_an_engine_that_meets_the_goals_goes_before_a_faster_one(
    bench: Workbench, quantized: StageResult, built: StageResult, tmp_path: Path
) -> None:
    sizes = {found.engine: found.measurement.size_bytes for found in built.candidates if found.measurement}
    ratio = 1.01 * sizes["onnxruntime"] / bench.baseline.size_bytes  # OpenVINO's .xml alone is larger
    goals = [Goal(metric="size", kind="max_ratio", value=ratio)]
    result = bench.run(BuildEngine(), quantized.model, tmp_path, goals=goals)
    assert result.details["engine"] == "onnxruntime"
    other = next(found for found in result.candidates if found.engine == "openvino")
    assert "max_ratio of size" in other.reason


def test_where_no_engine_meets_a_goal_the_fastest_comes_back_and_says_so(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    goals = [Goal(metric="dice", kind="threshold", value=1.0)]
    result = bench.run(BuildEngine(), quantized.model, tmp_path, goals=goals)
    kept = next(found for found in result.candidates if found.kept)
    assert "though it misses a goal: threshold of dice" in kept.reason


# ---------------------------------------------------------------- the artifact


def test_the_engine_is_one_file_with_a_manifest_and_the_portable_onnx(
    bench: Workbench, quantized: StageResult, built: StageResult
) -> None:
    with zipfile.ZipFile(built.model.path) as packed:
        names = packed.namelist()
        manifest = archive.Manifest.model_validate_json(packed.read("manifest.json"))
        assert {entry.compress_type for entry in packed.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.date_time for entry in packed.infolist()} == {archive.EPOCH}
    assert names == ["manifest.json", *[entry.name for entry in manifest.files]]
    assert manifest.task == bench.recipe.task
    assert manifest.preprocessing == bench.recipe.data.preprocessing
    assert [(port.name, port.shape) for port in manifest.inputs] == [("input", [None, 1, 32, 32])]
    assert [port.shape for port in manifest.outputs] == [[None, 4, 32, 32]]
    assert manifest.versions[manifest.engine]
    portable = next(entry for entry in manifest.files if entry.name == manifest.portable)
    assert portable.sha256 == digest(quantized.model.path)
    assert built.measurement is not None
    assert built.measurement.size_bytes == sum(f.size_bytes for f in manifest.files if f.role == "engine")


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_building_twice_gives_the_same_bytes(
    bench: Workbench, quantized: StageResult, tmp_path: Path, target: Any
) -> None:
    stage = BuildEngine(targets=[target])
    results = [bench.run(stage, quantized.model, tmp_path / name) for name in ("a", "b")]
    assert digest(results[0].model.path) == digest(results[1].model.path)


def test_the_reports_numbers_are_those_of_the_downloaded_engine(bench: Workbench, built: StageResult) -> None:
    """An independent look at the delivered file: metrics and parity to the digit, latency within noise."""
    engine, samples, report = load_engine(built.model.path), bench.samples("evaluation"), built.measurement
    assert report is not None
    assert evaluate(engine.run, samples, bench.recipe.task) == (report.metrics, report.class_metrics)
    again = parity(np.load(bench.reference), run_in_batches(engine.run, parity_inputs(samples)), 0.2)
    assert built.parity is not None
    assert again.relative_error == pytest.approx(built.parity.relative_error, rel=1e-4)
    times = side_by_side([engine], samples.inputs(0, 1), bench.recipe.benchmark)[0]
    assert 0.2 < float(np.median(times)) / report.latency_ms.p50 < 5


def test_a_customers_onnx_is_packed_without_weights_among_its_inputs(bench: Workbench, tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.input.append(onnx.helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, [4, 1, 3, 3]))
    onnx.save(model, tmp_path / "net.onnx")
    source = Model(ModelFormat.ONNX, tmp_path / "net.onnx")
    inputs = parity_inputs(bench.samples("evaluation"))
    np.save(tmp_path / "reference.npy", run_in_batches(engines.load("onnxruntime").open(source, 1).run, inputs))
    (tmp_path / "out").mkdir()
    context = replace(bench.context(tmp_path / "out"), reference=tmp_path / "reference.npy")
    result = stages.load("build_engine").run(BuildEngine(), source, context)
    assert [port.name for port in load_engine(result.model.path).manifest.inputs] == ["input"]


def test_progress_never_goes_back(bench: Workbench, quantized: StageResult, tmp_path: Path) -> None:
    told: list[float] = []
    context = replace(bench.context(tmp_path), progress=lambda fraction, message="": told.append(fraction))
    stages.load("build_engine").run(BuildEngine(), quantized.model, context)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_the_manifest_is_plain_json(built: StageResult) -> None:
    with zipfile.ZipFile(built.model.path) as packed:
        found = json.loads(packed.read("manifest.json"))
    assert found["version"] == 1
    assert found["target"] == "cpu-fastest"
    assert found["precision"] == "int8"
