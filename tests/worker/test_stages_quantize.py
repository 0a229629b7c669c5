"""Quantized models are small, near the source model, and the same every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from monai.networks.nets import BasicUNet

from shared.errors import CalibrationMissing, StageFailed
from shared.recipe import BuildEngine, ExportOnnx, Goal, ModelFormat, Quantize, Stage
from tests.worker import nets
from tests.worker.workbench import Workbench, small_onnx
from worker import engines, stages
from worker.candidates import forms
from worker.context import Model, StageContext, StageResult, forms_of
from worker.data import Samples
from worker.evaluation.agreement import relative_rms, run_all_in_batches
from worker.evaluation.metrics import evaluate
from worker.loading import digest
from worker.quantization.calibration import draw
from worker.quantization.quality import CLOSE, GOOD
from worker.vetting import load_onnx_checked


def test_int8_keeps_the_metrics_and_takes_less_room(bench: Workbench, exported: Model, quantized: StageResult) -> None:
    runner = engines.load("onnxruntime").open(quantized.model, 1)
    metrics = evaluate(runner.run, bench.samples("evaluation"), bench.recipe.task).means
    assert quantized.model.precision == "int8"
    assert bench.baseline.metrics["dice"] - metrics["dice"] < 0.02
    assert quantized.model.path.stat().st_size < 0.7 * exported.path.stat().st_size
    assert bench.agreement(quantized.model).passed


def test_int8_for_onnxruntime_is_qdq_of_standard_operators(quantized: StageResult) -> None:
    model = load_onnx_checked(quantized.model.path)
    operators = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= operators
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}


def test_an_openvino_form_is_made_only_where_the_recipe_builds_one(
    bench: Workbench, exported: Model, quantized: StageResult, tmp_path: Path
) -> None:
    assert {form.engine for form in quantized.model.forms} >= {"openvino", "any"}
    only = [ExportOnnx(), Quantize(), BuildEngine(targets=["onnxruntime"])]
    result = bench.run(Quantize(calibration_samples=4), exported, tmp_path, stages=only)
    assert "openvino" not in {form.engine for form in result.model.forms}
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in result.model.files().values()}


def test_the_openvino_form_keeps_the_metrics(bench: Workbench, quantized: StageResult) -> None:
    runner = engines.load("openvino").open(quantized.model.candidates("openvino")[0], 1)
    metrics = evaluate(runner.run, bench.samples("evaluation"), bench.recipe.task).means
    assert bench.baseline.metrics["dice"] - metrics["dice"] < 0.02


def test_the_result_is_told_with_its_calibration(quantized: StageResult) -> None:
    assert quantized.details["calibration_samples"] == 16
    assert quantized.details["calibration_method"] == "minmax"
    assert {"model", "form.openvino.int8.full", "form.openvino.int8.full.weights", "form.any.fp32"} <= set(
        quantized.model.files()
    )


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
        runner = engines.load(runtime).open(model.candidates(runtime)[0], 1)
        metrics = evaluate(runner.run, bench.samples("evaluation"), bench.recipe.task).means
        assert bench.baseline.metrics["dice"] - metrics["dice"] < 0.05


def test_fp16_halves_the_weights_and_keeps_fp32_inputs(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    result = bench.run(Quantize(scheme="fp16"), exported, tmp_path)
    model = load_onnx_checked(result.model.path)  # which accepts fp32 inputs and outputs only
    assert result.model.precision == "fp16"
    assert any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    assert result.model.path.stat().st_size < 0.75 * exported.path.stat().st_size
    assert bench.agreement(result.model).outputs[0].rms_error < 0.02


def test_the_seed_draws_the_calibration_samples(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    model, context = load_onnx_checked(exported.path), bench.context(tmp_path)
    drawn = [draw(Quantize(calibration_samples=6), model, replace(context, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0].positions == drawn[1].positions != drawn[2].positions
    assert len(set(drawn[0].positions)) == 6
    asked_for_more = draw(Quantize(calibration_samples=999), model, context)
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
    stage = Quantize(calibration_samples=8, calibration_method="percentile", accuracy_aware=False)
    stages.load("quantize").run(stage, exported, context)
    assert set(asked) == {1}
    assert len(asked) >= 16  # eight for each runtime


def test_the_output_stays_in_float(exported: Model, quantized: StageResult) -> None:
    graph = onnx.load(quantized.model.path).graph
    last = next(node for node in graph.node if graph.output[0].name in node.output)
    assert last.op_type == "Conv"
    assert onnx.load(exported.path).graph.output == graph.output


def test_a_relu_at_the_output_is_not_lost(bench: Workbench, tmp_path: Path) -> None:
    small_onnx(tmp_path / "net.onnx")
    model = quantized_alone(bench, Model(ModelFormat.ONNX, tmp_path / "net.onnx"), tmp_path / "out").model
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
    assert onnx.load(result.model.path).opset_import[0].version >= 13
    assert relative_rms(np.load(reference), engines.load("onnxruntime").open(result.model, 1).run(inputs)) < 0.1


def test_nothing_is_printed_to_stdout(
    bench: Workbench, exported: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run(Quantize(calibration_samples=2), exported, tmp_path)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- where int8 hurts


IMAGE = (1, nets.SIZE, nets.SIZE)


def quantized_alone(bench: Workbench, model: Model, directory: Path, **words: Any) -> StageResult:
    """A network of its own through the stage, with noise for data, for ONNX Runtime unless `stages` say otherwise."""
    context = words.pop("context", None)
    if context is None:
        built: list[Stage] = [Quantize(), BuildEngine(targets=words.pop("targets", ["onnxruntime"]))]
        context = nets.context(bench, model, directory, words.pop("shape", IMAGE), stages=built)
    result: StageResult = stages.load("quantize").run(Quantize(calibration_samples=8, **words), model, context)
    return result


def lost(form: Model, engine: str, context: StageContext) -> float:
    """Relative RMS error on the evaluation part, whose float outputs the context has."""
    samples = context.samples("evaluation")
    (outputs,) = run_all_in_batches(engines.load(engine).open(form, 1), samples.feed(samples.spread(8)))
    return relative_rms(np.load(context.reference), outputs)


def named(model: Model, engine: str) -> dict[tuple[str, str], Model]:
    """What may be built for a runtime, by precision and name."""
    return {(form.precision, name): form for form, name in forms(model, engine)}


def test_the_layer_that_int8_ruins_goes_back_to_float_and_is_named(bench: Workbench, tmp_path: Path) -> None:
    model = nets.chain(tmp_path / "net.onnx", widest=1000)
    built: list[Stage] = [Quantize(), BuildEngine()]
    context = nets.context(bench, model, tmp_path / "out", IMAGE, stages=built)
    result = quantized_alone(bench, model, tmp_path / "out", context=context)
    for engine in ("onnxruntime", "openvino"):
        told = {form["name"]: form for form in result.details[engine]["forms"]}
        assert told["good"]["layers_in_float"] == ["middle"]
        assert told["full"]["rms_error"] > 0.5
        assert result.details[engine]["sensitivity"][0]["layers"] == ["middle"]
        found = named(result.model, engine)
        assert lost(found["int8+fp32", "good"], engine, context) < GOOD.rms_error
        assert lost(found["int8", "full"], engine, context) > 0.5
    assert (result.model.precision, result.model.name) == ("int8+fp32", "good")
    assert result.details["judged_on"] == "16 calibration samples that gave no range"


def test_the_full_int8_stays_a_candidate_where_calibration_samples_speak_against_it(
    bench: Workbench, tmp_path: Path
) -> None:
    model = nets.chain(tmp_path / "net.onnx", widest=1000)
    result = quantized_alone(bench, model, tmp_path / "out", targets=["cpu-fastest"])
    for engine in ("onnxruntime", "openvino"):
        assert ("int8", "full") in named(result.model, engine)


def test_no_two_forms_share_a_file_a_role_or_a_name(bench: Workbench, tmp_path: Path) -> None:
    model = nets.chain(tmp_path / "net.onnx", widest=1000)
    result = quantized_alone(bench, model, tmp_path / "out", targets=["cpu-fastest", "openvino"]).model
    paths = [form.path for form in result.forms] + [result.path]
    assert len(set(paths)) == len(paths)
    assert len({form.role for form in result.forms}) == len(result.forms)
    assert forms_of(result.files()) == result.forms
    for engine in ("onnxruntime", "openvino"):
        found = [(form.precision, name) for form, name in forms(result, engine)]
        assert len(set(found)) == len(found)


def test_each_file_for_openvino_is_also_offered_with_a_bf16_remainder(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nets.chain(tmp_path / "net.onnx", widest=1000)
    result = quantized_alone(bench, model, tmp_path / "out", targets=["cpu-fastest"]).model
    openvino = engines.load("openvino")
    monkeypatch.setattr(openvino, "has_bf16", lambda: True)
    found = named(result, "openvino")
    assert found["int8+bf16", "good"].path == found["int8+fp32", "good"].path
    assert found["int8+bf16", "full"].path == found["int8", "full"].path
    assert found["bf16", ""].path == found["fp32", ""].path
    monkeypatch.setattr(openvino, "has_bf16", lambda: False)
    assert not any("bf16" in precision for precision, _ in named(result, "openvino"))


def test_one_runtimes_wrong_int8_does_not_take_anothers_right_one_with_it(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.quantization import forms as module

    def broken(network: Path, ranges: Path, method: str, path: Path, **words: Any) -> None:
        wrong = onnx.load(network)
        weight = wrong.graph.initializer[0]
        weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
        onnx.save(wrong, path)

    monkeypatch.setattr(module, "write_qdq", broken)
    model = nets.chain(tmp_path / "net.onnx")
    context = nets.context(bench, model, tmp_path / "out", IMAGE, stages=[Quantize(), BuildEngine()])
    result = quantized_alone(bench, model, tmp_path / "out", context=context)
    assert lost(named(result.model, "openvino")["int8", "full"], "openvino", context) < GOOD.rms_error
    assert result.model.precision == "fp32"  # the stage's own result, in ONNX Runtime
    assert lost(result.model, "onnxruntime", context) == 0


def test_a_runtime_whose_int8_cannot_be_written_is_told_and_the_other_is_handed_on(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.quantization import forms as module

    def refuse(*_: Any, **words: Any) -> None:
        raise StageFailed("The model cannot be quantized to int8: no.", code="quantize_failed")

    monkeypatch.setattr(module, "write_qdq", refuse)
    model = nets.chain(tmp_path / "net.onnx")
    result = quantized_alone(bench, model, tmp_path / "out", targets=["cpu-fastest"])
    assert result.details["onnxruntime"]["failures"] == ["The model cannot be quantized to int8: no."]
    assert ("int8", "full") in named(result.model, "openvino")
    with pytest.raises(StageFailed, match="onnxruntime: The model cannot be quantized") as refused:
        quantized_alone(bench, model, tmp_path / "alone")
    assert refused.value.code == "quantize_failed"


class TwoHeads(torch.nn.Module):
    """Two heads on one trunk; of the second one's weights one is so large, on a channel of zeros, that int8 loses all
    others beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.first = torch.nn.Conv2d(16, 4, 3, padding=1)
        self.second = torch.nn.Conv2d(16, 2, 3, padding=1)
        with torch.no_grad():
            self.trunk.weight[0], self.trunk.bias[0] = 0, -1  # type: ignore[index]
            self.second.weight[:, 0] = 1000

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.trunk(inputs))
        return self.first(hidden), self.second(hidden)


def test_a_head_that_is_not_the_first_is_judged_and_ranked_too(bench: Workbench, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nets.exported(TwoHeads(), (1, *IMAGE), tmp_path / "net.onnx")
    result = quantized_alone(bench, model, tmp_path / "out", targets=["cpu-fastest"])
    for engine in ("onnxruntime", "openvino"):
        told = {form["name"]: form for form in result.details[engine]["forms"]}
        assert told["full"]["rms_error"] > 0.5
        assert told["good"]["layers_in_float"] == ["second"]
    samples = nets.noise("evaluation", 8, IMAGE)
    whole, mixed = (
        run_all_in_batches(engines.load("onnxruntime").open(one, 1), samples.feed(range(8)))
        for one in (model, result.model)
    )
    assert all(relative_rms(*pair) < GOOD.rms_error for pair in zip(whole, mixed, strict=True))


def test_what_is_made_does_not_depend_on_goals(bench: Workbench, tmp_path: Path) -> None:
    model = nets.chain(tmp_path / "net.onnx", widest=200)
    strict = [Goal(metric="dice", kind="max_drop", value=0.0001)]
    made = []
    for name, goals in (("none", []), ("strict", strict)):
        context = nets.context(
            bench, model, tmp_path / name, IMAGE, stages=[Quantize(), BuildEngine(targets=["onnxruntime"])], goals=goals
        )
        context = replace(context, samples=_labelled_by(model, context))
        files = quantized_alone(bench, model, tmp_path / name, context=context).model.files()
        made.append({role: digest(path) for role, path in files.items()})
    assert made[0] == made[1]


def test_float_layers_keep_their_weights_and_the_others_are_int8(bench: Workbench, tmp_path: Path) -> None:
    mixed = quantized_alone(bench, nets.chain(tmp_path / "net.onnx", widest=1000), tmp_path / "out")
    graph = onnx.load(mixed.model.path).graph
    kinds = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4]
    assert kinds.count(onnx.TensorProto.FLOAT) == 1
    assert kinds.count(onnx.TensorProto.INT8) == 4


def test_a_mixed_model_is_the_same_every_time(bench: Workbench, tmp_path: Path) -> None:
    model = nets.chain(tmp_path / "net.onnx", widest=1000)
    first, again = (
        quantized_alone(bench, model, tmp_path / name, targets=["cpu-fastest"]).model.files() for name in ("a", "b")
    )
    assert {role: digest(path) for role, path in first.items()} == {role: digest(path) for role, path in again.items()}


def test_a_network_that_int8_does_not_harm_is_not_searched(bench: Workbench, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nets.exported(torch.nn.Conv2d(1, 4, 3), (1, *IMAGE), tmp_path / "net.onnx")
    result = quantized_alone(bench, model, tmp_path / "out", targets=["cpu-fastest"])
    assert (result.model.precision, len(result.details["openvino"]["forms"])) == ("int8", 1)
    assert not any("sensitivity" in result.details[engine] for engine in ("onnxruntime", "openvino"))


def test_tensorrt_gets_symmetric_int8_without_quantized_biases(bench: Workbench, tmp_path: Path) -> None:
    targets = [{"target": "tensorrt-rtx", "compute_capability": "8.9"}]
    result = quantized_alone(bench, nets.chain(tmp_path / "net.onnx", widest=1000), tmp_path / "out", targets=targets)
    by_name = {form.name: form for form in result.model.forms if form.engine == "tensorrt"}
    assert by_name["products"].precision == "int8"
    graph = onnx.load(by_name["good"].path).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    assert all(values[node.input[2]].dtype == np.int8 and not values[node.input[2]].any() for node in pairs)
    biases = [node.input[2] for node in graph.node if node.op_type == "Conv" and len(node.input) > 2]
    assert all(values[name].dtype == np.float32 for name in biases)
    assert by_name["good"].precision == "int8+fp32"


def _labelled_by(model: Model, context: StageContext) -> Any:
    """The context's samples with the network's own decisions for labels: fp32 is right, whatever differs is wrong."""
    runner = engines.load("onnxruntime").open(model, 1)

    def samples(part: str) -> Samples:
        found = context.samples(part)
        return replace(found, read_target=lambda index: runner.run(found.take([index]))[0].argmax(axis=0))

    return samples


# ---------------------------------------------------------------- networks of other kinds


class Depthwise(torch.nn.Module):
    """A block of a mobile network: expand, filter each channel by itself, gate, project."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = torch.nn.Conv2d(3, 24, 1)
        self.filter = torch.nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.gate = torch.nn.Conv2d(24, 24, 1)
        self.project = torch.nn.Conv2d(24, 8, 1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.hardswish(self.expand(inputs))
        found = torch.nn.functional.hardswish(self.filter(found))
        found = found * torch.nn.functional.hardsigmoid(self.gate(found.mean((2, 3), keepdim=True)))
        return self.head(self.project(found).mean((2, 3)))  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "depthwise": (Depthwise, (3, 16, 16)),
    "instance norm": (
        lambda: BasicUNet(spatial_dims=2, in_channels=1, out_channels=3, features=(8, 8, 8, 8, 16, 8)),
        (1, 32, 32),
    ),
    "3D": (
        lambda: BasicUNet(spatial_dims=3, in_channels=1, out_channels=3, features=(4, 4, 8, 8, 8, 4)),
        (1, 32, 32, 32),
    ),
}


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_int8_of_every_kind_of_network_is_right_in_the_end(bench: Workbench, tmp_path: Path, kind: str) -> None:
    build, shape = NETWORKS[kind]
    torch.manual_seed(0)
    model = nets.exported(build(), (1, *shape), tmp_path / "net.onnx")
    context = nets.context(bench, model, tmp_path / "out", shape, stages=[Quantize(), BuildEngine()])
    result = quantized_alone(bench, model, tmp_path / "out", context=context)
    for engine in ("onnxruntime", "openvino"):
        best = min(lost(form, engine, context) for form, _ in forms(result.model, engine) if "int8" in form.precision)
        assert best < CLOSE.rms_error + 0.03, engine


# ---------------------------------------------------------------- what is refused, and what does not pay


def test_a_quantized_model_is_not_quantized_again(bench: Workbench, quantized: StageResult, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="quantized already") as refused:
        bench.run(Quantize(), quantized.model, tmp_path)
    assert refused.value.code == "already_quantized"
    assert "fp32" in str(refused.value.hint)


def test_dynamic_int8_has_u8_weights_and_says_when_it_is_slower(
    bench: Workbench, exported: Model, tmp_path: Path
) -> None:
    result = bench.run(Quantize(scheme="int8_dynamic"), exported, tmp_path, stages=[ExportOnnx(), Quantize()])
    graph = load_onnx_checked(result.model.path).graph
    kinds = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4}
    assert onnx.TensorProto.UINT8 in kinds
    assert onnx.TensorProto.INT8 not in kinds
    assert result.details["slower_than_fp32"] == (result.details["speedup_over_fp32"] < 1)
    assert (result.unpaid is not None) == (result.details["speedup_over_fp32"] < 0.95)


def test_int8_that_is_slower_is_unpaid_unless_engines_are_compared_later_or_bytes_are_asked_for(
    bench: Workbench, tmp_path: Path
) -> None:
    why_unpaid = stages.load("quantize")._why_unpaid
    alone = bench.context(tmp_path, stages=[Quantize()])
    assert why_unpaid({"onnxruntime": 0.5}, alone) == "it does not pay: 2.00 times fp32's latency in onnxruntime"
    assert why_unpaid({"onnxruntime": 0.5, "openvino": 3.0}, alone) is None
    assert why_unpaid({"onnxruntime": 0.5}, bench.context(tmp_path, stages=[Quantize(), BuildEngine()])) is None
    small = [Goal(metric="size", kind="max_ratio", value=0.3)]
    assert why_unpaid({"onnxruntime": 0.5}, bench.context(tmp_path, stages=[Quantize()], goals=small)) is None
