"""Customers' files become networks, and what does not fit is refused before memory is spent on it."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import onnx
import psutil
import pytest
import torch
import torchvision.models
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from shared.errors import InvalidFile, StageFailed, UnsafeFormat
from shared.recipe import Architecture, ModelFormat, OnnxSource, TorchSource
from tests.worker.workbench import ARGUMENTS, UNET, Workbench, small_onnx
from worker.architectures import constructor
from worker.context import Model, StageResult
from worker.loading import TensorOutput, digest, load_module, open_source, others_of


def torch_model(path: Path, architecture: Architecture = UNET) -> Model:
    return Model(ModelFormat.TORCH, path, architecture)


# ---------------------------------------------------------------- PyTorch


def test_weights_are_loaded_bit_by_bit(bench: Workbench) -> None:
    module = load_module(bench.source)
    stored = load_file(bench.source.path)
    assert not module.training
    assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "lraspp_mobilenet_v3_large"])
def test_torchvision_networks_are_built_without_a_download(name: str, tmp_path: Path) -> None:
    weights = torchvision.models.get_model(name, weights=None, num_classes=3, **_no_backbone(name)).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    architecture = Architecture(library="torchvision", name=name, arguments={"num_classes": 3})
    module = TensorOutput(load_module(torch_model(tmp_path / "w.safetensors", architecture)))
    assert module(torch.zeros(1, 3, 64, 64)).shape[1] == 3


def _no_backbone(name: str) -> dict[str, Any]:
    return {"weights_backbone": None} if "lraspp" in name else {}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("UNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "channels": [4, 8, 16], "strides": [2, 2]}),
        ("SegResNet", {"spatial_dims": 2, "init_filters": 8, "in_channels": 1, "out_channels": 2}),
        ("DenseNet121", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}),
        ("SwinUNETR", {"in_channels": 1, "out_channels": 2, "spatial_dims": 2, "feature_size": 12}),
        ("EfficientNetBN", {"model_name": "efficientnet-b0", "spatial_dims": 2, "in_channels": 1, "num_classes": 2}),
    ],
)
def test_monai_networks_are_built_by_name(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    architecture = Architecture(library="monai", name=name, arguments=arguments)
    save_file(constructor(architecture)().state_dict(), tmp_path / "w.safetensors")
    module = load_module(torch_model(tmp_path / "w.safetensors", architecture))
    assert TensorOutput(module)(torch.zeros(1, 1, 64, 64)).shape[1] == 2


def test_half_precision_weights_become_fp32(bench: Workbench, tmp_path: Path) -> None:
    stored = {name: tensor.half() for name, tensor in load_file(bench.source.path).items()}
    save_file(stored, tmp_path / "half.safetensors")
    module = load_module(torch_model(tmp_path / "half.safetensors"))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_an_unknown_architecture_is_refused_with_close_names(bench: Workbench) -> None:
    with pytest.raises(StageFailed, match="no network named 'BasicUnett'") as refused:
        load_module(replace(bench.source, architecture=Architecture(library="monai", name="BasicUnett")))
    assert refused.value.code == "unknown_architecture"
    assert "BasicUNet" in (refused.value.hint or "")


@pytest.mark.parametrize("name", ["os", "__builtins__", "Union", "torch", "Module"])
def test_only_networks_are_architectures(bench: Workbench, name: str) -> None:
    with pytest.raises(StageFailed) as refused:
        load_module(replace(bench.source, architecture=Architecture(library="monai", name=name)))
    assert refused.value.code == "unknown_architecture"


@pytest.mark.parametrize(
    "arguments", [{"nonsense": 1}, {"spatial_dims": "two"}, {"features": [8, 8]}, {"act": "no such activation"}]
)
def test_wrong_arguments_are_refused_with_the_right_ones(bench: Workbench, arguments: dict[str, Any]) -> None:
    architecture = Architecture(library="monai", name="BasicUNet", arguments={**ARGUMENTS, **arguments})
    with pytest.raises(StageFailed, match="cannot be built") as refused:
        load_module(replace(bench.source, architecture=architecture))
    assert refused.value.code == "invalid_arguments"
    assert "features" in (refused.value.hint or "")


def test_missing_and_unknown_tensors_are_named(bench: Workbench, tmp_path: Path) -> None:
    stored = load_file(bench.source.path)
    first = next(iter(stored))
    stored["surprise"] = stored.pop(first)
    save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(StageFailed) as refused:
        load_module(torch_model(tmp_path / "w.safetensors"))
    assert refused.value.code == "weights_mismatch"
    assert f"1 missing ({first})" in refused.value.detail
    assert "1 unknown (surprise)" in refused.value.detail


def test_a_wrong_shape_is_told_with_both_shapes(bench: Workbench) -> None:
    architecture = Architecture(library="monai", name="BasicUNet", arguments={**ARGUMENTS, "out_channels": 3})
    with pytest.raises(StageFailed, match=r"final_conv.weight is \[4, 8, 1, 1\], the network has \[3, 8, 1, 1\]"):
        load_module(replace(bench.source, architecture=architecture))


def test_weights_of_integers_are_refused(bench: Workbench, tmp_path: Path) -> None:
    stored = {name: tensor.to(torch.int32) for name, tensor in load_file(bench.source.path).items()}
    save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(StageFailed, match="of another type"):
        load_module(torch_model(tmp_path / "w.safetensors"))


def test_a_network_that_the_weights_do_not_fill_costs_no_memory(bench: Workbench) -> None:
    features = [8192, 8192, 8192, 8192, 8192, 8192]  # 100 GB of weights
    architecture = Architecture(library="monai", name="BasicUNet", arguments={**ARGUMENTS, "features": features})
    before = psutil.Process().memory_info().rss
    with pytest.raises(StageFailed) as refused:
        load_module(replace(bench.source, architecture=architecture))
    assert refused.value.code == "weights_mismatch"
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    count = psutil.virtual_memory().total
    header = json.dumps({"a": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:  # a sparse file: it takes no space
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * count)
    with pytest.raises(StageFailed, match="GiB") as refused:
        load_module(torch_model(path))
    assert refused.value.code == "model_too_large"


def test_one_tensor_comes_out_whatever_the_network_gives() -> None:
    class Giving(torch.nn.Module):
        def __init__(self, what: Any) -> None:
            super().__init__()
            self.what = what

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.what(inputs)

    x = torch.ones(1)
    for what in (
        lambda x: x,
        lambda x: {"aux": x + 1, "out": x},
        lambda x: {"logits": x, "aux": x + 1},
        lambda x: [x, x + 1],
        lambda x: ((x, x + 1), x + 2),
    ):
        assert TensorOutput(Giving(what))(x) is x


def test_a_digest_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sources_are_vetted_before_anything_parses_them(bench: Workbench, tmp_path: Path) -> None:
    torch_source, onnx_source = TorchSource(architecture=UNET, weights=uuid4()), OnnxSource(onnx=uuid4())
    assert open_source(bench.source.path, torch_source, tmp_path) == bench.source
    torch.save(torch.zeros(1), tmp_path / "net.pt")
    with pytest.raises(UnsafeFormat):
        open_source(tmp_path / "net.pt", torch_source, tmp_path)
    with pytest.raises(UnsafeFormat):
        open_source(tmp_path / "net.pt", onnx_source, tmp_path)
    with pytest.raises(InvalidFile):
        open_source(bench.source.path, onnx_source, tmp_path)


def test_a_torchscript_file_is_refused(bench: Workbench, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)), path)
    with pytest.raises(UnsafeFormat, match="TorchScript"):
        open_source(path, TorchSource(architecture=UNET, weights=uuid4()), tmp_path)


def test_an_onnx_source_stays_the_file_that_came(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [4, 1, 3, 3]))
    onnx.save(model, tmp_path / "net.onnx")
    found = open_source(tmp_path / "net.onnx", OnnxSource(onnx=uuid4()), tmp_path)
    assert found == Model(ModelFormat.ONNX, tmp_path / "net.onnx")
    assert others_of(found) == ()


def test_a_copy_is_written_where_ports_had_to_be_settled(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.input.insert(0, helper.make_tensor_value_info("age", TensorProto.FLOAT, ["batch", 1]))
    onnx.save(model, tmp_path / "net.onnx")
    found = open_source(tmp_path / "net.onnx", OnnxSource(onnx=uuid4()), tmp_path)
    assert found.path == tmp_path / "source.onnx"
    assert others_of(found) == ("age",)


def test_a_quantized_source_is_told_as_int8(quantized: StageResult, tmp_path: Path) -> None:
    assert open_source(quantized.model.path, OnnxSource(onnx=uuid4()), tmp_path).precision == "int8"
