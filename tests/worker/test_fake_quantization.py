"""A network that rounds as its int8 will: where it rounds, how, and that nothing of it is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from monai.networks.nets import BasicUNet
from onnx import numpy_helper
from torch import nn
from torch.nn.utils import parametrize

from shared.errors import StageFailed
from shared.recipe import ModelFormat
from tests.worker import nets
from worker import engines
from worker.cleanup import clean
from worker.context import Model
from worker.data import Samples
from worker.fake_quantization import FakeQuantization, Range, RoundedWeight, survey
from worker.quantization.calibration import Calibration, measure_ranges
from worker.quantization.qdq import write_qdq

SHAPE = (3, 32, 32)


class Mobile(nn.Module):
    """Convolutions with BatchNorms, one of them depthwise, a residual, and a head that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.filter, self.filter_norm = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.project, self.project_norm = nn.Conv2d(16, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.up, self.head, self.extra = nn.ConvTranspose2d(3, 6, 2, 2), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = torch.relu_(self.expand_norm(self.expand(inputs)))
        found = nn.functional.hardswish(self.filter_norm(self.filter(found)))
        found = self.up(inputs + self.project_norm(self.project(found))).movedim(1, -1)
        return self.head(found) + self.extra(found) if self.training else self.head(found)  # type: ignore[no-any-return]


@pytest.fixture
def network() -> Mobile:
    """With BatchNorms that have something to fold: no factor is one, one is negative."""
    torch.manual_seed(0)
    found = Mobile().train()
    for layer in found.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.2, 3.0)
            nn.init.normal_(layer.bias)
            with torch.no_grad():
                layer.weight[1] *= -1
    with torch.no_grad():
        for _ in range(20):
            found(batch(seed=1))
    return found.eval()


def batch(count: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def rounding(network: nn.Module, *batches: torch.Tensor, symmetric: bool = False) -> FakeQuantization:
    found = FakeQuantization(network, batch(2), symmetric=symmetric)
    found.watch(batches or [batch()])
    return found


# ---------------------------------------------------------------- where


def test_products_are_rounded_and_what_leaves_them_behind_their_batch_norms(network: Mobile) -> None:
    products, outputs = survey(network, batch(2))
    assert products == ["expand", "filter", "project", "up", "head"]
    # not behind the ReLU's, which the writers give the range of its result, and not the network's own output
    assert outputs == ["filter_norm", "project_norm", "up"]


def test_the_network_s_own_output_is_not_rounded() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(), nn.Conv2d(4, 2, 1))
    assert survey(network, batch(2)) == (["0", "2"], ["0"])


def test_a_network_that_the_sample_does_not_fit_is_refused_with_a_sentence(network: Mobile) -> None:
    with pytest.raises(StageFailed, match=r"cannot be run on inputs of shape \[2, 5, 16, 16\]") as refused:
        survey(network, torch.zeros(2, 5, 16, 16))
    assert refused.value.code == "input_mismatch"


def test_a_network_without_products_is_refused_with_a_sentence() -> None:
    with pytest.raises(StageFailed, match="no convolution or linear layer") as refused:
        FakeQuantization(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), batch(2))
    assert refused.value.code == "nothing_to_round"


# ---------------------------------------------------------------- how


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_has_255_steps_an_output_channel(axis: int) -> None:
    weight = torch.randn(6, 5, 3, 3) * (10.0 ** torch.arange(6)).view(6, 1, 1, 1)
    found = RoundedWeight(axis)(weight)
    others = [dimension for dimension in range(4) if dimension != axis]
    scale = weight.abs().amax(others, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.5001 * scale).all()
    torch.testing.assert_close((found / scale).round(), found / scale, atol=1e-3, rtol=0)


def test_folding_a_batch_norm_changes_no_rounding(network: Mobile) -> None:
    """Rounded and then folded is folded and then rounded, whatever the sign and the size of the factor."""
    factor = network.expand_norm.weight / (network.expand_norm.running_var + network.expand_norm.eps).sqrt()  # type: ignore[operator]
    weight, factor = network.expand.weight.detach(), factor.detach().view(-1, 1, 1, 1)
    torch.testing.assert_close(RoundedWeight(0)(weight) * factor, RoundedWeight(0)(weight * factor))


def test_values_have_256_steps_of_which_zero_is_one() -> None:
    found = Range(symmetric=False)
    found.watching = True
    found(torch.tensor([-1.0, 3.0]))
    found.watching = False
    assert (float(found.low), float(found.high)) == (-1, 3)
    values = torch.linspace(-2, 4, 1000)
    rounded = found.eval()(values)
    assert len(rounded.unique()) == 256
    assert 0 in rounded
    torch.testing.assert_close(rounded, values.clamp(-1, 3), atol=4 / 255, rtol=0)


def test_the_ranges_of_tensorrt_are_symmetric() -> None:
    found = Range(symmetric=True).train()
    found(torch.tensor([-1.0, 3.0]))
    assert (float(found.low), float(found.high)) == (-3, 3)


def test_a_range_grows_at_once_and_shrinks_slowly() -> None:
    found = Range(symmetric=False).train()
    found(torch.tensor([0.0, 100.0]))
    assert float(found.high) == 100
    found(torch.tensor([0.0, 20.0]))
    assert float(found.high) == pytest.approx(96)
    found.eval()(torch.tensor([0.0, 500.0]))
    assert float(found.high) == pytest.approx(96)


def test_gradients_pass_the_rounding(network: Mobile) -> None:
    rounding(network)
    network.train()(batch()).square().sum().backward()  # type: ignore[no-untyped-call]
    learnt = [parameter.grad for parameter in network.parameters() if parameter.ndim > 1]
    assert len(learnt) == 6
    assert all(gradient is not None and gradient.any() for gradient in learnt)


def test_batch_norms_stand_still_for_they_will_be_folded(network: Mobile) -> None:
    fake, before = rounding(network), copy.deepcopy(network.expand_norm.state_dict())
    network.train()
    network.extra.weight.data.zero_()
    network.extra.bias.data.zero_()
    trained = network(batch(seed=2))
    assert all(torch.equal(value, before[name]) for name, value in network.expand_norm.state_dict().items())
    for found in fake.ranges:
        found.eval()
    torch.testing.assert_close(network.eval()(batch(seed=2)), trained)


def test_a_copy_has_its_own_ranges(network: Mobile) -> None:
    """The averaged network is a copy: what one sees must not move the other."""
    fake = rounding(network)
    twin = copy.deepcopy(network)
    twin.train()(1000 * batch())
    assert all(float(found.high) < 200 for found in fake.ranges)
    assert max(float(found.high) for found in twin.modules() if isinstance(found, Range)) > 1000


# ---------------------------------------------------------------- and nothing is left


def test_what_is_left_is_the_plain_network_with_weights_that_rounding_does_not_change(network: Mobile) -> None:
    before = copy.deepcopy(network)
    rounding(network).remove()
    assert [type(layer) for layer in network.modules()] == [type(layer) for layer in before.modules()]
    assert network.state_dict().keys() == before.state_dict().keys()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())
    assert not any(parametrize.is_parametrized(layer) for layer in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    for name, axis in (("expand", 0), ("filter", 0), ("project", 0), ("up", 1), ("head", 0)):
        weight, was = network.get_submodule(name).weight, before.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        torch.testing.assert_close(weight, RoundedWeight(axis)(was))
        torch.testing.assert_close(weight, RoundedWeight(axis)(weight), atol=1e-7, rtol=1e-5)
    assert torch.equal(network.extra.weight, before.extra.weight)  # it does not run where int8 does


# ---------------------------------------------------------------- as the writers round


def unet() -> nn.Module:
    return BasicUNet(spatial_dims=2, in_channels=3, out_channels=3, features=(8, 8, 8, 8, 8, 8))


@pytest.mark.parametrize(
    ("build", "symmetric"), [(Mobile, False), (unet, False), (unet, True)], ids=["mobile", "unet", "unet symmetric"]
)
def test_rounding_costs_what_the_written_int8_costs(
    build: Callable[[], nn.Module], symmetric: bool, network: Mobile, tmp_path: Path
) -> None:
    module, inputs = (network if build is Mobile else build().eval()), batch()
    exact = module(inputs).detach().numpy()
    outputs = {"written": written(module, inputs, tmp_path, symmetric=symmetric)}
    fake = rounding(module, inputs, symmetric=symmetric)
    outputs["fake"] = module(inputs).detach().numpy()
    fake.remove()
    error = {name: float(np.sqrt(np.square(found - exact).mean())) for name, found in outputs.items()}
    assert error["fake"] == pytest.approx(error["written"], rel=0.5)
    assert error["written"] > 0


def test_the_written_weights_are_the_rounded_ones_folded(network: Mobile, tmp_path: Path) -> None:
    """The int8 that is written of what is left has its very weights: nothing is lost by rounding them once more."""
    rounding(network).remove()
    written(network, batch(), tmp_path)
    float_graph, graph = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("float", "int8"))
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scaled = [node.input[:2] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in kept]
    found = {
        kept[weight].shape: kept[weight] * kept[scale].reshape(-1, *[1] * (kept[weight].ndim - 1))
        for weight, scale in scaled
        if kept[weight].ndim == 4 and kept[weight].shape != (3, 6, 2, 2)  # scaled along its second axis
    }
    assert len(found) == 3
    for tensor in float_graph.initializer:
        if tuple(tensor.dims) in found:
            np.testing.assert_allclose(found[tuple(tensor.dims)], numpy_helper.to_array(tensor), atol=1e-6, rtol=1e-4)


def written(network: nn.Module, inputs: torch.Tensor, directory: Path, *, symmetric: bool = False) -> np.ndarray:
    """Outputs of the network's int8 in ONNX Runtime, with ranges from these very inputs."""
    nets.exported(network, inputs.shape, directory / "net.onnx")
    clean(directory / "net.onnx", directory / "float.onnx")
    samples = Samples("calibration", len(inputs), lambda index: inputs[index].numpy(), None)
    name = onnx.load(directory / "float.onnx").graph.input[0].name
    calibration = Calibration(samples, range(len(inputs)), len(inputs), name)
    measure_ranges(directory / "float.onnx", calibration, "minmax", lambda share: None, directory / "ranges.json")
    write_qdq(
        directory / "float.onnx", directory / "ranges.json", "minmax", directory / "int8.onnx", symmetric=symmetric
    )
    runner = engines.load("onnxruntime").open(Model(ModelFormat.ONNX, directory / "int8.onnx"), 1)
    found: np.ndarray = runner.run(inputs.numpy())
    return found
