"""ONNX of any origin goes the whole way: measured, quantized, built, and held against the file that came."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from monai.networks.nets import BasicUNet
from safetensors.torch import save_file

from shared.errors import StageFailed
from shared.recipe import (
    Architecture,
    Benchmark,
    BuildEngine,
    Data,
    ExportOnnx,
    Goal,
    ModelFormat,
    OnnxSource,
    Preprocessing,
    Quantize,
    Recipe,
    Stage,
    Task,
    TorchSource,
)
from shared.report import Agreement, Measurement
from tests.worker import strangers
from tests.worker.workbench import Drawer, baseline_of
from worker import engines, stages
from worker.cleanup import clean
from worker.context import Model, StageContext, StageResult
from worker.data import Samples, open_samples
from worker.engines import Runner
from worker.evaluation.agreement import decisions, keep_reference
from worker.evaluation.once import Evaluations
from worker.loading import open_source, others_of
from worker.predict import load_engine

RAW = Task(kind="raw")
TISSUES = Task(kind="segmentation", classes=["air", "grey", "white"], background=0)
LESION = Task(kind="segmentation", classes=["healthy", "lesion"], background=0, scores="probabilities")
AGES = Task(kind="classification", classes=["young", "middle", "old"])
PLANE = (1, strangers.SIZE, strangers.SIZE)


class Road:
    """A source on its way through stages, as the pipeline would take it; the labels are what the source decides."""

    def __init__(self, directory: Path, path: Path, recipe: Recipe, sample: tuple[int, ...], **others: tuple[int, ...]):
        self.directory, self.recipe = directory, recipe
        self.source = open_source(path, recipe.source, directory)
        self.others = others_of(self.source)
        self.runner = engines.load("onnxruntime" if self.source.path.suffix == ".onnx" else "torch eager").open(
            self.source, 1
        )
        self._write_data(sample, others)
        keep_reference(self.runner, self.samples("evaluation"), self.reference)
        self.baseline: Measurement = baseline_of(self.source, self.runner, self.samples("evaluation"), recipe)
        self.evaluations = Evaluations(recipe, self.samples, lambda: (self.source, self.runner))
        self.evaluations.source_outputs = self.reference

    @property
    def reference(self) -> Path:
        return self.directory / "reference.npy"

    def agreement(self, model: Model) -> Agreement:
        home = "torch eager" if model.format == ModelFormat.TORCH else "onnxruntime"
        return self.evaluations.of(self.reference, model, engines.load(home).open(model, 1)).agreement

    def source_graph(self) -> tuple[Model, Runner]:
        """The source model as cleaned ONNX, in ONNX Runtime."""
        path = self.directory / "graph" / "model.onnx"
        if not path.exists():
            path.parent.mkdir()
            if self.source.format == ModelFormat.TORCH:
                context = replace(self._context(path.parent), onnxruntime=self.source_graph)
                stages.load("export_onnx").run(ExportOnnx(), self.source, context)
            else:
                clean(self.source.path, path)
        graph = Model(ModelFormat.ONNX, path)
        return graph, engines.load("onnxruntime").open(graph, 1)

    def _write_data(self, sample: tuple[int, ...], others: dict[str, tuple[int, ...]]) -> None:
        rng, tensors = np.random.default_rng(0), dict[str, torch.Tensor]()
        for part, count in (("calibration", 8), ("evaluation", 12)):
            for name, shape in {"images": sample, **others}.items():
                tensors[f"{part}.{name}"] = torch.from_numpy(rng.normal(size=(count, *shape)).astype(np.float32))
        save_file(tensors, self.directory / "data.safetensors")
        if self.recipe.task.target is not None:
            images = self.samples("evaluation", RAW)
            found = decisions(self.runner.run(images.feed(range(len(images)))), self.recipe.task)
            shape = (len(images),) if self.recipe.task.kind == "classification" else (len(images), *_plane(sample))
            tensors[f"evaluation.{self.recipe.task.target}"] = torch.from_numpy(found.reshape(shape))
            save_file(tensors, self.directory / "data.safetensors")

    def samples(self, part: str, task: Task | None = None) -> Samples:
        path, data = self.directory / "data.safetensors", self.recipe.data
        return open_samples(path, "safetensors", part, data, task or self.recipe.task, self.others)

    def run(self) -> list[StageResult]:
        model, found = self.source, []
        for position, stage in enumerate(self.recipe.stages):
            directory = self.directory / str(position)
            directory.mkdir()
            found.append(stages.load(stage.kind).run(stage, model, self._context(directory)))
            model = found[-1].model
        return found

    def _context(self, directory: Path) -> StageContext:
        return StageContext(
            recipe=self.recipe,
            directory=directory,
            samples=self.samples,
            source=self.source,
            reference=self.reference,
            evaluate=partial(self.evaluations.of, self.reference),
            onnxruntime=self.source_graph,
            baseline=self.baseline,
            progress=lambda fraction, message="": None,
            checkpoints=Drawer(),
            timings=Drawer(),
            seed=0,
            threads=1,
        )


def _plane(sample: tuple[int, ...]) -> tuple[int, ...]:
    return sample[:-1] if sample[-1] == 1 else sample[1:]


def recipe_of(wanted: list[Stage], task: Task = RAW, layout: Any = "NCHW", **source: Any) -> Recipe:
    return Recipe(
        source=OnnxSource(onnx=uuid4(), **source),
        task=task,
        data=Data(artifact=uuid4(), preprocessing=Preprocessing(layout=layout)),
        stages=wanted,
        benchmark=Benchmark(runs=10, batches=[1, 3]),
    )


INT8: list[Stage] = [Quantize(calibration_samples=8), BuildEngine()]
FAR = {
    "fixed batch": (lambda path: strangers.plain(path, batch=2), PLANE, "NCHW"),
    "opset 9": (lambda path: strangers.plain(path, opset=9), PLANE, "NCHW"),
    "opset 21": (lambda path: strangers.plain(path, opset=21, ir_version=10), PLANE, "NCHW"),
    "channels last": (strangers.channels_last, (*PLANE[1:], 1), "NHWC"),
    "weights as inputs": (strangers.weights_as_inputs, PLANE, "NCHW"),
    "weights as nodes": (strangers.weights_as_nodes, PLANE, "NCHW"),
    "volumes": (strangers.volumes, (1, 8, *PLANE[1:]), "NCHW"),
}


@pytest.mark.parametrize("origin", FAR)
def test_it_is_quantized_built_and_measured_without_a_training_set(origin: str, tmp_path: Path) -> None:
    make, sample, layout = FAR[origin]
    road = Road(tmp_path, make(tmp_path / "net.onnx"), recipe_of(INT8, TISSUES, layout), sample)
    assert road.baseline.metrics["dice"] == 1
    assert road.baseline.parameters == sum(value.size for value in strangers.filters(len(sample) - 1).values())
    assert road.baseline.macs == np.prod(sample) * (8 + 8 * 3) * 3 ** (len(sample) - 1)
    quantized, built = road.run()
    assert 0 < road.agreement(quantized.model).outputs[0].rms_error < 0.3
    assert built.agreement is not None
    assert built.agreement.passed
    assert built.measurement is not None
    assert built.measurement.metrics["dice"] > 0.8
    assert built.measurement.class_metrics.keys() == set(TISSUES.classes)
    assert set(built.measurement.throughput_per_second) == {1, 3}


@pytest.mark.parametrize("stage", [Quantize(scheme="fp16"), Quantize(calibration_samples=8)], ids=["fp16", "int8"])
def test_without_a_task_closeness_to_the_source_and_speed_are_measured(stage: Stage, tmp_path: Path) -> None:
    road = Road(tmp_path, strangers.plain(tmp_path / "net.onnx"), recipe_of([stage, BuildEngine()]), PLANE)
    assert (road.baseline.metrics, road.baseline.class_metrics) == ({}, {})
    built = road.run()[-1]
    assert built.measurement is not None
    assert {"rms_error"} <= built.measurement.metrics.keys() <= {"rms_error", "agreement", "fidelity_dice"}
    assert built.measurement.latency_ms.p50 > 0


def test_the_probability_of_one_class_is_a_segmentation(tmp_path: Path) -> None:
    road = Road(tmp_path, strangers.one_channel(tmp_path / "net.onnx"), recipe_of(INT8, LESION), PLANE)
    assert road.baseline.metrics["dice"] == 1
    built = road.run()[-1]
    assert built.measurement is not None
    assert built.measurement.metrics["dice"] > 0.8
    assert 0.8 < built.measurement.metrics["agreement"] <= 1


@pytest.mark.parametrize("wanted", [INT8, [BuildEngine(targets=["openvino"])]], ids=["int8", "openvino"])
def test_several_inputs_and_outputs_go_the_whole_way(wanted: list[Stage], tmp_path: Path) -> None:
    recipe = recipe_of(wanted, AGES, constants={"slope": 0.5}, outputs={"logits": "scores"})
    road = Road(tmp_path, strangers.with_age(tmp_path / "net.onnx"), recipe, PLANE, age=(1,))
    assert road.baseline.metrics["top1"] == 1
    assert road.baseline.macs == 256 * 8 * 9 + 9 * 3
    built = road.run()[-1]
    assert built.measurement is not None
    assert built.measurement.metrics["top1"] > 0.5
    manifest = load_engine(built.model.path).manifest
    assert [port.name for port in manifest.inputs] == ["image", "age"]
    assert [port.name for port in manifest.outputs] == ["scores"]


def test_outputs_that_are_not_named_are_kept_and_held(tmp_path: Path) -> None:
    recipe = recipe_of([BuildEngine(targets=["openvino"])], constants={"slope": 0.5})
    road = Road(tmp_path, strangers.with_age(tmp_path / "net.onnx"), recipe, PLANE, age=(1,))
    assert (tmp_path / "reference.1.npy").exists()
    built = road.run()[-1]
    assert built.agreement is not None
    assert [output.passed for output in built.agreement.outputs] == [True, True]
    assert [port.name for port in load_engine(built.model.path).manifest.outputs] == ["embedding", "scores"]


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    road = Road(tmp_path, strangers.plain(tmp_path / "net.onnx"), recipe_of(INT8[:1]), PLANE)
    quantized = road.run()[0].model
    (tmp_path / "again").mkdir()
    again = Road(tmp_path / "again", quantized.path, recipe_of(INT8), PLANE)
    assert again.source.precision == "int8"
    with pytest.raises(StageFailed, match="is quantized already") as refused:
        again.run()
    assert refused.value.code == "already_quantized"


def test_a_raised_opset_computes_the_same(tmp_path: Path) -> None:
    road = Road(tmp_path, strangers.plain(tmp_path / "net.onnx", opset=9), recipe_of(INT8[:1]), PLANE)
    found = road.run()[0].model
    assert onnx.load(found.path).opset_import[0].version >= 13
    session = onnxruntime.InferenceSession(found.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "image"


VOLUMES: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "features": [8, 8, 8, 8, 8, 8],
}


@pytest.mark.parametrize("wanted", [[ExportOnnx(), *INT8], [ExportOnnx(), BuildEngine()]], ids=["int8", "fp32"])
def test_a_3d_network_goes_from_pytorch_to_an_engine(wanted: list[Stage], tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(BasicUNet(**VOLUMES).state_dict(), tmp_path / "w.safetensors")
    architecture = Architecture(library="monai", name="BasicUNet", arguments=VOLUMES)
    recipe = recipe_of([BuildEngine()], TISSUES).model_copy(
        update={"source": TorchSource(architecture=architecture, weights=uuid4()), "stages": wanted}
    )
    road = Road(tmp_path, tmp_path / "w.safetensors", recipe, (1, 32, 32, 32))
    assert road.baseline.metrics["dice"] == pytest.approx(1)
    assert road.baseline.metrics["hd95"] == 0
    results = road.run()
    built = results[-1]
    assert built.measurement is not None
    assert built.measurement.metrics["dice"] > 0.7
    assert road.agreement(results[0].model).outputs[0].max_error < 1e-3


def test_goals_of_quality_need_a_task() -> None:
    with pytest.raises(ValueError, match="a goal of dice needs a task"):
        Recipe.model_validate(
            {**recipe_of(INT8).model_dump(), "goals": [Goal(metric="dice", kind="max_drop", value=0.01)]}
        )


def test_the_task_may_be_left_out() -> None:
    told = {name: value for name, value in recipe_of(INT8).model_dump().items() if name != "task"}
    assert Recipe.model_validate(told).task == RAW


