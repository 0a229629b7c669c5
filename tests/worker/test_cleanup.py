"""A cleaned graph computes what it did, and is what runtimes like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from shared.errors import StageFailed
from shared.recipe import ModelFormat
from tests.worker import digits, nets
from worker import engines
from worker.cleanup import clean, layer_names, opset_of, refuse_old_opset, refuse_quantized
from worker.context import Model
from worker.loading import load_onnx_checked

SHAPE = [2, 3, 16, 16]


def untidy(path: Path, *, opset: int = 11) -> Model:
    """An old exporter's graph: nodes without names, weights among the inputs and in Constant nodes, BatchNorm, and a
    shape that is computed from constants."""
    rng = np.random.default_rng(0)
    weights = {
        "conv.weight": rng.normal(size=(8, 3, 3, 3)),
        "scale": rng.uniform(0.5, 2, 8),
        "offset": rng.normal(size=8),
        "mean": rng.normal(size=8),
        "variance": rng.uniform(0.5, 2, 8),
    }
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    head = numpy_helper.from_array(rng.normal(size=(4, 8, 1, 1)).astype(np.float32), "head.weight")
    sizes = {"zero": 0, "four": 4, "rest": -1}
    shape = [numpy_helper.from_array(np.array([value]), name) for name, value in sizes.items()]
    nodes = [
        helper.make_node("Constant", [], ["head.weight"], value=head),
        helper.make_node("Conv", ["input", "conv.weight"], ["made"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["made", "scale", "offset", "mean", "variance"], ["normal"]),
        helper.make_node("Relu", ["normal"], ["positive"]),
        helper.make_node("Conv", ["positive", "head.weight"], ["maps"]),
        helper.make_node("Concat", ["zero", "four", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["maps", "shape"], ["output"]),
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, SHAPE)]
    inputs += [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in constants]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [2, 4, 256])]
    graph = helper.make_graph(nodes, "untidy", inputs, outputs, constants + shape)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6), path)
    return Model(ModelFormat.ONNX, path)


@pytest.fixture
def cleaned(tmp_path: Path) -> onnx.ModelProto:
    clean(untidy(tmp_path / "untidy.onnx").path, tmp_path / "clean.onnx")
    return load_onnx_checked(tmp_path / "clean.onnx")


def test_weights_are_no_inputs(cleaned: onnx.ModelProto) -> None:
    assert [value.name for value in cleaned.graph.input] == ["input"]


def test_batchnorm_is_fused_and_constants_are_folded(cleaned: onnx.ModelProto) -> None:
    assert [node.op_type for node in cleaned.graph.node] == ["Conv", "Relu", "Conv", "Reshape"]
    assert "head.weight" in {tensor.name for tensor in cleaned.graph.initializer}


def test_an_old_opset_is_raised(cleaned: onnx.ModelProto) -> None:
    assert opset_of(cleaned) == 17
    refuse_old_opset(cleaned)


def test_only_the_standards_operators_are_left(cleaned: onnx.ModelProto) -> None:
    assert {entry.domain for entry in cleaned.opset_import} == {""}


def test_every_node_has_a_name_of_its_own(cleaned: onnx.ModelProto) -> None:
    names = [node.name for node in cleaned.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


def test_a_newer_opset_stays_as_it_is(tmp_path: Path) -> None:
    clean(nets.chain(tmp_path / "net.onnx", opset=20).path, tmp_path / "clean.onnx")
    assert opset_of(onnx.load(tmp_path / "clean.onnx")) == 20


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("opset", [9, 11, 13])
def test_the_outputs_are_those_of_the_source(tmp_path: Path, runtime: str, opset: int) -> None:
    source = untidy(tmp_path / "untidy.onnx", opset=opset)
    clean(source.path, tmp_path / "clean.onnx")
    inputs = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    expected, found = (
        engines.load(name).open(model, 1).run(inputs)
        for name, model in (
            ("onnxruntime", source),
            (runtime, Model(ModelFormat.ONNX, tmp_path / "clean.onnx")),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_cleaning_twice_changes_nothing_more(tmp_path: Path) -> None:
    clean(untidy(tmp_path / "untidy.onnx").path, tmp_path / "once.onnx")
    clean(tmp_path / "once.onnx", tmp_path / "twice.onnx")
    clean(tmp_path / "untidy.onnx", tmp_path / "again.onnx")
    assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
    nodes = [[node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node] for name in ("once", "twice")]
    assert nodes[0] == nodes[1]


def test_layers_are_called_by_their_weights(tmp_path: Path) -> None:
    clean(nets.chain(tmp_path / "net.onnx").path, tmp_path / "clean.onnx")
    names = layer_names(onnx.load(tmp_path / "clean.onnx"))
    assert {"first", "second", "middle", "fourth", "last"} <= set(names.values())


def test_a_model_in_fp16_counts_as_quantized(tmp_path: Path) -> None:
    model = onnx.load(nets.chain(tmp_path / "net.onnx").path)
    refuse_quantized(model)
    half = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(half, model.graph.initializer[0].name))
    with pytest.raises(StageFailed, match="its weights are fp16"):
        refuse_quantized(model)


@pytest.mark.parametrize("operator", ["QuantizeLinear", "ConvInteger", "QLinearConv"])
def test_int8_operators_are_named_in_the_refusal(tmp_path: Path, operator: str) -> None:
    model = onnx.load(nets.chain(tmp_path / "net.onnx").path)
    model.graph.node[0].op_type = operator
    with pytest.raises(StageFailed, match=operator) as refused:
        refuse_quantized(model)
    assert refused.value.code == "already_quantized"


def test_an_opset_that_could_not_be_raised_is_refused_for_int8(tmp_path: Path) -> None:
    model = onnx.load(nets.chain(tmp_path / "net.onnx", opset=11).path)
    with pytest.raises(StageFailed, match="needs opset 13; the model has 11"):
        refuse_old_opset(model)


# ---------------------------------------------------------------- operators that ONNX Runtime has no kernel for


def unary(path: Path, operator: str, *, opset: int, values: int = 8) -> Model:
    """A convolution, the operator, and another convolution."""
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(rng.normal(size=(values, 3, 3, 3)).astype(np.float32), "first.weight"),
        numpy_helper.from_array(rng.normal(size=(4, values, 1, 1)).astype(np.float32), "last.weight"),
    ]
    more = []
    if operator == "GroupNormalization":
        more = ["scale", "offset"]
        constants += [numpy_helper.from_array(rng.uniform(0.5, 2, values).astype(np.float32), name) for name in more]
    words = {"num_groups": 2} if more else {}
    nodes = [
        helper.make_node("Conv", ["input", "first.weight"], ["made"], pads=[1, 1, 1, 1]),
        helper.make_node(operator, ["made", *more], ["active"], **words),
        helper.make_node("Conv", ["active", "last.weight"], ["output"]),
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, SHAPE)]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [2, 4, 16, 16])]
    graph = helper.make_graph(nodes, "unary", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return Model(ModelFormat.ONNX, path)


@pytest.mark.parametrize(
    ("operator", "opset"),
    [
        ("HardSwish", 14), ("Mish", 18), ("GroupNormalization", 21), ("Gelu", 20), ("Celu", 18),
        ("MeanVarianceNormalization", 18),
    ],
)  # fmt: skip
def test_an_operator_stays_itself_and_computes_the_same(tmp_path: Path, operator: str, opset: int) -> None:
    source = unary(tmp_path / "net.onnx", operator, opset=opset)
    clean(source.path, tmp_path / "clean.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "clean.onnx").graph.node] == ["Conv", operator, "Conv"]
    inputs = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    expected = engines.load("onnxruntime").open(source, 1).run(inputs)
    for runtime in ("onnxruntime", "openvino"):
        found = engines.load(runtime).open(Model(ModelFormat.ONNX, tmp_path / "clean.onnx"), 1).run(inputs)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_an_operator_on_constants_alone_is_not_set_aside(tmp_path: Path) -> None:
    model = onnx.load(unary(tmp_path / "net.onnx", "HardSwish", opset=18).path)
    model.graph.node.insert(0, helper.make_node("HardSwish", ["last.weight"], ["last.active"]))
    model.graph.node[-1].input[1] = "last.active"
    onnx.save(model, tmp_path / "net.onnx")
    clean(tmp_path / "net.onnx", tmp_path / "clean.onnx")
    inputs = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    expected, found = (
        engines.load("onnxruntime").open(Model(ModelFormat.ONNX, tmp_path / name), 1).run(inputs)
        for name in ("net.onnx", "clean.onnx")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reads_gate_twice", [False, True])
def test_a_hard_sigmoid_times_its_input_becomes_one_operator(tmp_path: Path, reads_gate_twice: bool) -> None:
    """As several exporters write HardSwish; not where something else reads the HardSigmoid."""
    model = onnx.load(unary(tmp_path / "net.onnx", "HardSwish", opset=13).path)
    first, _, last = model.graph.node
    gate = helper.make_node("HardSigmoid", ["made"], ["gate"], alpha=1 / 6, beta=0.5)
    product = helper.make_node("Mul", ["gate", "made"], ["active"])
    more = [helper.make_node("Relu", ["gate"], ["other"])] if reads_gate_twice else []
    del model.graph.node[:]
    model.graph.node.extend([first, gate, product, *more, last])
    if reads_gate_twice:
        model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [2, 8, 16, 16]))
    onnx.save(model, tmp_path / "pairs.onnx")
    clean(tmp_path / "pairs.onnx", tmp_path / "clean.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "clean.onnx").graph.node]
    assert ("HardSwish" in operators) is not reads_gate_twice
    inputs = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    expected, found = (
        engines.load("openvino").open(Model(ModelFormat.ONNX, tmp_path / name), 1).run(inputs)
        for name in ("pairs.onnx", "clean.onnx")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def num_executed(path: Path) -> int:
    """Operators that OpenVINO executes."""
    return len(openvino.Core().compile_model(path, "CPU").get_runtime_model().get_ops())


def test_openvino_executes_no_more_layers_than_without_cleaning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = nets.exported(digits.mobile(), (1, 1, 28, 28), tmp_path / "net.onnx")
    clean(source.path, tmp_path / "clean.onnx")
    assert num_executed(tmp_path / "clean.onnx") <= num_executed(source.path)
