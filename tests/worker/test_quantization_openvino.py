"""One quantized network gives every form: layers go back to float by an edit, and nothing else of it changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization

from shared.errors import StageFailed
from shared.recipe import ModelFormat, Task
from tests.worker import digits, nets
from worker import engines
from worker.cleanup import clean
from worker.context import Model
from worker.engines import Runner
from worker.evaluation.agreement import relative_rms
from worker.feed import Floats
from worker.quantization import forms
from worker.quantization import openvino as module
from worker.quantization.calibration import Calibration
from worker.quantization.forms import OpenVinoForms
from worker.quantization.openvino import QuantizedNetwork, Scheme, onnx_name, schemes
from worker.quantization.quality import Level, quality_check

IMAGE = (1, 16, 16)


class Residual(torch.nn.Module):
    """Convolutions, a sum, a pool between two layers, and layers without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.third = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.last = torch.nn.Conv2d(16, 4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        before = torch.relu(self.first(inputs))
        after = torch.relu(self.second(before)) + before
        pooled = torch.nn.functional.max_pool2d(after, 2)
        whole = torch.nn.functional.interpolate(torch.relu(self.third(pooled)), scale_factor=2.0)
        return self.last(torch.cat([whole, after], dim=1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("residual")
    clean(nets.exported(Residual(), (1, *IMAGE), directory / "net.onnx").path, directory / "clean.onnx")
    return directory / "clean.onnx"


def calibration(network: Path, shape: Sequence[int] = IMAGE) -> Calibration:
    name = onnx.load(network).graph.input[0].name
    return Calibration(nets.noise("calibration", 16, shape), range(16), 1, name)


def opened(path: Path) -> Runner:
    runner: Runner = engines.load("openvino").open(Model(ModelFormat.ONNX, path), 1)
    return runner


def quantized(network: Path, scheme: Scheme = module.PLAIN) -> QuantizedNetwork:
    return QuantizedNetwork(network, calibration(network), "minmax", scheme, on_progress=lambda share: None)


@pytest.fixture(scope="module")
def int8(network: Path) -> QuantizedNetwork:
    return quantized(network)


def outputs(path: Path, shape: Sequence[int] = IMAGE) -> Floats:
    runner = engines.load("openvino").open(Model(ModelFormat.ONNX, path), 1)
    return runner.run(nets.noise("evaluation", 8, shape).take(range(8)))


def num_quantizers(path: Path) -> int:
    return sum(node.get_type_name() == "FakeQuantize" for node in openvino.Core().read_model(path).get_ops())


def test_all_layers_in_float_are_the_float_network(network: Path, int8: QuantizedNetwork, tmp_path: Path) -> None:
    path = int8.save(tmp_path / "float.xml", in_float=[name for name, _ in int8.layers])
    assert num_quantizers(path) == 0
    np.testing.assert_allclose(outputs(path), outputs(network), atol=2e-3)


def test_a_layer_in_float_computes_as_the_float_layer_does(
    network: Path, int8: QuantizedNetwork, tmp_path: Path
) -> None:
    """With all others in float too: what it alone loses is then gone, its corrected bias included."""
    _, before, _, after = (name for name, is_product in int8.layers if is_product)
    alone = int8.save_alone(tmp_path / "alone.xml", [after])
    assert 0 < relative_rms(outputs(network), outputs(alone)) < 0.05
    both = int8.save_alone(tmp_path / "both.xml", [before, after])
    assert relative_rms(outputs(network), outputs(both)) > relative_rms(outputs(network), outputs(alone))


def test_forms_with_more_in_float_lose_less(network: Path, int8: QuantizedNetwork, tmp_path: Path) -> None:
    segments = int8.segments()
    assert [onnx_name(name) for segment in segments for name in segment] == [onnx_name(name) for name, _ in int8.layers]
    errors = [
        relative_rms(
            outputs(network),
            outputs(int8.save(tmp_path / f"{count}.xml", in_float=[n for one in segments[:count] for n in one])),
        )
        for count in (0, len(segments) - 1, len(segments))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 5 * errors[-1]


def test_products_alone_leave_sums_in_float(int8: QuantizedNetwork, tmp_path: Path) -> None:
    assert {is_product for _, is_product in int8.layers} == {True, False}
    path = int8.save(tmp_path / "products.xml", products_only=True)
    assert num_quantizers(path) < num_quantizers(int8.save(tmp_path / "full.xml"))


def test_statistics_are_collected_once_for_all_forms(network: Path, tmp_path: Path) -> None:
    samples = nets.noise("calibration", 16, IMAGE)
    num_read = 0

    def read(index: int) -> Floats:
        nonlocal num_read
        num_read += 1
        return samples.read_input(index)

    watched = Calibration(
        type(samples)("calibration", 16, read, None), range(16), 1, onnx.load(network).graph.input[0].name
    )
    found = QuantizedNetwork(network, watched, "minmax", on_progress=lambda share: None)
    once = num_read
    for position, (name, _) in enumerate(found.layers):
        found.save(tmp_path / f"{position}.xml", in_float=[name])
        found.save_alone(tmp_path / f"alone-{position}.xml", [name])
    assert num_read == once <= 3 * 16


def test_a_form_is_the_same_bytes_every_time(network: Path, int8: QuantizedNetwork, tmp_path: Path) -> None:
    first, again = (one.save(tmp_path / f"{name}.xml") for name, one in (("a", int8), ("b", quantized(network))))
    assert first.read_bytes() == again.read_bytes()
    assert first.with_suffix(".bin").read_bytes() == again.with_suffix(".bin").read_bytes()


# ---------------------------------------------------------------- schemes


class Activated(torch.nn.Module):
    def __init__(self, activation: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), activation, torch.nn.Conv2d(8, 4, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)  # type: ignore[no-any-return]


class Attention(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(inputs @ inputs.transpose(-1, -2), dim=-1)
        return weights @ inputs


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: Activated(torch.nn.ReLU()), ["plain"]),
        (lambda: Activated(torch.nn.PReLU()), ["plain", "mixed preset"]),
        (lambda: Activated(torch.nn.GELU()), ["plain", "mixed preset"]),
        (lambda: Activated(torch.nn.ELU()), ["plain", "mixed preset"]),
        (Attention, ["plain", "transformer"]),
    ],
)
def test_schemes_fit_the_network(tmp_path: Path, build: type, names: list[str]) -> None:
    nets.exported(build(), (1, *IMAGE), tmp_path / "net.onnx")
    clean(tmp_path / "net.onnx", tmp_path / "clean.onnx")
    assert [scheme.name for scheme in schemes(tmp_path / "clean.onnx")] == names


@pytest.mark.parametrize(("needed", "expected"), [(True, "enable"), (False, None)])
def test_weights_keep_to_seven_bits_where_the_cpu_would_overflow(
    network: Path, monkeypatch: pytest.MonkeyPatch, needed: bool, expected: str | None
) -> None:
    seen = []

    class Watched(MinMaxQuantization):  # type: ignore[misc]
        def __init__(self, **words: object) -> None:
            seen.append(words["overflow_fix"])
            super().__init__(**words)

    monkeypatch.setattr(module, "int8_needs_reduced_range", lambda: needed)
    monkeypatch.setattr("nncf.quantization.algorithms.post_training.pipeline.MinMaxQuantization", Watched)
    quantized(network)
    assert seen == [expected]


def test_int8_of_a_trained_mobile_network_decides_as_it_did(tmp_path: Path) -> None:
    """HardSwish stays one operator, as it is quantized best; agreement says something of trained networks only."""
    shape = (1, 28, 28)
    trained = digits.trained(digits.mobile(), epochs=1, learning_rate=1e-2)
    clean(nets.exported(trained, (1, *shape), tmp_path / "net.onnx").path, tmp_path / "clean.onnx")
    name = onnx.load(tmp_path / "clean.onnx").graph.input[0].name
    samples = Calibration(digits.part("calibration"), range(64), 1, name)
    path = QuantizedNetwork(tmp_path / "clean.onnx", samples, "minmax", on_progress=lambda share: None).save(
        tmp_path / "int8.xml"
    )
    images = digits.part("evaluation").take(range(200))
    expected, found = (
        engines.load("openvino").open(Model(ModelFormat.ONNX, one), 1).run(images).argmax(axis=1)
        for one in (tmp_path / "clean.onnx", path)
    )
    assert (expected == found).mean() >= 0.9  # of a network that is hardly trained; of a broken one, 0.25


def test_a_scheme_that_fails_costs_no_form_of_another_one(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(*given: Any, **options: Any) -> QuantizedNetwork:
        if given[3] is module.MIXED:
            raise StageFailed("NNCF finds no ranges", code="quantize_failed")
        return QuantizedNetwork(*given, **options)

    monkeypatch.setattr(forms, "schemes", lambda path: [module.PLAIN, module.MIXED])
    monkeypatch.setattr(forms, "CLOSE", Level("close", rms_error=0.0, loss=0.0))  # so that both are tried
    monkeypatch.setattr(forms, "QuantizedNetwork", quantize)
    check = quality_check(opened(network), nets.noise("calibration", 16, IMAGE), range(16), Task(kind="raw"))
    made = OpenVinoForms(network, calibration(network), "minmax", tmp_path, opened).whole(check, lambda share: None)
    assert made[0].name == "full"
    assert made[0].path.exists()


# ---------------------------------------------------------------- bias correction


def chain(kernel: int) -> torch.nn.Module:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for channels in (1, 8, 8):
        layers += [torch.nn.Conv2d(channels, 8, kernel, padding=kernel // 2), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize(
    ("kernel", "scheme"), [(1, "plain"), (5, "plain, without bias correction")], ids=["no borders", "wide borders"]
)
def test_biases_are_corrected_only_where_that_loses_less(tmp_path: Path, kernel: int, scheme: str) -> None:
    clean(nets.exported(chain(kernel), (1, 1, 8, 8), tmp_path / "net.onnx").path, tmp_path / "clean.onnx")
    name = onnx.load(tmp_path / "clean.onnx").graph.input[0].name
    part = nets.noise("calibration", 32, (1, 8, 8))
    check = quality_check(opened(tmp_path / "clean.onnx"), part, range(16), Task(kind="raw"))
    made = OpenVinoForms(tmp_path / "clean.onnx", Calibration(part, range(16), 1, name), "minmax", tmp_path, opened)
    form = made.whole(check, lambda share: None)[0]
    errors = [check.error(opened(tmp_path / f"full-plain{which}.xml")) for which in ("", "-uncorrected")]
    assert made.scheme == scheme
    assert max(errors) > 1.05 * min(errors)
    assert check.error(opened(form.path)) == min(errors)
    assert made.quantized is not None
    in_float = made.mixed(tuple(name for name, _ in made.quantized.layers))
    assert check.error(opened(in_float)) < 2e-3
