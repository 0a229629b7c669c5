"""Every runtime gives the same answers, takes any batch, and refuses with a sentence what it cannot run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from shared.errors import StageFailed
from shared.recipe import ModelFormat
from tests.worker import nets
from tests.worker.workbench import Workbench, small_onnx
from worker import engines
from worker.context import Model, StageResult
from worker.engines.batching import in_fixed_batches
from worker.feed import Floats, Inputs

RUNTIMES = ("onnxruntime", "openvino")
IMAGES = np.random.default_rng(0).normal(size=(5, 1, 32, 32)).astype(np.float32)


def open_engine(runtime: str, model: Model, directory: Path, threads: int = 1) -> engines.Runner:
    """Built as a job builds it, then opened."""
    directory.mkdir(exist_ok=True)
    module = engines.load(runtime)
    files = Model(ModelFormat.ENGINE, module.build(model.candidates(runtime)[0], directory), precision=model.precision)
    runner: engines.Runner = module.open(files, threads)
    return runner


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_engine_agrees_with_pytorch(bench: Workbench, exported: Model, tmp_path: Path, runtime: str) -> None:
    expected = engines.load("torch eager").open(bench.source, 1).run(IMAGES)
    found = open_engine(runtime, exported, tmp_path).run(IMAGES)
    assert found.dtype == np.float32
    close = 2e-3 if runtime == "openvino" else 1e-4  # whose weights are stored in fp16
    np.testing.assert_allclose(found, expected, atol=close * np.abs(expected).max())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_runner_tells_what_it_is(exported: Model, tmp_path: Path, runtime: str, threads: int) -> None:
    runner = open_engine(runtime, exported, tmp_path, threads)
    assert (runner.engine, runner.precision, runner.threads) == (runtime, "fp32", threads)
    assert runner.versions[runtime]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_a_fixed_batch_takes_any_number_of_samples(tmp_path: Path, runtime: str, batch: int) -> None:
    small_onnx(tmp_path / "any.onnx")
    small_onnx(tmp_path / "fixed.onnx", batch=batch)
    free = open_engine(runtime, Model(ModelFormat.ONNX, tmp_path / "any.onnx"), tmp_path / "any")
    fixed = open_engine(runtime, Model(ModelFormat.ONNX, tmp_path / "fixed.onnx"), tmp_path / "fixed")
    np.testing.assert_allclose(fixed.run(IMAGES), free.run(IMAGES), atol=1e-5)


def test_stretches_are_padded_and_cut() -> None:
    seen = []

    def run(inputs: np.ndarray) -> list[np.ndarray]:
        seen.append(len(inputs))
        return [inputs + 1, inputs.sum(axis=(1, 2, 3))]

    more, sums = in_fixed_batches(run, IMAGES, 3)
    np.testing.assert_array_equal(more, IMAGES + 1)
    np.testing.assert_array_equal(sums, IMAGES.sum(axis=(1, 2, 3)))
    assert seen == [3, 3]


def test_samples_along_another_axis_than_the_first_are_refused_in_a_sentence() -> None:
    def run(inputs: Inputs) -> list[Floats]:
        assert isinstance(inputs, np.ndarray)
        return [inputs, np.moveaxis(inputs, 0, 1)]

    with pytest.raises(StageFailed, match=r"For 3 samples output 1 .* shape \[1, 3, .*: .* first axis") as refused:
        in_fixed_batches(run, IMAGES[:4], 3)
    assert refused.value.code == "output_mismatch"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_outputs_do_not_change_with_the_next_run(exported: Model, tmp_path: Path, runtime: str) -> None:
    runner = open_engine(runtime, exported, tmp_path)
    before = runner.run(IMAGES[:1])
    kept = before.copy()
    runner.run(IMAGES[1:2])
    np.testing.assert_array_equal(before, kept)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_input_of_another_shape_is_refused_with_it(exported: Model, tmp_path: Path, runtime: str) -> None:
    runner = open_engine(runtime, exported, tmp_path)
    with pytest.raises(StageFailed, match=r"\[1, 3, 32, 32\]") as refused:
        runner.run(np.zeros((1, 3, 32, 32), dtype=np.float32))
    assert refused.value.code == "input_mismatch"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, runtime: str) -> None:
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08no model")
    with pytest.raises(StageFailed) as refused:
        open_engine(runtime, Model(ModelFormat.ONNX, tmp_path / "net.onnx"), tmp_path / "out")
    assert refused.value.code == "engine_failed"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_same_model_builds_the_same_bytes(
    exported: Model, quantized: StageResult, tmp_path: Path, runtime: str
) -> None:
    module = engines.load(runtime)
    for model in (exported, quantized.model):
        contents = []
        for name in ("a", "b"):
            directory = tmp_path / f"{model.precision}-{name}"
            directory.mkdir()
            built = module.build(model.candidates(runtime)[0], directory)
            contents.append([path.read_bytes() for path in module.files(built)])
        assert contents[0] == contents[1]


def test_openvino_uses_its_own_form_where_there_is_one(quantized: StageResult, exported: Model, tmp_path: Path) -> None:
    form = quantized.model.candidates("openvino")[0]
    built = engines.load("openvino").build(form, tmp_path)
    own = form.path
    assert built.with_suffix(".bin").read_bytes() == own.with_suffix(".bin").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]


# ---------------------------------------------------------------- one sample at a time in OpenVINO


def shapes_compiled(runner: engines.Runner) -> list[str]:
    """The input's shape in what is compiled for one sample, and in what is for all else."""
    requests = [runner._for_one, runner._for_any]  # type: ignore[attr-defined]
    return [str(one.get_compiled_model().input(0).get_partial_shape()) for one in requests if one is not None]


def test_one_sample_runs_on_what_is_compiled_for_its_shape(exported: Model, tmp_path: Path) -> None:
    runner = open_engine("openvino", exported, tmp_path)
    alone = runner.run(IMAGES[:1])
    assert shapes_compiled(runner) == ["[1,1,32,32]"]
    together = runner.run(IMAGES)
    assert shapes_compiled(runner) == ["[1,1,32,32]", "[?,1,32,32]"]
    np.testing.assert_allclose(alone, together[:1], atol=1e-4 * np.abs(together).max())


def test_of_images_of_any_size_the_first_one_has_its_own(tmp_path: Path) -> None:
    """So that images of ever new sizes are not compiled for, one after the other."""
    path = nets.chain(tmp_path / "net.onnx", width=4)
    model = onnx.load(path.path)
    for axis in (2, 3):
        for port in (model.graph.input[0], model.graph.output[0]):
            port.type.tensor_type.shape.dim[axis].dim_param = f"axis {axis}"
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "sizes.onnx")
    source = Model(ModelFormat.ONNX, tmp_path / "sizes.onnx")
    runners = [open_engine(runtime, source, tmp_path / runtime) for runtime in RUNTIMES]
    channels = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    for count, side in ((1, 32), (1, 32), (3, 32), (1, 16)):
        images = np.random.default_rng(side).normal(size=(count, channels, side, side)).astype(np.float32)
        expected, outputs = (runner.run(images) for runner in runners)
        np.testing.assert_allclose(outputs, expected, atol=2e-3 * np.abs(expected).max())
    assert shapes_compiled(runners[1]) == [f"[1,{channels},32,32]", f"[?,{channels},?,?]"]


def test_a_network_that_takes_no_single_sample_still_runs_in_batches(tmp_path: Path) -> None:
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 1, 4, 4]) for name in ("in", "out")
    ]
    sizes = onnx.numpy_helper.from_array(np.array([2, 2], dtype=np.int64), "sizes")
    nodes = [
        onnx.helper.make_node("Split", ["in", "sizes"], ["first", "second"], axis=0),
        onnx.helper.make_node("Concat", ["second", "first"], ["out"], axis=0),
    ]
    graph = onnx.helper.make_graph(nodes, "pairs", ports[:1], ports[1:], [sizes])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "net.onnx")
    runner = open_engine("openvino", Model(ModelFormat.ONNX, tmp_path / "net.onnx"), tmp_path / "out")
    images = IMAGES[:4, :, :4, :4]
    np.testing.assert_array_equal(runner.run(images), images[[2, 3, 0, 1]])
    assert shapes_compiled(runner) == ["[?,1,4,4]"]


def test_openvino_runs_fp32_in_fp32(exported: Model, tmp_path: Path) -> None:
    runner = open_engine("openvino", exported, tmp_path)
    config = runner.compiled  # type: ignore[attr-defined]
    assert "float32" in str(config.get_property("INFERENCE_PRECISION_HINT"))
    assert config.get_property("INFERENCE_NUM_THREADS") == 1
    assert "LATENCY" in str(config.get_property("PERFORMANCE_HINT"))


# ---------------------------------------------------------------- how OpenVINO stores weights


def test_float_weights_are_stored_in_half_the_bytes_and_run_as_they_were(tmp_path: Path) -> None:
    source = nets.chain(tmp_path / "net.onnx", width=64)
    path = engines.load("openvino").build(source, tmp_path)
    assert path.with_suffix(".bin").stat().st_size < 0.52 * source.path.stat().st_size
    inputs = np.random.default_rng(0).normal(size=(4, 1, nets.SIZE, nets.SIZE)).astype(np.float32)
    expected = engines.load("openvino").open(source, 1)
    found = engines.load("openvino").open(Model(ModelFormat.ONNX, path), 1)
    np.testing.assert_allclose(found.run(inputs), expected.run(inputs), atol=2e-3 * np.abs(expected.run(inputs)).max())
    executed = [one.compiled.get_runtime_model().get_ops() for one in (expected, found)]
    assert len(executed[0]) == len(executed[1])  # turned back when the model is loaded, not when it runs


@pytest.mark.parametrize("factor", [1e6, 1e-7])
def test_weights_that_fp16_cannot_hold_stay_as_they_are(tmp_path: Path, factor: float) -> None:
    source = nets.chain(tmp_path / "net.onnx", width=16)
    model = onnx.load(source.path)
    scales = {"middle.weight": factor, "middle.bias": factor, "fourth.weight": 1 / factor}  # the outputs stay
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            scaled = onnx.numpy_helper.to_array(tensor) * np.float32(scales[tensor.name])
            tensor.CopyFrom(onnx.numpy_helper.from_array(scaled, tensor.name))
    onnx.save(model, source.path)
    path = engines.load("openvino").build(source, tmp_path)
    inputs = np.random.default_rng(0).normal(size=(4, 1, nets.SIZE, nets.SIZE)).astype(np.float32)
    expected, found = (
        engines.load("openvino").open(Model(ModelFormat.ONNX, one), 1).run(inputs) for one in (source.path, path)
    )
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.skipif(not engines.load("openvino").has_bf16(), reason="this CPU does not compute in bf16")
def test_a_bf16_remainder_is_run_in_bf16(tmp_path: Path) -> None:
    source = nets.chain(tmp_path / "net.onnx")
    hints = {
        precision: engines.load("openvino")
        .open(replace(source, precision=precision), 1)
        .compiled.get_property("INFERENCE_PRECISION_HINT")
        .get_type_name()
        for precision in ("fp32", "int8", "int8+fp32", "int8+bf16")
    }
    assert hints == {"fp32": "f32", "int8": "f32", "int8+fp32": "f32", "int8+bf16": "bf16"}
