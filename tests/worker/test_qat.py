"""Training for int8: what post-training int8 breaks is healed, when it is not needed or not possible, and what is told.

The network is broken on purpose: in two of its three convolutions a weight on a channel that is always zero is so
large that the other weights vanish beside it in eight bits.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from shared.recipe import Architecture, BuildEngine, ExportOnnx, Goal, ModelFormat, Quantize, Stage, Training
from shared.report import Report
from tests.worker.test_training import Cut, Shelf
from tests.worker.workbench import TISSUES, Drawer, Workbench
from tests.worker.workshop import Workshop
from worker import engines, stages
from worker.architectures import new_module
from worker.context import Form, Model, StageContext, StageResult
from worker.evaluation.agreement import keep_reference
from worker.evaluation.metrics import evaluate
from worker.handover import built_of, rebuilt_of
from worker.loading import digest
from worker.qat import Standing
from worker.quantization.quality import GOOD

NETWORK = Architecture(
    library="monai",
    name="UNet",
    arguments={
        "spatial_dims": 2, "in_channels": 1, "out_channels": 4, "channels": [8, 16], "strides": [2], "norm": "batch",
        "act": "relu",
    },
)  # fmt: skip
WIDEST = 150
MOST_LOST = 0.02  # of Dice
TRAINING = Training(epochs=12, batch=6, learning_rate=0.02, ema_decay=0.9)
# int8 of a network of this size is no faster, so it is wanted for its size
GOALS = [
    Goal(metric="dice", kind="max_drop", value=MOST_LOST),
    Goal(metric="size", kind="max_ratio", value=1.0),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, bench: Workbench) -> Model:
    """A U-Net of 4,000 parameters with a Dice of .9 in float, and of .5 in int8."""
    torch.manual_seed(0)
    network = new_module(NETWORK).train()
    samples = bench.samples("train")
    inputs, targets = samples.inputs(0, 24), samples.targets(0, 24)
    assert targets is not None
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(inputs)), torch.from_numpy(targets))
        loss.backward()
        optimizer.step()
    weights = network.eval().state_dict()
    for layer in ("model.0", "model.1.submodule"):  # after the ReLU: zero
        weights[f"{layer}.adn.N.weight"][0], weights[f"{layer}.adn.N.bias"][0] = 0, -1
    bottom, up = weights["model.1.submodule.conv.weight"], weights["model.2.conv.weight"]
    bottom[:, 0], up[0] = WIDEST * bottom.abs().max(), WIDEST * up.abs().max()
    path = tmp_path_factory.mktemp("broken") / "weights.safetensors"
    save_file(weights, path)
    return Model(ModelFormat.TORCH, path, NETWORK)


def context(bench: Workbench, source: Model, directory: Path, *targets: str, **changes: Any) -> StageContext:
    """A job on the source that quantizes, and builds for ONNX Runtime unless other targets are named."""
    directory.mkdir(parents=True)
    runner = engines.load("torch eager" if source.format == ModelFormat.TORCH else "onnxruntime").open(source, 1)
    keep_reference(runner, bench.samples("evaluation"), directory / "source.npy")
    built: list[Stage] = [ExportOnnx(), Quantize(), BuildEngine(targets=list(targets or ["onnxruntime"]))]  # type: ignore[arg-type]
    found = bench.context(directory, stages=built, goals=changes.pop("goals", GOALS))
    network = source if source.format == ModelFormat.TORCH else None
    own = {"source": source, "reference": directory / "source.npy", "network": network}
    return dataclasses.replace(found, **{**own, **changes})


def quantized(model: Model, ctx: StageContext, **words: Any) -> StageResult:
    stage = Quantize(**{"calibration_samples": 8, "accuracy_aware": False, "training": TRAINING, **words})
    result: StageResult = stages.load("quantize").run(stage, model, ctx)
    return result


@pytest.fixture(scope="module")
def exported(broken: Model, bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Model:
    ctx = context(bench, broken, tmp_path_factory.mktemp("exported") / "out")
    result: StageResult = stages.load("export_onnx").run(ExportOnnx(), broken, ctx)
    return result.model


@pytest.fixture(scope="module")
def healed(broken: Model, exported: Model, bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    """The whole stage, for two runtimes."""
    return quantized(exported, context(bench, broken, tmp_path_factory.mktemp("healed") / "out", "cpu-fastest"))


def dice(model: Model, bench: Workbench, engine: str = "onnxruntime") -> float:
    runner = engines.load(engine).open(model, 1)
    return evaluate(runner.run, bench.samples("evaluation"), TISSUES).means["dice"]


# ---------------------------------------------------------------- where post-training int8 misses the goal


def test_what_post_training_int8_breaks_is_brought_back_within_the_gate(
    broken: Model, exported: Model, healed: StageResult, bench: Workbench, tmp_path: Path
) -> None:
    naive = quantized(exported, context(bench, broken, tmp_path / "naive"), training=None).model
    whole = dice(broken, bench, "torch eager")
    assert whole - dice(naive, bench) > 0.1
    assert healed.model.precision == "int8"
    for engine in ("onnxruntime", "openvino"):
        assert whole - dice(healed.model.candidates(engine)[0], bench, engine) <= MOST_LOST


def test_the_report_tells_what_training_did(healed: StageResult) -> None:
    told = healed.details["qat"]
    assert (told["used"], told["reason"]) == (True, "better than post-training int8")
    assert (told["epochs_run"], len(told["history"]), told["train_samples"]) == (12, 12, 24)
    assert told["before"]["missed"].keys() == {"onnxruntime", "openvino"}
    assert "points of the leading metric" in told["before"]["missed"]["onnxruntime"]
    assert told["after"]["missed"] == {}
    assert told["after"]["lost"]["onnxruntime"] < told["before"]["lost"]["onnxruntime"] - 0.1
    for engine in ("onnxruntime", "openvino"):
        assert all(form["layers_in_float"] == [] for form in healed.details[engine]["forms"])


def test_the_result_is_held_against_the_network_that_was_trained(
    healed: StageResult, bench: Workbench, broken: Model, tmp_path: Path
) -> None:
    """Which puts out something else than the source: that alone must not count as a fault of its int8."""
    trained = healed.model.trained()
    assert trained is not None
    assert trained.path.name == "float.onnx"
    assert healed.agreement is not None
    assert healed.agreement.passed
    assert healed.agreement.outputs[0].rms_error < GOOD.rms_error
    against_source = context(bench, broken, tmp_path / "source").reference
    outputs = engines.load("onnxruntime").open(trained, 1).run(bench.samples("evaluation").inputs(0, 1))
    assert np.abs(outputs - np.load(against_source)[:1]).max() > 0.2 * np.abs(outputs).max()


def test_the_float_form_is_as_good_as_its_int8(healed: StageResult, bench: Workbench) -> None:
    """Its weights are those that were rounded: int8 of it has the very same."""
    trained = healed.model.trained()
    assert trained is not None
    assert dice(trained, bench) == pytest.approx(dice(healed.model, bench), abs=0.02)
    assert not {node.op_type for node in onnx.load(trained.path).graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    for tensor in onnx.load(trained.path).graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.ndim == 4:
            axis = 1 if weight.shape[:2] == (24, 4) else 0
            others = tuple(dimension for dimension in range(4) if dimension != axis)
            steps = weight / np.maximum(np.abs(weight).max(axis=others, keepdims=True) / 127, 1e-12)
            np.testing.assert_allclose(steps, steps.round(), atol=0.01)


def test_only_the_files_of_the_model_and_its_reference_are_left(healed: StageResult) -> None:
    left = {path.name for path in healed.model.path.parent.iterdir() if "checkpoint" not in path.name}
    assert left == {path.name for path in healed.model.files().values()} | {"reference.npy", "source.npy"}


def test_a_later_attempt_holds_what_comes_after_against_the_trained_network_too(
    healed: StageResult, tmp_path: Path
) -> None:
    def restored(model: Model) -> Model:
        return Model(ModelFormat.ONNX, model.path, **rebuilt_of(built_of(model), model.files()))

    assert restored(healed.model) == healed.model
    forms = (Form("any", "fp32", tmp_path / "float.onnx"),)
    plain = Model(ModelFormat.ONNX, tmp_path / "model.onnx", precision="int8", forms=forms)
    assert restored(plain).trained() is None


def test_an_attempt_that_goes_on_in_mid_training_ends_with_the_same_bytes(
    broken: Model, exported: Model, bench: Workbench, tmp_path: Path
) -> None:
    short = TRAINING.model_copy(update={"epochs": 4})
    whole = quantized(exported, context(bench, broken, tmp_path / "whole"), training=short)
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    cut = Shelf(directory=shelf, cut_after=2)
    with pytest.raises(Cut):
        quantized(exported, context(bench, broken, tmp_path / "cut", checkpoints=cut), training=short)
    kept = Drawer(cut.kept)
    resumed = quantized(exported, context(bench, broken, tmp_path / "resumed", checkpoints=kept), training=short)
    assert resumed.details["qat"]["resumed_after"] == 2
    assert resumed.details["qat"]["epochs_run"] == 4
    assert digest(resumed.model.files()["form.any.fp32"]) == digest(whole.model.files()["form.any.fp32"])
    assert digest(resumed.model.path) == digest(whole.model.path)


# ---------------------------------------------------------------- where it is not needed, or no better


def test_where_post_training_int8_is_good_enough_nothing_is_trained(
    broken: Model, exported: Model, bench: Workbench, tmp_path: Path
) -> None:
    ctx = context(bench, broken, tmp_path / "out", checkpoints=NeverAsked())
    result = quantized(exported, ctx, accuracy_aware=True)
    assert result.details["qat"] == {"used": False, "reason": "not needed"}
    assert result.model.trained() is None


class NeverAsked:
    def load(self, name: str) -> Path | None:
        raise AssertionError("nothing is trained")

    def save(self, name: str, path: Path) -> None:
        raise AssertionError("nothing is trained")


def test_training_that_makes_nothing_better_leaves_the_post_training_int8(
    broken: Model, exported: Model, bench: Workbench, tmp_path: Path
) -> None:
    plain = quantized(exported, context(bench, broken, tmp_path / "plain"), training=None)
    train = bench.samples("train")
    misled = dataclasses.replace(train, read_target=lambda index: np.zeros((32, 32), dtype=np.int64))
    ctx = context(
        bench, broken, tmp_path / "out", samples=lambda part: misled if part == "train" else bench.samples(part)
    )
    short = TRAINING.model_copy(update={"epochs": 2, "learning_rate": 0.05, "validation_ratio": 0.0})
    result = quantized(exported, ctx, training=short, soft_targets=None)
    told = result.details["qat"]
    assert (told["used"], told["reason"]) == (False, "no better than post-training int8")
    assert told["after"]["lost"]["onnxruntime"] > told["before"]["lost"]["onnxruntime"]
    assert digest(result.model.files()["form.onnxruntime.int8.full"]) == digest(plain.model.path)
    assert result.model.trained() is None


def test_training_that_fails_leaves_the_post_training_int8_and_says_why(
    broken: Model, exported: Model, bench: Workbench, tmp_path: Path
) -> None:
    few = dataclasses.replace(bench.samples("train"), num_samples=1)
    ctx = context(
        bench, broken, tmp_path / "out", samples=lambda part: few if part == "train" else bench.samples(part)
    )
    result = quantized(exported, ctx, training=TRAINING.model_copy(update={"validation_ratio": 0.25}))
    assert not result.details["qat"]["used"]
    assert result.details["qat"]["reason"].startswith("The train part has 1 samples: too few")
    assert result.model.trained() is None


def standing(missed: int = 0, layers: int = 0, lost: float | None = 0.0) -> Standing:
    named = {f"runtime {index}": "something" for index in range(missed)}
    return Standing(named, layers, {} if lost is None else {"onnxruntime": lost})


@pytest.mark.parametrize(
    ("after", "before"),
    [
        (standing(), standing(missed=1)),
        (standing(missed=1), standing(missed=2)),
        (standing(missed=1, lost=0.01), standing(missed=1, lost=0.02)),
        (standing(layers=1), standing(layers=5)),
        (standing(lost=0.005), standing(missed=1)),
        (standing(lost=None), standing(missed=1, lost=None)),
    ],
)
def test_less_missed_comes_before_less_in_float(after: Standing, before: Standing) -> None:
    assert after.is_better_than(before)
    assert not before.is_better_than(after)


def test_a_point_may_be_lost_for_it_and_no_more() -> None:
    assert not standing(lost=0.05).is_better_than(standing(missed=1, lost=0.03))
    assert standing(lost=0.035).is_better_than(standing(missed=1, lost=0.03))
    assert not standing().is_better_than(standing())


# ---------------------------------------------------------------- where the network comes from, what it is judged on


def test_a_network_that_came_as_onnx_is_brought_back_to_be_trained(
    exported: Model, bench: Workbench, tmp_path: Path
) -> None:
    short = TRAINING.model_copy(update={"epochs": 5})
    result = quantized(exported, context(bench, exported, tmp_path / "out"), training=short)
    told = result.details["qat"]
    assert told["used"]
    assert told["after"]["lost"]["onnxruntime"] < told["before"]["lost"]["onnxruntime"] - 0.1


def test_an_onnx_that_cannot_be_brought_back_keeps_its_int8_and_says_why(
    exported: Model, bench: Workbench, tmp_path: Path
) -> None:
    graph = onnx.load(exported.path)
    for node in graph.graph.node:
        if node.op_type == "Relu":
            node.CopyFrom(onnx.helper.make_node("ThresholdedRelu", node.input, node.output, node.name, alpha=0.0))
    onnx.save(graph, tmp_path / "strange.onnx")
    source = Model(ModelFormat.ONNX, tmp_path / "strange.onnx")
    result = quantized(source, context(bench, source, tmp_path / "out"))
    assert not result.details["qat"]["used"]
    assert "cannot be brought back to PyTorch" in result.details["qat"]["reason"]
    assert "ThresholdedRelu" in result.details["qat"]["reason"]
    assert "form.onnxruntime.int8.full" in result.model.files()


def test_without_labels_on_the_calibration_samples_the_train_part_s_kept_out_ones_judge(
    broken: Model, exported: Model, bench: Workbench, tmp_path: Path
) -> None:
    unlabelled = dataclasses.replace(bench.samples("calibration"), read_target=None)
    ctx = context(
        bench,
        broken,
        tmp_path / "out",
        samples=lambda part: unlabelled if part == "calibration" else bench.samples(part),
    )
    short = TRAINING.model_copy(update={"epochs": 1, "validation_ratio": 0.25})
    result = quantized(exported, ctx, training=short)
    assert result.details["judged_on"] == "6 train samples"
    assert result.details["qat"]["before"]["lost"].keys() == {"onnxruntime"}


# ---------------------------------------------------------------- a whole job


def test_a_job_delivers_the_engine_of_what_was_trained(workshop: Workshop, bench: Workbench, broken: Model) -> None:
    weights = workshop.keep(broken.path, "safetensors")
    data = workshop.keep(bench.directory / "data.safetensors", "safetensors")
    quantize = Quantize(calibration_samples=8, accuracy_aware=False, training=TRAINING)
    job_id = workshop.submit(
        source={"architecture": NETWORK.model_dump(mode="json"), "weights": str(weights)},
        task=TISSUES.model_dump(mode="json"),
        data={"artifact": str(data), "preprocessing": bench.recipe.data.preprocessing.model_dump(mode="json")},
        stages=[
            {"kind": "export_onnx"},
            quantize.model_dump(mode="json"),
            {"kind": "build_engine", "targets": ["onnxruntime"]},
        ],
        goals=[goal.model_dump(mode="json") for goal in GOALS],
    )
    assert workshop.work() == "succeeded"
    report = Report.model_validate(workshop.job(job_id).report)
    assert [stage.status for stage in report.stages] == ["succeeded"] * 3
    assert (report.verdict, report.final) == ("met", 2)
    assert report.stages[1].details["qat"]["used"]
    assert report.stages[1].details["retrained"]
    assert report.stages[2].agreement is not None
    assert report.stages[2].agreement.passed
