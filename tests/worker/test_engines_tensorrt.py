"""TensorRT builds ahead of time, says by name what it refuses, can be cancelled, and runs only where it can."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from monai.networks.nets import BasicUNet
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from shared.errors import StageFailed
from shared.recipe import ModelFormat
from shared.targets import Batches
from tests.worker import strangers
from tests.worker.workbench import small_onnx
from worker.context import Model
from worker.engines import tensorrt
from worker.engines.cuda import gpu
from worker.engines.tensorrt import Phases, Plan

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT for RTX is not installed: pip install '.[rtx]' (NVIDIA's licence)",
)
SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
UNET = BasicUNet(2, 1, 4, features=(8, 8, 16, 16, 32, 8))


def rtx(sample: tuple[int, ...] = (1, 32, 32), **changes: Any) -> Plan:
    return Plan("tensorrt_rtx", sample, **{"compute_capability": "8.9", **changes})


def silent(fraction: float, message: str = "") -> None:
    pass


def exported(network: torch.nn.Module, path: Path, sample: tuple[int, ...]) -> Model:
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    inputs = (torch.randn(2, *sample),)
    torch.onnx.export(
        network.eval(), inputs, path, input_names=["input"], dynamic_shapes=shapes, external_data=False, verbose=False
    )
    return Model(ModelFormat.ONNX, path)


class Noise(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, sample: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        self.batches: Iterator[Any] = iter([rng.normal(size=(2, *sample)).astype(np.float32) for _ in range(4)])

    def get_next(self) -> dict[str, Any] | None:
        found = next(self.batches, None)
        return None if found is None else {"input": found}


def int8(model: Model, path: Path, sample: tuple[int, ...], **options: Any) -> Model:
    quantize_static(model.path, path, Noise(sample), quant_format=QuantFormat.QDQ, per_channel=True, **options)
    return Model(ModelFormat.ONNX, path, precision="int8")


def symmetric(model: Model, path: Path, sample: tuple[int, ...]) -> Model:
    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    return int8(model, path, sample, **types, extra_options=SYMMETRIC)


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.manual_seed(0)
    return exported(UNET, tmp_path_factory.mktemp("unet") / "unet.onnx", (1, 32, 32))


# ---------------------------------------------------------------- building ahead of time


@needs_rtx
def test_a_unet_is_built_in_fp32_and_smaller_in_int8(unet: Model, tmp_path: Path) -> None:
    sizes = {}
    for model in (unet, symmetric(unet, tmp_path / "int8.onnx", (1, 32, 32))):
        directory = tmp_path / model.precision
        directory.mkdir()
        path = tensorrt.build(model, directory, rtx(), silent)
        assert path.name == "model.rtx"
        sizes[model.precision] = path.stat().st_size
    assert sizes["int8"] > 0 < sizes["fp32"]


@needs_rtx
def test_resnet18_is_built_and_int8_is_a_third_of_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sample = (3, 64, 64)
    model = exported(torchvision.models.resnet18(), tmp_path / "resnet.onnx", sample)
    quantized = symmetric(model, tmp_path / "int8.onnx", sample)
    whole = tensorrt.build(model, _directory(tmp_path / "fp32"), rtx(sample), silent).stat().st_size
    small = tensorrt.build(quantized, _directory(tmp_path / "int8"), rtx(sample), silent).stat().st_size
    assert small < 0.4 * whole


@needs_rtx
@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "12.0", "12.1"])
def test_every_compute_capability_of_the_language_can_be_built_for(tmp_path: Path, capability: str) -> None:
    small_onnx(tmp_path / "net.onnx")
    plan = rtx(compute_capability=capability)
    assert tensorrt.build(Model(ModelFormat.ONNX, tmp_path / "net.onnx"), tmp_path, plan, silent).stat().st_size > 0


@needs_rtx
def test_a_fixed_batch_needs_no_profile(tmp_path: Path) -> None:
    small_onnx(tmp_path / "net.onnx", batch=2)
    plan = rtx(batches=Batches(min=4, opt=4, max=4))
    assert tensorrt.build(Model(ModelFormat.ONNX, tmp_path / "net.onnx"), tmp_path, plan, silent).exists()


@needs_rtx
def test_profile_and_workspace_are_what_the_recipe_says(tmp_path: Path) -> None:
    trt = tensorrt.library("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    small_onnx(tmp_path / "net.onnx")
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse((tmp_path / "net.onnx").read_bytes())
    config = builder.create_builder_config()
    plan = rtx(batches=Batches(min=2, opt=4, max=16), workspace_bytes=2**28)
    profile = tensorrt.configure(trt, builder, network, config, plan)
    shapes = [tuple(shape) for shape in profile.get_shape("input")]
    assert shapes == [(2, 1, 32, 32), (4, 1, 32, 32), (16, 1, 32, 32)]
    assert config.num_optimization_profiles == 1
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 2**28
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM89


# ---------------------------------------------------------------- what is refused


@needs_rtx
def test_a_quantized_bias_is_refused_by_node_with_what_to_do(unet: Model, tmp_path: Path) -> None:
    wrong = int8(unet, tmp_path / "wrong.onnx", (1, 32, 32), activation_type=QuantType.QUInt8)
    told = r"bias\w*_DequantizeLinear \(DequantizeLinear\): a quantized bias is not taken"
    with pytest.raises(StageFailed, match=told) as refused:
        tensorrt.build(wrong, tmp_path, rtx(), silent)
    assert refused.value.code == "operator_refused"
    assert "quantize stage" in str(refused.value.hint)


@needs_rtx
def test_a_shifted_zero_point_is_refused(unet: Model, tmp_path: Path) -> None:
    options = {"activation_type": QuantType.QUInt8, "extra_options": {"QuantizeBias": False}}
    with pytest.raises(StageFailed, match="a zero point other than 0 is not taken"):
        tensorrt.build(int8(unet, tmp_path / "wrong.onnx", (1, 32, 32), **options), tmp_path, rtx(), silent)


@needs_rtx
def test_every_operator_of_dynamic_quantization_is_named(unet: Model, tmp_path: Path) -> None:
    quantize_dynamic(unet.path, tmp_path / "dynamic.onnx", weight_type=QuantType.QUInt8)
    with pytest.raises(StageFailed) as refused:
        tensorrt.build(Model(ModelFormat.ONNX, tmp_path / "dynamic.onnx"), tmp_path, rtx(), silent)
    nodes = onnx.load(tmp_path / "dynamic.onnx").graph.node
    names = [node.name for node in nodes if node.op_type in ("DynamicQuantizeLinear", "ConvInteger")]
    assert names
    assert all(name in str(refused.value) for name in names)
    assert "dynamic quantization is not taken" in str(refused.value)


@needs_rtx
def test_an_operator_that_tensorrt_lacks_is_named(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.node[1].op_type, model.graph.node[1].name = "Det", "the_determinant"
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(StageFailed, match=r"the_determinant \(Det\): TensorRT has no such operator") as refused:
        tensorrt.build(Model(ModelFormat.ONNX, tmp_path / "net.onnx"), tmp_path, rtx(), silent)
    assert "operators that TensorRT takes" in str(refused.value.hint)


@needs_rtx
def test_a_type_that_tensorrt_does_not_compute_in_is_named_in_our_words(tmp_path: Path) -> None:
    cast = [helper.make_node("Cast", ["image"], ["bytes"], name="to_bytes", to=TensorProto.UINT8)]
    cast += [helper.make_node("Cast", ["bytes"], ["scores"], to=TensorProto.FLOAT)]
    shape = ["n", 1, 16, 16]
    path = strangers.network(
        tmp_path / "net.onnx", cast, [strangers.floats("image", *shape)], [strangers.floats("scores", *shape)], {}
    )
    with pytest.raises(StageFailed) as refused:
        tensorrt.build(Model(ModelFormat.ONNX, path), tmp_path, rtx((1, 16, 16)), silent)
    assert "to_bytes (Cast): TensorRT does not compute in UINT8" in refused.value.detail
    assert "kIMPORT" not in refused.value.detail


@needs_rtx
def test_what_the_builder_refuses_is_told_without_its_own_code(tmp_path: Path) -> None:
    reshape = [helper.make_node("Reshape", ["image", "shape"], ["scores"], name="to_rows")]
    path = strangers.network(
        tmp_path / "net.onnx",
        reshape,
        [strangers.floats("image", "n", 1, 16, 16)],
        [strangers.floats("scores", 3, 5, 7)],
        {"shape": np.array([3, 5, 7], dtype=np.int64)},
    )
    with pytest.raises(StageFailed, match="to_rows: reshaping failed") as refused:
        tensorrt.build(Model(ModelFormat.ONNX, path), tmp_path, rtx((1, 16, 16)), silent)
    assert refused.value.code == "engine_failed"
    assert "CPU target" in str(refused.value.hint)
    assert not [word for word in ("IBuilder", "Error Code", ".cpp") if word in refused.value.detail]


@needs_rtx
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no model")
    with pytest.raises(StageFailed, match="the file cannot be read"):
        tensorrt.build(Model(ModelFormat.ONNX, tmp_path / "net.onnx"), tmp_path, rtx(), silent)


# ---------------------------------------------------------------- progress and cancel


@needs_rtx
def test_progress_never_goes_back_and_names_the_phase(unet: Model, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    tensorrt.build(unet, tmp_path, rtx(), lambda fraction, message="": told.append((fraction, message)))
    fractions = [fraction for fraction, _ in told]
    assert len(told) > 10
    assert fractions == sorted(fractions)
    assert 0.5 < fractions[-1] <= 1.0
    assert any("Optimizing graph" in message for _, message in told)


class Stopped(Exception):
    pass


@needs_rtx
def test_what_progress_raises_ends_the_build(unet: Model, tmp_path: Path) -> None:
    told = []

    def stop(fraction: float, message: str = "") -> None:
        told.append(fraction)
        raise Stopped

    with pytest.raises(Stopped):
        tensorrt.build(unet, tmp_path, rtx(), stop)
    assert len(told) == 1
    assert list(tmp_path.iterdir()) == []


def test_phases_within_phases_share_their_step() -> None:
    phases = Phases()
    phases.start("outer", None, 2)
    phases.start("inner", "outer", 5)
    phases.step("inner", 1)
    assert phases.fraction == pytest.approx(0.1)
    phases.step("inner", 5)
    phases.finish("inner")
    phases.step("outer", 1)
    assert phases.fraction == pytest.approx(0.5)
    phases.step("inner", 1)  # over, so it tells nothing
    phases.step("outer", 2)
    assert phases.fraction == 1.0


# ---------------------------------------------------------------- where it can run


def test_without_a_gpu_opening_says_so(tmp_path: Path) -> None:
    if not isinstance(gpu(), str):
        pytest.skip("this machine has a GPU")
    (tmp_path / "model.rtx").write_bytes(b"engine")
    with pytest.raises(StageFailed, match="needs an NVIDIA GPU") as refused:
        tensorrt.open(Model(ModelFormat.ENGINE, tmp_path / "model.rtx"), 1)
    assert "portable ONNX" in str(refused.value.hint)
    assert tensorrt.not_here("tensorrt_rtx", "8.9") == gpu()


def test_a_file_of_another_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"model\.onnx is no engine of TensorRT"):
        tensorrt.open(Model(ModelFormat.ENGINE, tmp_path / "model.onnx"), 1)


def test_an_edition_that_is_not_installed_says_which_extra_brings_it() -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    with pytest.raises(StageFailed, match="tensorrt is not installed here") as refused:
        tensorrt.library("tensorrt")
    assert "'gpu'" in str(refused.value.hint)


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def on_gpu(unet: Model, tmp_path: Path) -> Callable[[Model], Any]:
    """Builds with TensorRT for this machine's GPU and opens the engine."""
    if isinstance(gpu(), str) or importlib.util.find_spec("tensorrt") is None:
        pytest.skip(f"needs a GPU with TensorRT and pycuda: {gpu()}")

    def open_engine(model: Model) -> Any:
        plan = Plan("tensorrt", (1, 32, 32), Batches(min=2, opt=4, max=4), timing_cache=tmp_path / "timings")
        path = tensorrt.build(model, tmp_path, plan, silent)
        return tensorrt.open(Model(ModelFormat.ENGINE, path, precision=model.precision), 1)

    return open_engine


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_an_engine_on_the_gpu_agrees_with_onnxruntime(
    unet: Model, on_gpu: Callable[[Model], Any], count: int
) -> None:
    inputs = np.random.default_rng(0).normal(size=(count, 1, 32, 32)).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(unet.path).run(None, {"input": inputs})
    found = on_gpu(unet).run(inputs)
    np.testing.assert_allclose(found, expected, atol=1e-2 * np.abs(expected).max())


@pytest.mark.gpu
def test_events_tell_the_gpus_own_time(unet: Model, on_gpu: Callable[[Model], Any]) -> None:
    assert 0 < on_gpu(unet).device_ms(np.zeros((4, 1, 32, 32), dtype=np.float32)) < 1000


@pytest.mark.gpu
def test_timings_are_kept_in_a_file(unet: Model, on_gpu: Callable[[Model], Any], tmp_path: Path) -> None:
    on_gpu(unet)
    assert (tmp_path / "timings").stat().st_size > 0


@pytest.mark.gpu
def test_another_shape_is_refused_on_the_gpu(unet: Model, on_gpu: Callable[[Model], Any]) -> None:
    with pytest.raises(StageFailed, match=r"\[2, 1, 16, 16\]"):
        on_gpu(unet).run(np.zeros((2, 1, 16, 16), dtype=np.float32))


def _directory(path: Path) -> Path:
    path.mkdir()
    return path
