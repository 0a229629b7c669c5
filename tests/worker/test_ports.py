"""A network's inputs and outputs are what the recipe names them, and nothing else is left in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from shared.errors import StageFailed
from shared.recipe import OnnxInputs, OnnxOutputs, OnnxSource
from tests.worker import strangers
from worker.ports import settle_ports
from worker.vetting import check_ports, load_onnx_vetted, other_inputs


def source(**words: Any) -> OnnxSource:
    return OnnxSource(onnx=uuid4(), **words)


def settled(path: Path, **words: Any) -> onnx.ModelProto:
    model = load_onnx_vetted(path)
    settle_ports(model, source(**words))
    check_ports(model)
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def inputs_of(count: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(count, 1, strangers.SIZE, strangers.SIZE)).astype(np.float32)
    return {"image": image, "age": rng.normal(size=(count, 1)).astype(np.float32), "slope": np.array(2, np.float32)}


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def test_a_network_of_one_input_and_output_is_left_alone(tmp_path: Path) -> None:
    model = load_onnx_vetted(strangers.plain(tmp_path / "net.onnx"))
    before = model.SerializeToString(deterministic=True)
    assert not settle_ports(model, source())
    assert model.SerializeToString(deterministic=True) == before


def test_the_one_input_that_can_be_an_image_comes_first(tmp_path: Path) -> None:
    path = strangers.with_age(tmp_path / "net.onnx")
    model = load_onnx_vetted(path)
    assert settle_ports(model, source())
    assert other_inputs(model) == ("age", "slope")
    found, expected = run(model, **inputs_of()), run(onnx.load(path), **inputs_of())
    assert all(np.array_equal(found[name], expected[name]) for name in ("embedding", "scores"))


def test_a_constant_is_no_input_any_more(tmp_path: Path) -> None:
    path = strangers.with_age(tmp_path / "net.onnx")
    model = settled(path, constants={"slope": 2})
    assert names(model.graph.input) == ["image", "age"]
    given = inputs_of()
    expected = run(onnx.load(path), **given)["scores"]
    del given["slope"]
    np.testing.assert_array_equal(run(model, **given)["scores"], expected)


def test_a_single_number_can_only_be_a_constant(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="'slope' is a single number") as refused:
        settled(strangers.with_age(tmp_path / "net.onnx"))
    assert "source.constants" in (refused.value.hint or "")


def test_a_number_fills_a_shape_and_lists_are_taken_as_they_are(tmp_path: Path) -> None:
    path = strangers.with_age(tmp_path / "net.onnx")
    filled = settled(path, constants={"slope": 2, "age": 50})
    given = inputs_of(1)
    expected = run(onnx.load(path), **{**given, "age": np.float32([[50]])})["scores"]
    np.testing.assert_array_equal(run(filled, image=given["image"])["scores"], expected)
    listed = settled(path, constants={"slope": 2, "age": [[50.0]]})
    np.testing.assert_array_equal(run(listed, image=given["image"])["scores"], expected)


@pytest.mark.parametrize(
    ("value", "told"), [([1, 2], r"\[2\]; the input's is \[None, 1\]"), ("old", "not a number"), ([[1], [2, 3]], "not")]
)
def test_a_constant_that_does_not_fit_is_refused(tmp_path: Path, value: Any, told: str) -> None:
    with pytest.raises(StageFailed, match=told) as refused:
        settled(strangers.with_age(tmp_path / "net.onnx"), constants={"age": value})
    assert refused.value.code == "unknown_port"


def test_a_constant_may_be_of_a_type_that_data_cannot_be(tmp_path: Path) -> None:
    model = onnx.load(strangers.plain(tmp_path / "net.onnx"))
    model.graph.input.append(helper.make_tensor_value_info("training", TensorProto.BOOL, [1]))
    model.graph.node[1].CopyFrom(helper.make_node("Where", ["training", "c1", "w0"], ["r1"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, dtype=np.float32), "w0"))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(StageFailed, match="'training' is BOOL"):
        settled(tmp_path / "net.onnx")
    assert names(settled(tmp_path / "net.onnx", constants={"training": False}).graph.input) == ["image"]


def test_the_named_output_stays_alone_with_what_works_for_it(tmp_path: Path) -> None:
    path = strangers.with_age(tmp_path / "net.onnx")
    model = settled(path, outputs=OnnxOutputs(logits="embedding"), constants={"slope": 1, "age": 1})
    assert names(model.graph.output) == ["embedding"]
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten"]
    expected = run(onnx.load(path), **inputs_of())["embedding"]
    np.testing.assert_array_equal(run(model, image=inputs_of()["image"])["embedding"], expected)


def test_what_an_inner_graph_reads_is_kept(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Add", ["r1", "c1"], ["sum"])], "then", [], [strangers.floats("sum", "batch", 8, 16, 16)]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["r1"], ["same"])], "else", [], [strangers.floats("same", "batch", 8, 16, 16)]
    )
    path = strangers.plain(tmp_path / "net.onnx")
    model = onnx.load(path)
    nodes = [*model.graph.node[:2], helper.make_node("If", ["yes"], ["picked"], then_branch=branch, else_branch=other)]
    nodes += [helper.make_node("Conv", ["picked", "w2"], ["scores"], pads=[1] * 4)]
    nodes += [helper.make_node("Relu", ["c1"], ["aside"])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    model.graph.output.append(strangers.floats("aside", "batch", 8, 16, 16))
    onnx.save(model, path)
    found = settled(path, outputs=OnnxOutputs(logits="scores"))
    assert [node.op_type for node in found.graph.node] == ["Conv", "Relu", "If", "Conv"]
    image = inputs_of()["image"]
    np.testing.assert_array_equal(run(found, image=image)["scores"], run(model, image=image)["scores"])


def test_two_likely_inputs_must_be_named(tmp_path: Path) -> None:
    model = onnx.load(strangers.plain(tmp_path / "net.onnx"))
    model.graph.input.append(strangers.floats("before", "batch", 1, 16, 16))
    model.graph.node[1].CopyFrom(helper.make_node("Add", ["c1", "before"], ["r1"]))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(StageFailed, match=r"2 inputs \(image, before\)") as refused:
        settled(tmp_path / "net.onnx")
    assert 'source.inputs {"image": name}' in (refused.value.hint or "")
    named = settled(tmp_path / "net.onnx", inputs=OnnxInputs(image="before"))
    assert names(named.graph.input) == ["before", "image"]


@pytest.mark.parametrize(
    "words", [{"inputs": {"image": "x"}}, {"outputs": {"logits": "x"}}, {"constants": {"x": 1}}], ids=str
)
def test_a_name_that_the_network_lacks_is_refused_with_those_it_has(tmp_path: Path, words: dict[str, Any]) -> None:
    with pytest.raises(StageFailed, match=r"named 'x'; it has .*(image|scores)") as refused:
        settled(strangers.with_age(tmp_path / "net.onnx"), **words)
    assert refused.value.code == "unknown_port"


def test_dimensions_of_minus_one_vary_as_named_ones_do(tmp_path: Path) -> None:
    """As PaddlePaddle's exporter writes them."""
    model = onnx.load(strangers.plain(tmp_path / "net.onnx"))
    expected = run(model, image=inputs_of(3)["image"])
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
        for entry in value.type.tensor_type.shape.dim[2:]:
            entry.dim_value = -1
    onnx.save(model, tmp_path / "open.onnx")
    found = settled(tmp_path / "open.onnx")
    assert [entry.dim_param for entry in found.graph.input[0].type.tensor_type.shape.dim] == [
        *("batch", "", f"{found.graph.input[0].name}.2", f"{found.graph.input[0].name}.3")
    ]
    np.testing.assert_array_equal(list(run(found, image=inputs_of(3)["image"]).values()), list(expected.values()))


def test_an_output_whose_samples_lie_along_another_axis_is_transposed(tmp_path: Path) -> None:
    """A recurrent network's (times, samples, classes), as the names of its axes say."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["samples", 2, 3, 4])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [3, "samples", 2, 4])
    nodes = [helper.make_node("Transpose", ["image"], ["scores"], perm=[2, 0, 1, 3])]
    graph = helper.make_graph(nodes, "recurrent", [image], [scores])
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(built, tmp_path / "net.onnx")
    model = settled(tmp_path / "net.onnx")
    given = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)
    [(name, found)] = run(model, image=given).items()
    assert name == "scores.samples_first"
    assert np.array_equal(found, np.moveaxis(given, 2, 1))
    assert not settle_ports(model, source())
