"""A small real job for the workshop's tests: a trained U-Net of 44,000 parameters, its data, and its recipe."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch
from monai.networks.nets import BasicUNet
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from safetensors.torch import save_file

from shared.recipe import (
    Architecture,
    Benchmark,
    BuildEngine,
    Data,
    ExportOnnx,
    ModelFormat,
    Preprocessing,
    Quantize,
    Recipe,
    Stage,
    Task,
    TorchSource,
)
from shared.report import Agreement, Measurement
from worker import engines, stages
from worker.benchmark import complexity_of, first, time_in_turns
from worker.context import Form, Model, StageContext, StageResult
from worker.data import Samples, open_samples
from worker.engines import Runner
from worker.evaluation.agreement import keep_reference
from worker.evaluation.once import Evaluations, fields_of
from worker.measurement import Timings, measurement, with_resources

SIZE = 32
ARGUMENTS: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 4,
    "features": [8, 8, 16, 16, 32, 8],
}
UNET = Architecture(library="monai", name="BasicUNet", arguments=ARGUMENTS)
TISSUES = Task(kind="segmentation", classes=["air", "other", "grey", "white"], background=0)


@dataclass(frozen=True)
class Drawer:
    """Checkpoints of one attempt, left where they lie."""

    kept: dict[str, Path] = field(default_factory=dict)

    def load(self, name: str) -> Path | None:
        return self.kept.get(name)

    def save(self, name: str, path: Path) -> None:
        self.kept[name] = path


@dataclass(frozen=True)
class Workbench:
    """The job's files, and its baseline as the pipeline would have measured it."""

    directory: Path
    recipe: Recipe
    source: Model
    reference: Path
    baseline: Measurement

    def samples(self, part: str) -> Samples:
        return open_samples(
            self.directory / "data.safetensors", "safetensors", part, self.recipe.data, self.recipe.task
        )

    def open_source(self) -> Runner:
        home = "torch eager" if self.source.format == ModelFormat.TORCH else "onnxruntime"
        runner: Runner = engines.load(home).open(self.source, 1)
        return runner

    def source_graph(self) -> tuple[Model, Runner]:
        """The source model as ONNX, in ONNX Runtime; exported once for all that share the directory."""
        path = self.directory / "source" / "model.onnx"
        if not path.exists():
            path.parent.mkdir()
            context = replace(self.context(path.parent), onnxruntime=self.source_graph)
            stages.load("export_onnx").run(ExportOnnx(), self.source, context)
        graph = Model(ModelFormat.ONNX, path)
        return graph, engines.load("onnxruntime").open(graph, 1)

    def agreement(self, model: Model) -> Agreement:
        """How close an ONNX or PyTorch model comes to the source, on the runtime that the pipeline judges it on."""
        home = "torch eager" if model.format == ModelFormat.TORCH else "onnxruntime"
        runner: Runner = engines.load(home).open(model, 1)
        return self.context(self.directory).evaluate(model, runner).agreement

    def run(self, stage: Stage, model: Model, directory: Path, **changes: Any) -> StageResult:
        """The stage, in a directory of its own, within a recipe that may be changed."""
        directory.mkdir(parents=True, exist_ok=True)
        result: StageResult = stages.load(stage.kind).run(stage, model, self.context(directory, **changes))
        return result

    def context(self, directory: Path, **changes: Any) -> StageContext:
        recipe = self.recipe.model_copy(update=changes)
        evaluations = Evaluations(recipe, self.samples, lambda: (self.source, self.open_source()))
        evaluations.source_outputs = self.reference
        return StageContext(
            recipe=recipe,
            directory=directory,
            samples=self.samples,
            source=self.source,
            reference=self.reference,
            evaluate=partial(evaluations.of, self.reference),
            onnxruntime=self.source_graph,
            baseline=self.baseline,
            progress=lambda fraction, message="": None,
            checkpoints=Drawer(),
            timings=Drawer(),
            seed=0,
            threads=1,
        )


def set_up(directory: Path) -> Workbench:
    """Train the network for a few seconds, write everything down, measure the baseline."""
    torch.set_num_threads(1)
    recipe = recipe_of(
        [ExportOnnx(), Quantize(calibration_samples=16), BuildEngine()],
        Data(artifact=uuid.uuid4(), preprocessing=Preprocessing(mean=[100.0], std=[50.0])),
    )
    save_file(tissue_data(), directory / "data.safetensors")
    save_file(trained_unet(directory, recipe).state_dict(), directory / "weights.safetensors")
    source = Model(ModelFormat.TORCH, directory / "weights.safetensors", UNET)
    samples = open_samples(directory / "data.safetensors", "safetensors", "evaluation", recipe.data, recipe.task)
    runner = engines.load("torch eager").open(source, 1)
    keep_reference(runner, samples, directory / "reference.npy")
    baseline = baseline_of(source, runner, samples, recipe)
    return Workbench(directory, recipe, source, directory / "reference.npy", baseline)


def baseline_of(source: Model, runner: Runner, samples: Samples, recipe: Recipe) -> Measurement:
    """The source model's figures, as the pipeline would have measured them."""
    evaluations = Evaluations(recipe, lambda part: samples, lambda: (source, runner))
    evaluated = fields_of(evaluations.metrics_of(source, runner, ("hd95", "nsd")), recipe)
    (timed,) = time_in_turns([runner], first(samples, 1), recipe.benchmark)
    row = measurement(source, runner, Timings(timed), complexity_of(source, samples), recipe, samples, evaluated)
    return with_resources(row, source, runner, recipe, samples)


def recipe_of(wanted: list[Stage], data: Data | None = None, task: Task = TISSUES) -> Recipe:
    return Recipe(
        source=TorchSource(architecture=UNET, weights=uuid.uuid4()),
        task=task,
        data=data or Data(artifact=uuid.uuid4()),
        stages=wanted,
        benchmark=Benchmark(runs=20, batches=[1, 4]),
    )


def tissue_data() -> dict[str, torch.Tensor]:
    """Squares of four grey values with noise: 24 training, 16 calibration and 20 evaluation samples."""
    rng = np.random.default_rng(0)
    found = {}
    for part, count in (("train", 24), ("calibration", 16), ("evaluation", 20)):
        masks = np.kron(rng.integers(0, 4, (count, 4, 4)), np.ones((8, 8), dtype=int))
        images = masks[:, None] * 60 + rng.normal(0, 15, (count, 1, SIZE, SIZE))
        found[f"{part}.images"] = torch.from_numpy(images.astype(np.float32))
        found[f"{part}.masks"] = torch.from_numpy(masks.astype(np.uint8))
    return found


def trained_unet(directory: Path, recipe: Recipe) -> torch.nn.Module:
    torch.manual_seed(0)
    network = BasicUNet(**ARGUMENTS)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    samples = open_samples(directory / "data.safetensors", "safetensors", "train", recipe.data, recipe.task)
    inputs, targets = samples.inputs(0, 24), samples.targets(0, 24)
    assert targets is not None
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(inputs)), torch.from_numpy(targets))
        loss.backward()
        optimizer.step()
    return network.eval()


def small_onnx(
    path: Path, *, channels: int = 1, classes: int = 4, batch: int | str = "batch", opset: int = 17
) -> onnx.ModelProto:
    """A convolution of 3x3 and a ReLU, as an ONNX file with one input of 32x32."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(size=(classes, channels, 3, 3)).astype(np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["input", "weight"], ["hidden"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Relu", ["hidden"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, channels, SIZE, SIZE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, classes, SIZE, SIZE])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return model


def symmetric_int8(bench: Workbench, model: Model, path: Path) -> Path:
    """The ONNX in the int8 form that TensorRT takes: symmetric s8, no quantized biases."""
    inputs = bench.samples("calibration").take(range(16))
    batches = iter([{"input": inputs[start : start + 4]} for start in range(0, 16, 4)])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(batches, None)

    quantize_static(
        model.path,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
    return path


def wrong_in_openvino(symmetric: Path, path: Path) -> Form:
    """A real case: symmetric int8 of this U-Net, which OpenVINO computes wrongly unless its converter's passes have
    been over the graph."""
    openvino.save_model(openvino.Core().read_model(symmetric), path, compress_to_fp16=False)
    return Form("openvino", "int8", path)


def only_int8(model: Model) -> Model:
    """The model without its fp32 forms, so that which precision wins does not depend on the machine's mood."""
    return replace(model, forms=tuple(form for form in model.forms if form.precision != "fp32"))


def corrupted(bench: Workbench, model: Model, directory: Path) -> Model:
    """The model with an OpenVINO form of a network with other weights: it runs, and its outputs are wrong."""
    directory.mkdir(parents=True, exist_ok=True)
    small_onnx(directory / "other.onnx")
    openvino = engines.load("openvino")
    wrong = openvino.build(Model(ModelFormat.ONNX, directory / "other.onnx"), directory)
    return replace(model, forms=(Form("openvino", "int8", wrong),))
