"""Quantized models are small, near the source model, and the same every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from shared.errors import CalibrationMissing
from shared.recipe import BuildEngine, ExportOnnx, ModelFormat, Quantize
from tests.worker.workbench import Workbench, small_onnx
from worker import engines, stages
from worker.context import Model, StageResult
from worker.data import Samples
from worker.evaluate import evaluate
from worker.loading import digest, load_onnx_checked


def test_int8_keeps_the_metrics_and_takes_less_room(bench: Workbench, exported: Model, quantized: StageResult) -> None:
    runner = engines.load("onnxruntime").open(quantized.model, 1)
    metrics, _ = evaluate(runner.run, bench.samples("evaluation"), bench.recipe.task)
    assert quantized.model.precision == "int8"
    assert bench.baseline.metrics["dice"] - metrics["dice"] < 0.02
    assert quantized.model.path.stat().st_size < 0.7 * exported.path.stat().st_size
    assert quantized.parity is not None
    assert quantized.parity.passed


def test_int8_for_onnxruntime_is_qdq_of_standard_operators(quantized: StageResult) -> None:
    model = load_onnx_checked(quantized.model.path)
    operators = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= operators
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}


def test_an_openvino_form_is_made_only_where_the_recipe_builds_one(
    bench: Workbench, exported: Model, quantized: StageResult, tmp_path: Path
) -> None:
    assert set(quantized.model.variants) == {"openvino"}
    only = [ExportOnnx(), Quantize(), BuildEngine(targets=["onnxruntime"])]
    result = bench.run(Quantize(calibration_samples=4), exported, tmp_path, stages=only)
    assert result.model.variants == {}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_the_openvino_form_keeps_the_metrics(bench: Workbench, quantized: StageResult) -> None:
    runner = engines.load("openvino").open(quantized.model, 1)
    metrics, _ = evaluate(runner.run, bench.samples("evaluation"), bench.recipe.task)
    assert bench.baseline.metrics["dice"] - metrics["dice"] < 0.02


def test_the_result_is_told_with_its_calibration(quantized: StageResult) -> None:
    assert quantized.details["calibration_samples"] == 16
    assert quantized.details["calibration_method"] == "minmax"
    assert set(quantized.model.files()) == {"model", "model.openvino", "model.openvino.weights"}


def test_quantizing_twice_gives_the_same_bytes(
    bench: Workbench, exported: Model, quantized: StageResult, tmp_path: Path
) -> None:
    again = bench.run(Quantize(calibration_samples=16), exported, tmp_path)
    for role, path in again.model.files().items():
        assert digest(path) == digest(quantized.model.files()[role]), role


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_every_calibration_method_keeps_the_metrics(
    bench: Workbench, exported: Model, tmp_path: Path, method: Any
) -> None:
    stage = Quantize(calibration_samples=8, calibration_method=method)
    model = bench.run(stage, exported, tmp_path).model
    for runtime in ("onnxruntime", "openvino"):
        metrics, _ = evaluate(
            engines.load(runtime).open(model, 1).run, bench.samples("evaluation"), bench.recipe.task
        )
        assert bench.baseline.metrics["dice"] - metrics["dice"] < 0.05


def test_fp16_halves_the_weights_and_keeps_fp32_inputs(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    result = bench.run(Quantize(scheme="fp16"), exported, tmp_path)
    model = load_onnx_checked(result.model.path)  # which accepts fp32 inputs and outputs only
    assert result.model.precision == "fp16"
    assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    assert result.model.path.stat().st_size < 0.75 * exported.path.stat().st_size
    assert result.parity is not None
    assert result.parity.relative_error < 0.02


def test_the_seed_draws_the_calibration_samples(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    calibration = stages.load("quantize")._calibration
    model, context = load_onnx_checked(exported.path), bench.context(tmp_path)
    drawn = [calibration(Quantize(calibration_samples=6), model, replace(context, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0].positions == drawn[1].positions != drawn[2].positions
    assert len(set(drawn[0].positions)) == 6
    asked_for_more = calibration(Quantize(calibration_samples=999), model, context)
    assert asked_for_more.positions == list(range(16))


def test_calibration_without_samples_is_refused(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    none = Samples("calibration", 0, lambda index: np.zeros(1, dtype=np.float32), None)
    context = replace(bench.context(tmp_path), samples=lambda part: none)
    with pytest.raises(CalibrationMissing):
        stages.load("quantize").run(Quantize(), exported, context)


def test_calibration_reads_one_batch_at_a_time(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    samples, asked = bench.samples("calibration"), []

    class Watched(Samples):
        def take(self, indices: Any) -> Any:
            asked.append(len(indices))
            return super().take(indices)

    watched = Watched("calibration", len(samples), samples.read_input, samples.read_target)
    context = replace(
        bench.context(tmp_path), samples=lambda part: watched if part == "calibration" else bench.samples(part)
    )
    stages.load("quantize").run(Quantize(calibration_samples=8, calibration_method="percentile"), exported, context)
    assert set(asked) == {1}
    assert len(asked) >= 16  # eight for each runtime


def test_the_output_stays_in_float(exported: Model, quantized: StageResult) -> None:
    graph = onnx.load(quantized.model.path).graph
    last = next(node for node in graph.node if graph.output[0].name in node.output)
    assert last.op_type == "Conv"
    assert onnx.load(exported.path).graph.output == graph.output


def test_a_relu_at_the_output_is_not_lost(bench: Workbench, tmp_path: Path) -> None:
    small_onnx(tmp_path / "net.onnx")
    (tmp_path / "out").mkdir()
    model, _ = stages.load("quantize")._to_int8(
        Quantize(calibration_samples=4), Model(ModelFormat.ONNX, tmp_path / "net.onnx"), bench.context(tmp_path / "out")
    )
    outputs = engines.load("onnxruntime").open(model, 1).run(bench.samples("evaluation").inputs(0, 4))
    assert outputs.min() >= 0


@pytest.mark.parametrize("opset", [11, 17])
def test_an_old_opset_is_raised_before_quantizing_per_channel(bench: Workbench, tmp_path: Path, opset: int) -> None:
    small_onnx(tmp_path / "net.onnx", opset=opset, batch=2)
    source = Model(ModelFormat.ONNX, tmp_path / "net.onnx")
    reference = tmp_path / "reference.npy"
    inputs = bench.samples("evaluation").take(bench.samples("evaluation").spread(16))
    np.save(reference, engines.load("onnxruntime").open(source, 1).run(inputs))
    context = replace(bench.context(tmp_path), reference=reference)
    result = stages.load("quantize").run(Quantize(calibration_samples=5), source, context)
    model = onnx.load(result.model.path)
    assert model.opset_import[0].version >= 13
    assert result.parity is not None
    assert result.parity.passed


def test_nothing_is_printed_to_stdout(
    bench: Workbench, exported: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run(Quantize(calibration_samples=2), exported, tmp_path)
    assert capsys.readouterr().out == ""
