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
from tests.worker.workbench import Workbench, corrupted, only_int8, small_onnx, symmetric_int8
from worker import engines, stages
from worker.benchmark import side_by_side
from worker.context import Form, Model, StageResult
from worker.engines import archive
from worker.evaluate import evaluate, parity, parity_inputs, run_in_batches
from worker.loading import digest
from worker.predict import load_engine

RUNTIMES = ("onnxruntime", "openvino")
NUM_NEGATIONS = 60


@pytest.fixture(scope="module", name="quantized")
def only_quantized(quantized: StageResult) -> StageResult:
    """What quantize left, without fp32."""
    return replace(quantized, model=only_int8(quantized.model))


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
    assert [(report.target, report.engine, report.evaluated) for report in result.targets] == [(target, target, True)]
    assert load_engine(result.model.path).manifest.engine == target


def test_an_fp32_model_is_built_for_both_runtimes(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    result = bench.run(BuildEngine(), exported, tmp_path)
    whole = [found for found in result.candidates if found.precision == "fp32"]
    assert [found.engine for found in whole] == ["onnxruntime", "openvino"]
    assert all(found.parity and found.parity.relative_error < 1e-4 for found in whole)


def test_fp32_int8_and_where_the_cpu_can_bf16_are_all_measured_beside_the_source(
    bench: Workbench, exported: Model, quantized: StageResult, tmp_path: Path
) -> None:
    both = replace(quantized.model, forms=(*quantized.model.forms, Form("any", "fp32", exported.path)))
    result = bench.run(BuildEngine(), both, tmp_path)
    halves = {("openvino", "bf16")} if engines.load("openvino").has_bf16() else set()
    expected = {(engine, precision) for engine in ("onnxruntime", "openvino") for precision in ("fp32", "int8")}
    assert {(found.engine, found.precision) for found in result.candidates} == expected | halves
    for found in result.candidates:
        assert found.measurement is not None
        assert found.measurement.baseline_latency_ms is not None
    assert result.measurement is not None
    assert result.model.precision == result.measurement.method.precision


def test_bf16_runs_in_bf16(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    openvino = engines.load("openvino")
    if not openvino.has_bf16():
        pytest.skip("this CPU has no bfloat16")
    runner = openvino.open(replace(exported, precision="bf16"), 1)
    assert "bfloat16" in str(runner.request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT"))


def test_the_speedup_is_of_the_moment_in_which_the_engine_was_timed(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    slow = bench.baseline.latency_ms.model_copy(update={"p50": 1e6})  # a baseline of another, busier hour
    goals = [Goal(metric="latency", kind="min_speedup", value=1000)]
    context = bench.context(tmp_path, goals=goals)
    context = replace(context, baseline=bench.baseline.model_copy(update={"latency_ms": slow}))
    result = stages.load("build_engine").run(BuildEngine(), quantized.model, context)
    assert result.targets[0].verdict == "missed"
    (reached,) = [goal.reached for goal in result.targets[0].goals]
    found = result.measurement
    assert reached == pytest.approx(found.baseline_latency_ms.p50 / found.latency_ms.p50)


def test_int8_that_is_slower_than_fp32_is_not_kept_and_the_report_says_that_it_does_not_pay(
    bench: Workbench, exported: Model, tmp_path: Path
) -> None:
    """Int8 that ONNX Runtime cannot fuse: what one layer puts out is quantized over and over, the rest is float."""
    slow = Model(ModelFormat.ONNX, _unfused_int8(bench, exported, tmp_path / "slow.onnx"), precision="int8")
    slow = replace(slow, forms=(Form("any", "fp32", exported.path),))
    result = bench.run(BuildEngine(targets=["onnxruntime"]), slow, tmp_path / "out")
    assert result.model.precision == "fp32"
    dropped = next(found for found in result.candidates if found.precision == "int8")
    assert not dropped.kept
    assert dropped.reason.startswith("int8 does not pay here: ")
    assert dropped.reason.endswith("times the latency of onnxruntime fp32")


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


def test_what_openvino_makes_of_symmetric_int8_is_never_delivered(
    bench: Workbench, exported: Model, tmp_path: Path
) -> None:
    """A real case: OpenVINO computes this U-Net wrongly, ONNX Runtime the same file rightly."""
    model = Model(ModelFormat.ONNX, symmetric_int8(bench, exported, tmp_path / "symmetric.onnx"), precision="int8")
    result = bench.run(BuildEngine(), model, tmp_path / "out")
    right, wrong = (next(one for one in result.candidates if one.engine == name) for name in RUNTIMES)
    assert right.kept
    assert wrong.parity is not None
    assert wrong.parity.relative_error > 0.3
    assert not wrong.kept
    assert "its outputs are wrong" in wrong.reason
    assert load_engine(result.model.path).manifest.engine == "onnxruntime"
    with pytest.raises(StageFailed, match="No engine is right"):
        bench.run(BuildEngine(targets=["openvino"]), model, tmp_path / "openvino")


def test_without_any_right_engine_the_stage_fails(bench: Workbench, quantized: StageResult, tmp_path: Path) -> None:
    wrong = corrupted(bench, quantized.model, tmp_path / "wrong")
    with pytest.raises(StageFailed, match="No engine is right: openvino int8: its outputs are wrong") as refused:
        bench.run(BuildEngine(targets=["openvino"]), wrong, tmp_path / "out")
    assert refused.value.code == "no_engine"


def test_a_tolerance_that_int8_cannot_meet_fails_with_both_reasons(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    with pytest.raises(StageFailed, match=r"onnxruntime int8: .*tolerance 1e-06.*openvino int8: .*tolerance 1e-06"):
        bench.run(BuildEngine(tolerance=1e-6), quantized.model, tmp_path)


def test_a_form_that_a_runtime_refuses_is_told_and_not_kept(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    (tmp_path / "broken.xml").write_text("<net/>")
    broken = replace(quantized.model, forms=(Form("openvino", "int8", tmp_path / "broken.xml"),))
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


def _unfused_int8(bench: Workbench, model: Model, path: Path) -> Path:
    """What the first convolution puts out is quantized, dequantized and negated, many times one after the other."""
    found = onnx.load(model.path)
    graph = found.graph
    scale = onnx.numpy_helper.from_array(np.float32(0.05), "a_scale")
    zero = onnx.numpy_helper.from_array(np.uint8(128), "a_zero")
    graph.initializer.extend([scale, zero])
    place = next(index for index, node in enumerate(graph.node) if node.op_type == "Conv")
    wide = name = graph.node[place].output[0]
    nodes = []
    for index in range(NUM_NEGATIONS):
        nodes.append(onnx.helper.make_node("QuantizeLinear", [name, "a_scale", "a_zero"], [f"q{index}"]))
        nodes.append(onnx.helper.make_node("DequantizeLinear", [f"q{index}", "a_scale", "a_zero"], [f"dq{index}"]))
        nodes.append(onnx.helper.make_node("Neg", [f"dq{index}"], [f"neg{index}"]))
        name = f"neg{index}"
    after = list(graph.node)[place + 1 :]
    for node in after:
        node.input[:] = [name if one == wide else one for one in node.input]
    del graph.node[place + 1 :]
    graph.node.extend([*nodes, *after])
    onnx.save(found, path)
    return path
