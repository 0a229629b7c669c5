"""An exported network is the source model in another file, or the stage fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import StageFailed
from shared.recipe import Architecture, ExportOnnx, ModelFormat, stage_kinds
from tests.worker.workbench import Workbench
from worker import engines, stages
from worker.context import Model
from worker.loading import digest
from worker.vetting import load_onnx_checked


def test_every_kind_of_the_language_has_its_module() -> None:
    assert all(callable(stages.load(kind).run) for kind in stage_kinds())


def test_the_result_is_a_whole_onnx_file_with_a_dynamic_batch(bench: Workbench, tmp_path: Path) -> None:
    result = bench.run(ExportOnnx(), bench.source, tmp_path)
    assert result.model == Model(ModelFormat.ONNX, tmp_path / "model.onnx")
    model = load_onnx_checked(result.model.path)
    assert result.details["dynamic_batch"] is True
    ports = (*model.graph.input, *model.graph.output)
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in ports] == ["batch"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_it_computes_what_the_network_computes_on_real_samples(bench: Workbench, tmp_path: Path) -> None:
    agreement = bench.agreement(bench.run(ExportOnnx(), bench.source, tmp_path).model)
    (output,) = agreement.outputs
    assert (output.passed, output.decisions, output.dice) == (True, 1.0, 1.0)
    assert output.max_error < 1e-4


def test_the_report_has_the_opset_that_the_file_has(bench: Workbench, tmp_path: Path) -> None:
    details = bench.run(ExportOnnx(opset=18), bench.source, tmp_path).details
    model = onnx.load(tmp_path / "model.onnx")
    assert details["opset_asked"] == 18
    assert details["opset"] == next(entry.version for entry in model.opset_import if not entry.domain)


def test_a_fixed_batch_is_exported_as_one(bench: Workbench, tmp_path: Path) -> None:
    result = bench.run(ExportOnnx(dynamic_batch=False), bench.source, tmp_path)
    assert result.details["dynamic_batch"] is False
    assert bench.agreement(result.model).passed


def test_exporting_twice_gives_the_same_bytes(bench: Workbench, exported: Model, tmp_path: Path) -> None:
    assert digest(bench.run(ExportOnnx(), bench.source, tmp_path).model.path) == digest(exported.path)


def test_the_file_tells_nothing_of_this_machine(exported: Model) -> None:
    content = exported.path.read_bytes()
    assert b"site-packages" not in content
    assert b"/torch/" not in content


def test_a_network_that_differs_from_the_source_fails(bench: Workbench, tmp_path: Path) -> None:
    stored = {name: tensor * 1.1 for name, tensor in load_file(bench.source.path).items()}
    save_file(stored, tmp_path / "other.safetensors")
    other = Model(ModelFormat.TORCH, tmp_path / "other.safetensors", bench.source.architecture)
    with pytest.raises(StageFailed, match="differs from the source model") as refused:
        bench.run(ExportOnnx(), other, tmp_path / "out")
    assert refused.value.code == "parity_failed"


def test_a_network_that_gives_a_dict_is_exported_by_its_main_output(tmp_path: Path, bench: Workbench) -> None:
    architecture = Architecture(library="torchvision", name="lraspp_mobilenet_v3_large", arguments={"num_classes": 4})
    torch.manual_seed(0)
    module = torch_network(architecture)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    model = Model(ModelFormat.TORCH, tmp_path / "w.safetensors", architecture)
    path = tmp_path / "net.onnx"
    stages.load("export_onnx")._export(module, np.zeros((1, 3, 64, 64), dtype=np.float32), ExportOnnx(), path)
    images = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    expected = engines.load("torch eager").open(model, 1).run(images)
    found = engines.load("onnxruntime").open(Model(ModelFormat.ONNX, path), 1).run(images)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def torch_network(architecture: Architecture) -> torch.nn.Module:
    from worker.architectures import constructor

    return constructor(architecture)().eval()


def test_a_network_that_cannot_be_traced_fails_with_a_sentence(tmp_path: Path) -> None:
    class Deciding(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * 2 if inputs.sum() > 0 else inputs

    inputs = np.zeros((1, 1, 8, 8), dtype=np.float32)
    with pytest.raises(StageFailed, match="cannot be exported") as refused:
        stages.load("export_onnx")._export(Deciding(), inputs, ExportOnnx(), tmp_path / "net.onnx")
    assert refused.value.code == "export_failed"
