"""An ONNX network comes back to PyTorch with the same outputs, or is refused by the operator that stands in the way."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
import torchvision.models
from monai.networks.nets import BasicUNet, SegResNet, UNet
from onnx import helper
from torch import nn

from shared.errors import StageFailed
from tests.worker import strangers
from tests.worker.test_any_onnx import PLANE
from worker.onnx_to_torch import load_graph, write_graph

SMALL = {"in_channels": 1, "out_channels": 3, "features": [8, 8, 8, 8, 8, 8]}
NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), (2, 3, 32, 32)),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=4), (2, 3, 32, 32)),
    "BasicUNet": (lambda: BasicUNet(spatial_dims=2, **SMALL), (2, 1, 32, 32)),
    "BasicUNet, bilinear": (lambda: BasicUNet(spatial_dims=2, **SMALL, upsample="nontrainable"), (2, 1, 32, 32)),
    "BasicUNet 3D": (lambda: BasicUNet(spatial_dims=3, **SMALL), (2, 1, 32, 32, 32)),
    "UNet": (lambda: UNet(2, 1, 3, [8, 16, 32], [2, 2]), (2, 1, 32, 32)),
    "SegResNet": (lambda: SegResNet(2, 8, 1, 3), (2, 1, 32, 32)),
}


def export(network: nn.Module, sample: torch.Tensor, path: Path, *, modern: bool) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if modern:
            shapes = ({0: torch.export.Dim.DYNAMIC},)
            torch.onnx.export(
                network, (sample,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
            )
        else:
            axes = {"x": {0: "batch"}}
            torch.onnx.export(
                network, (sample,), path, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes
            )
    return path


@pytest.mark.parametrize("modern", [False, True], ids=["opset 17", "newer"])
@pytest.mark.parametrize("name", NETWORKS)
def test_exports_of_both_ages_come_back(name: str, modern: bool, tmp_path: Path) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    network, sample = make().eval(), torch.randn(shape)
    write_graph(export(network, sample, tmp_path / "net.onnx", modern=modern), tmp_path / "graph.onnx")
    with torch.no_grad():
        torch.testing.assert_close(load_graph(tmp_path / "graph.onnx")(sample), network(sample), atol=1e-5, rtol=1e-4)


def test_an_operator_that_stands_in_the_way_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("convnext_atto", num_classes=3).eval()
    path = export(network, torch.randn(2, 3, 32, 32), tmp_path / "net.onnx", modern=True)
    with pytest.raises(StageFailed, match="Gelu") as refused:
        write_graph(path, tmp_path / "graph.onnx")
    assert refused.value.code == "not_importable"
    assert "quantize and build_engine take the ONNX as it is" in (refused.value.hint or "")


def test_an_operator_that_the_converter_lacks_is_named(tmp_path: Path) -> None:
    model = onnx.load(strangers.plain(tmp_path / "net.onnx"))
    model.graph.node[1].CopyFrom(helper.make_node("ThresholdedRelu", ["c1"], ["r1"]))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(StageFailed, match="ThresholdedRelu") as refused:
        write_graph(tmp_path / "net.onnx", tmp_path / "graph.onnx")
    assert refused.value.code == "not_importable"


def test_several_inputs_cannot_be_trained(tmp_path: Path) -> None:
    path = strangers.with_age(tmp_path / "net.onnx")
    model = onnx.load(path)
    ordered = [model.graph.input[2], model.graph.input[0]]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.float32), "slope"))
    del model.graph.input[:]
    model.graph.input.extend(ordered)
    onnx.save(model, path)
    with pytest.raises(StageFailed, match="has 2 inputs"):
        write_graph(path, tmp_path / "graph.onnx")


# ---------------------------------------------------------------- names are not code


@pytest.mark.parametrize("evil", ['x", __import__("os").abort(), "', "a\n    raise SystemExit", "weights.of/layer 1"])
def test_names_of_the_file_never_become_python(evil: str, tmp_path: Path) -> None:
    model = onnx.load(strangers.plain(tmp_path / "net.onnx"))
    model.graph.node[0].name = evil
    model.graph.node[1].input[0] = model.graph.node[0].output[0] = evil
    model.graph.input[0].name = model.graph.node[0].input[0] = f"{evil}2"
    model.graph.initializer[0].name = model.graph.node[0].input[1] = f"{evil}3"
    onnx.save(model, tmp_path / "net.onnx")
    write_graph(tmp_path / "net.onnx", tmp_path / "graph.onnx")
    network = load_graph(tmp_path / "graph.onnx")
    assert isinstance(network, torch.fx.GraphModule)
    assert "import" not in network.code
    assert network(torch.zeros(1, *PLANE)).shape == (1, 3, *PLANE[1:])


def test_a_graph_that_the_import_did_not_write_is_not_converted(tmp_path: Path) -> None:
    model = onnx.load(strangers.plain(tmp_path / "net.onnx"))
    model.graph.node[0].name = "not plain"
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(StageFailed, match="no plain words"):
        load_graph(tmp_path / "net.onnx")


def test_the_same_file_gives_the_same_graph(tmp_path: Path) -> None:
    strangers.plain(tmp_path / "net.onnx")
    for name in ("a", "b"):
        write_graph(tmp_path / "net.onnx", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
