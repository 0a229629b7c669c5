"""A source that came as ONNX is trained like any other: imported, pruned, exported again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shared.errors import StageFailed
from shared.recipe import BuildEngine, Distill, ExportOnnx, ImportOnnx, ModelFormat, Prune, Task, Training
from tests.worker import strangers
from tests.worker.test_any_onnx import PLANE, RAW, TISSUES, Road, recipe_of
from tests.worker.test_onnx_to_torch import export
from tests.worker.workbench import Workbench
from worker.context import Graph, Model
from worker.loading import load_module


@pytest.mark.parametrize(
    "make", [strangers.plain, strangers.channels_last, strangers.weights_as_inputs, strangers.weights_as_nodes]
)
def test_strangers_come_back_with_the_same_outputs(make: Any, tmp_path: Path) -> None:
    layout = "NHWC" if make is strangers.channels_last else "NCHW"
    sample = (*PLANE[1:], 1) if layout == "NHWC" else PLANE
    road = Road(tmp_path, make(tmp_path / "net.onnx"), recipe_of([ImportOnnx()], TISSUES, layout), sample)
    imported = road.run()[0]
    assert road.agreement(imported.model).outputs[0].max_error < 1e-5
    assert isinstance(imported.model.architecture, Graph)
    assert set(imported.model.files()) == {"model", "graph"}
    assert sum(p.numel() for p in load_module(imported.model).parameters()) == road.baseline.parameters


def test_weights_that_do_not_fit_the_graph_are_refused(tmp_path: Path) -> None:
    road = Road(tmp_path, strangers.plain(tmp_path / "net.onnx"), recipe_of([ImportOnnx()]), PLANE)
    imported = road.run()[0].model
    with pytest.raises(StageFailed) as refused:
        load_module(replace(imported, path=_halved(imported)))
    assert refused.value.code == "weights_mismatch"
    assert "The imported network" in refused.value.detail


def _halved(model: Model) -> Path:
    weights = load_module(model).state_dict()
    path = model.path.with_name("halved.safetensors")
    save_file({name: tensor[: len(tensor) // 2 + 1].clone() for name, tensor in weights.items()}, path)
    return path


def test_an_import_that_gives_other_outputs_is_refused(tmp_path: Path) -> None:
    road = Road(tmp_path, strangers.plain(tmp_path / "net.onnx"), recipe_of([ImportOnnx()]), PLANE)
    np.save(tmp_path / "reference.npy", np.load(tmp_path / "reference.npy") * 1.1)
    with pytest.raises(StageFailed, match="differs from the source model") as refused:
        road.run()
    assert refused.value.code == "parity_failed"
    assert "quantize and build_engine take the ONNX as it is" in (refused.value.hint or "")


def test_an_imported_network_is_pruned_trained_and_exported(bench: Workbench, exported_unet: Path) -> None:
    imported = bench.run(ImportOnnx(), Model(ModelFormat.ONNX, exported_unet), exported_unet.parent / "import").model
    stage = Prune(pruning_ratio=0.5, round_to=4, training=Training(epochs=1, batch=8))
    pruned = bench.run(stage, imported, exported_unet.parent / "prune").model
    assert pruned.pruned
    assert isinstance(pruned.architecture, Graph)
    fewer = sum(p.numel() for p in load_module(pruned).parameters())
    assert fewer < 0.6 * sum(p.numel() for p in load_module(imported).parameters())


@pytest.fixture
def exported_unet(bench: Workbench, tmp_path: Path) -> Path:
    sample = torch.from_numpy(bench.samples("train").inputs(0, 2))
    return export(load_module(bench.source), sample, tmp_path / "net.onnx", modern=False)


def test_a_recipe_may_prune_an_onnx_source_after_its_import() -> None:
    task = Task(kind="segmentation", classes=["a", "b"])
    recipe = recipe_of([ImportOnnx(), Prune(), ExportOnnx(), BuildEngine()], task)
    assert "stage:import_onnx" in recipe.requirements()
    with pytest.raises(ValueError, match="put an import_onnx stage before it"):
        recipe_of([Prune(), ExportOnnx(), BuildEngine()], task)
    with pytest.raises(ValueError, match="trains on labels, which need a task"):
        recipe_of([ImportOnnx(), Prune()], RAW)


def test_a_student_is_derived_from_an_imported_source(bench: Workbench, exported_unet: Path) -> None:
    source = Model(ModelFormat.ONNX, exported_unet)
    imported = bench.run(ImportOnnx(), source, exported_unet.parent / "import").model
    onnx_bench = replace(bench, source=source)
    stage = Distill(width=0.5, training=Training(epochs=1, batch=8))
    student = onnx_bench.run(stage, imported, exported_unet.parent / "distill").model
    assert isinstance(student.architecture, Graph)
    fewer = sum(p.numel() for p in load_module(student).parameters())
    assert fewer < 0.6 * sum(p.numel() for p in load_module(imported).parameters())
