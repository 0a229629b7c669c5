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
from shared.recipe import BuildEngine, Goal, ModelFormat, Task
from tests.worker.workbench import Workbench, corrupted, only_int8, small_onnx, symmetric_int8, wrong_in_openvino
from worker import engines, stages
from worker.benchmark import time_in_turns
from worker.context import Form, Model, StageResult
from worker.engines import archive
from worker.evaluation.agreement import keep_reference
from worker.evaluation.metrics import evaluate
from worker.loading import digest
from worker.predict import load_engine

NUM_NEGATIONS = 60


@pytest.fixture(scope="module", name="quantized")
def only_quantized(quantized: StageResult) -> StageResult:
    """What quantize left, without fp32."""
    return replace(quantized, model=only_int8(quantized.model))


@pytest.fixture(scope="module")
def built(bench: Workbench, quantized: StageResult) -> StageResult:
    """A job's engine that must be small: of a network of this size int8 is hardly faster than fp32."""
    goals = [Goal(metric="size", kind="max_ratio", value=0.6), Goal(metric="dice", kind="max_drop", value=0.1)]
    return bench.run(BuildEngine(), quantized.model, bench.directory / "built-for-tests", goals=goals)


def test_one_is_kept_and_every_candidate_is_reported_with_its_latency_and_why(built: StageResult) -> None:
    assert {candidate.engine for candidate in built.candidates} == {"onnxruntime", "openvino"}
    kept = [candidate for candidate in built.candidates if candidate.kept]
    assert len(kept) == 1
    assert built.measurement is not None
    assert kept[0].measurement is not None
    assert kept[0].measurement.latency_ms == built.measurement.latency_ms
    assert built.agreement == kept[0].agreement
    assert built.details["engine"] == kept[0].engine
    assert all(candidate.reason and candidate.measurement for candidate in built.candidates)
    names = [(candidate.engine, candidate.precision, candidate.form) for candidate in built.candidates]
    assert len(set(names)) == len(names)


def test_an_engine_is_evaluated_only_if_no_faster_one_meets_every_goal(built: StageResult) -> None:
    kept = next(candidate for candidate in built.candidates if candidate.kept)
    passed_over = [candidate for candidate in built.candidates if candidate.agreement is None]
    assert kept.measurement is not None
    for candidate in passed_over:
        assert candidate.measurement is not None
        assert candidate.measurement.metrics == {}
        assert candidate.reason.startswith("not evaluated: ")
        assert "times the latency of " in candidate.reason or "it misses max_ratio of size" in candidate.reason


def test_only_the_kept_engine_is_weighed_and_run_in_other_batches(built: StageResult) -> None:
    assert built.measurement is not None
    assert set(built.measurement.throughput_per_second) == {1, 4}
    assert built.measurement.peak_memory_bytes is not None
    assert built.measurement.metrics.keys() >= {"dice", "iou", "hd95", "nsd", "rms_error", "agreement"}
    others = [candidate.measurement for candidate in built.candidates if not candidate.kept and candidate.measurement]
    assert all(row.throughput_per_second == {} and row.peak_memory_bytes is None for row in others)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_named_target_is_the_only_candidate(
    bench: Workbench, quantized: StageResult, tmp_path: Path, target: Any
) -> None:
    result = bench.run(BuildEngine(targets=[target]), quantized.model, tmp_path)
    assert {found.engine for found in result.candidates} == {target}
    assert [(report.target, report.engine, report.evaluated) for report in result.targets] == [(target, target, True)]
    assert load_engine(result.model.path).manifest.engine == target


def test_an_fp32_model_is_built_for_both_runtimes(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    result = bench.run(BuildEngine(), exported, tmp_path)
    whole = [found for found in result.candidates if found.precision == "fp32"]
    assert sorted(found.engine for found in whole) == ["onnxruntime", "openvino"]
    compared = [output for found in whole if found.agreement for output in found.agreement.outputs]
    assert compared
    assert all(output.max_error < 1e-4 for output in compared)


def test_fp32_int8_and_where_the_cpu_can_bf16_are_all_measured_beside_the_source(
    bench: Workbench, exported: Model, quantized: StageResult, tmp_path: Path
) -> None:
    both = replace(quantized.model, forms=(*quantized.model.forms, Form("any", "fp32", exported.path)))
    result = bench.run(BuildEngine(), both, tmp_path)
    halves = {("openvino", "bf16"), ("openvino", "int8+bf16")} if engines.load("openvino").has_bf16() else set()
    expected = {(engine, precision) for engine in ("onnxruntime", "openvino") for precision in ("fp32", "int8")}
    assert {(found.engine, found.precision) for found in result.candidates} == expected | halves
    for found in result.candidates:
        assert found.measurement is not None
        assert found.measurement.speedup is not None
        assert found.measurement.speedup_over_onnxruntime is not None
    assert result.measurement is not None
    assert result.model.precision == result.measurement.method.precision


def test_bf16_runs_in_bf16(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    openvino = engines.load("openvino")
    if not openvino.has_bf16():
        pytest.skip("this CPU has no bfloat16")
    runner = openvino.open(replace(exported, precision="bf16"), 1)
    assert "bfloat16" in str(runner.compiled.get_property("INFERENCE_PRECISION_HINT"))


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
    assert reached == found.speedup.value == pytest.approx(found.baseline_latency_ms.p50 / found.latency_ms.p50)


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
    assert dropped.reason.startswith("not evaluated: ")
    assert dropped.reason.endswith("times the latency of onnxruntime fp32, which misses no goal")


# ---------------------------------------------------------------- wrong engines


def test_an_engine_with_wrong_outputs_is_never_kept_however_fast(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    result = bench.run(BuildEngine(), corrupted(bench, quantized.model, tmp_path / "wrong"), tmp_path / "out")
    wrong = [found for found in result.candidates if found.engine == "openvino"]
    assert wrong
    for found in wrong:
        assert not found.kept
        assert found.agreement is not None
        assert not found.agreement.passed
        assert "outputs are wrong" in found.reason
    assert load_engine(result.model.path).manifest.engine == "onnxruntime"


def test_what_openvino_computes_wrongly_is_never_delivered(
    bench: Workbench, exported: Model, tmp_path: Path
) -> None:
    symmetric = symmetric_int8(bench, exported, tmp_path / "symmetric.onnx")
    form = wrong_in_openvino(symmetric, tmp_path / "unconverted.xml")
    model = Model(ModelFormat.ONNX, symmetric, precision="int8", forms=(form,))
    result = bench.run(BuildEngine(), model, tmp_path / "out")
    assert not [one for one in result.candidates if one.kept and one.engine == "openvino"]
    assert load_engine(result.model.path).manifest.engine == "onnxruntime"

    # alone, it is delivered as what it is, by the labels; without labels it is refused
    (target,) = bench.run(BuildEngine(targets=["openvino"]), model, tmp_path / "labels").targets
    assert (target.verdict, [goal.outcome for goal in target.goals]) == ("missed", ["missed"])
    with pytest.raises(StageFailed, match="No engine is right: openvino int8: its outputs are wrong"):
        bench.run(BuildEngine(targets=["openvino"]), model, tmp_path / "raw", task=Task(kind="raw"))


def test_openvino_computes_symmetric_int8_rightly_once_it_has_converted_the_graph(
    bench: Workbench, exported: Model, tmp_path: Path
) -> None:
    symmetric = symmetric_int8(bench, exported, tmp_path / "symmetric.onnx")
    model = Model(ModelFormat.ONNX, symmetric, precision="int8")
    result = bench.run(BuildEngine(targets=["openvino"]), model, tmp_path / "raw", task=Task(kind="raw"))
    assert result.agreement is not None
    assert result.agreement.outputs[0].rms_error < 0.05


def test_without_any_right_engine_the_stage_fails(bench: Workbench, quantized: StageResult, tmp_path: Path) -> None:
    wrong = corrupted(bench, quantized.model, tmp_path / "wrong")
    with pytest.raises(StageFailed, match="No engine is right: openvino int8: its outputs are wrong") as refused:
        bench.run(BuildEngine(targets=["openvino"]), wrong, tmp_path / "out")
    assert refused.value.code == "no_engine"


def test_a_form_that_a_runtime_refuses_is_told_and_not_kept(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    (tmp_path / "broken.xml").write_text("<net/>")
    broken = replace(quantized.model, forms=(Form("openvino", "int8", tmp_path / "broken.xml"),))
    result = bench.run(BuildEngine(), broken, tmp_path / "out")
    refused = [found for found in result.candidates if found.engine == "openvino"]
    assert refused
    assert all("OpenVINO refuses the model" in found.reason and not found.kept for found in refused)


# ---------------------------------------------------------------- goals


def test_an_engine_that_meets_the_goals_goes_before_a_faster_one(
    bench: Workbench, quantized: StageResult, built: StageResult, tmp_path: Path
) -> None:
    sizes = {found.engine: found.measurement.size_bytes for found in built.candidates if found.measurement}
    ratio = 1.01 * sizes["onnxruntime"] / bench.baseline.size_bytes  # OpenVINO's .xml alone is larger
    goals = [Goal(metric="size", kind="max_ratio", value=ratio)]
    result = bench.run(BuildEngine(), quantized.model, tmp_path, goals=goals)
    assert result.details["engine"] == "onnxruntime"
    others = [found for found in result.candidates if found.engine == "openvino"]
    assert all("max_ratio of size" in found.reason for found in others)


def test_where_no_engine_meets_a_quality_goal_the_one_that_misses_least_is_kept_and_says_so(
    bench: Workbench, quantized: StageResult, tmp_path: Path
) -> None:
    goals = [Goal(metric="dice", kind="threshold", value=1.0)]
    result = bench.run(BuildEngine(), quantized.model, tmp_path, goals=goals)
    kept = next(found for found in result.candidates if found.kept)
    assert "though it misses threshold of dice: " in kept.reason
    reached = [found.measurement.metrics["dice"] for found in result.candidates if found.measurement]
    assert len(reached) == len(result.candidates)  # all were evaluated, for none is good enough
    assert kept.measurement is not None
    assert kept.measurement.metrics["dice"] == max(reached)


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
    bench: Workbench, quantized: StageResult, tmp_path: Path, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one form: which form is the fastest, and so what is packed, is for the stop-watch to say."""
    monkeypatch.setattr(engines.load("openvino"), "has_bf16", lambda: False)
    small = [Goal(metric="size", kind="max_ratio", value=0.6)]
    stage = BuildEngine(targets=[target])
    results = [bench.run(stage, quantized.model, tmp_path / name, goals=small) for name in ("a", "b")]
    assert digest(results[0].model.path) == digest(results[1].model.path)


def test_the_reports_numbers_are_those_of_the_downloaded_engine(bench: Workbench, built: StageResult) -> None:
    """An independent look at the delivered file: metrics to the digit, latency within noise."""
    engine, samples, report = load_engine(built.model.path), bench.samples("evaluation"), built.measurement
    assert report is not None
    again = evaluate(engine.run, samples, bench.recipe.task, requested=("hd95", "nsd"))
    assert again.means.items() <= report.metrics.items()
    assert again.by_class == report.class_metrics
    (timed,) = time_in_turns([engine], samples.inputs(0, 1), bench.recipe.benchmark)
    assert 0.2 < timed.p50 / report.latency_ms.p50 < 5


def test_a_customers_onnx_is_packed_without_weights_among_its_inputs(bench: Workbench, tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.input.append(onnx.helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, [4, 1, 3, 3]))
    onnx.save(model, tmp_path / "net.onnx")
    source = Model(ModelFormat.ONNX, tmp_path / "net.onnx")
    reference = tmp_path / "reference.npy"
    keep_reference(engines.load("onnxruntime").open(source, 1), bench.samples("evaluation"), reference)
    strange = replace(bench, source=source, reference=reference)
    result = strange.run(BuildEngine(), source, tmp_path / "out")
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
