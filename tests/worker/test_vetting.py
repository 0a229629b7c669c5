"""An ONNX file of any origin is read if it is whole and standard; what is not is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shared.errors import InvalidFile, StageFailed
from tests.worker.workbench import small_onnx
from worker.vetting import check_ports, input_shape, load_onnx_checked


def refused(path: Path) -> StageFailed:
    with pytest.raises(StageFailed) as found:
        load_onnx_checked(path)
    assert found.value.code == "invalid_onnx"
    return found.value


def refused_ports(model: onnx.ModelProto) -> StageFailed:
    with pytest.raises(StageFailed) as found:
        check_ports(model)
    assert found.value.code == "invalid_onnx"
    return found.value


def test_a_whole_onnx_file_is_loaded(tmp_path: Path) -> None:
    small_onnx(tmp_path / "net.onnx")
    assert input_shape(load_onnx_checked(tmp_path / "net.onnx")) == [None, 1, 32, 32]


def test_weights_in_another_file_are_refused_by_name(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx", channels=64)
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert "'weight' lie in another file" in refused(tmp_path / "net.onnx").detail


def test_external_data_is_found_in_a_constant_too(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    hidden = numpy_helper.from_array(np.zeros(4, dtype=np.float32), "hidden")
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="../../etc/passwd")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=hidden))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    assert "'hidden'" in refused(tmp_path / "net.onnx").detail


def test_a_custom_domain_is_refused_by_name(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, tmp_path / "net.onnx")
    assert "com.example::Relu" in refused(tmp_path / "net.onnx").detail


def test_a_local_function_is_inlined(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    body = [helper.make_node("Relu", ["x"], ["y"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "Act", ["x"], ["y"], body, opsets))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Act", "local"
    model.opset_import.append(helper.make_opsetid("local", 1))
    onnx.save(model, tmp_path / "net.onnx")
    assert [node.op_type for node in load_onnx_checked(tmp_path / "net.onnx").graph.node] == ["Conv", "Relu"]


def test_weights_that_are_also_inputs_are_taken_out_of_the_inputs(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [4, 1, 3, 3]))
    onnx.save(model, tmp_path / "net.onnx")
    assert [value.name for value in load_onnx_checked(tmp_path / "net.onnx").graph.input] == ["input"]


@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT16])
def test_another_input_of_a_rare_type_is_refused_by_name(tmp_path: Path, kind: int) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.input.append(helper.make_tensor_value_info("prompt", kind, [1, 4]))
    onnx.save(model, tmp_path / "net.onnx")
    found = refused(tmp_path / "net.onnx")
    assert "'prompt' is " in found.detail
    assert "source.constants" in (found.hint or "")


def test_an_output_of_integers_is_refused_by_name(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.node.append(helper.make_node("ArgMax", ["output"], ["mask"], axis=1))
    model.graph.output.append(helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", 1, 32, 32]))
    onnx.save(model, tmp_path / "net.onnx")
    found = refused(tmp_path / "net.onnx")
    assert "'mask' is INT64" in found.detail
    assert "source.outputs" in (found.hint or "")


def test_weights_in_constant_nodes_become_initializers(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["weight"], value=weight))
    onnx.save(model, tmp_path / "net.onnx")
    checked = load_onnx_checked(tmp_path / "net.onnx")
    assert [tensor.name for tensor in checked.graph.initializer] == ["weight"]
    assert [node.op_type for node in checked.graph.node] == ["Conv", "Relu"]


def test_initializers_of_an_old_file_leave_its_inputs(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx", opset=9)
    model.ir_version = 3  # of that time, when every initializer had to be an input
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [4, 1, 3, 3]))
    onnx.save(model, tmp_path / "net.onnx")
    checked = load_onnx_checked(tmp_path / "net.onnx")
    assert [value.name for value in checked.graph.input] == ["input"]
    assert checked.ir_version >= 4


@pytest.mark.parametrize("opset", [9, 13, 17, 21])
def test_every_opset_of_the_range_is_read(tmp_path: Path, opset: int) -> None:
    small_onnx(tmp_path / "net.onnx", opset=opset)
    assert load_onnx_checked(tmp_path / "net.onnx").opset_import[0].version == opset


def test_volumes_are_inputs_too(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 1, 3, 3, 3), np.float32), "weight"))
    model.graph.node[0].CopyFrom(helper.make_node("Conv", ["input", "weight"], ["hidden"], pads=[1] * 6))
    for value, channels in ((model.graph.input[0], 1), (model.graph.output[0], 4)):
        shape = ["batch", channels, 8, 16, 16]
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    onnx.save(model, tmp_path / "net.onnx")
    assert input_shape(load_onnx_checked(tmp_path / "net.onnx")) == [None, 1, 8, 16, 16]


@pytest.mark.parametrize("shape", [[1, 32], [1, 32, 32], [1, 1, 1, 32, 32, 32], [1, 1, 0, 32]])
def test_an_input_that_is_no_image_is_refused(tmp_path: Path, shape: list[int]) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("input", TensorProto.FLOAT, shape))
    onnx.save(model, tmp_path / "net.onnx")
    assert str(shape) in refused_ports(model).detail


def test_an_input_of_half_precision_is_refused(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "net.onnx")
    assert "FLOAT16" in refused(tmp_path / "net.onnx").detail


def test_a_sequence_is_called_no_tensor(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    sequence = helper.make_tensor_sequence_value_info(model.graph.input[0].name, TensorProto.FLOAT, None)
    model.graph.input[0].CopyFrom(sequence)
    assert "is no tensor" in refused_ports(model).detail
    assert "fp32" in str(refused_ports(model).hint)


@pytest.mark.parametrize("opset", [7, 99])
def test_an_opset_out_of_range_is_refused(tmp_path: Path, opset: int) -> None:
    small_onnx(tmp_path / "net.onnx", opset=opset)
    assert f"opset {opset}" in refused(tmp_path / "net.onnx").detail


def test_an_invalid_graph_is_refused(tmp_path: Path) -> None:
    model = small_onnx(tmp_path / "net.onnx")
    model.graph.node[0].input[1] = "no such tensor"
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    assert "not valid" in refused(tmp_path / "net.onnx").detail


def test_a_graph_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    content = bytearray(small_onnx(tmp_path / "net.onnx").SerializeToString())
    begin = content.index(b"Conv")
    content[begin - 3 : begin + 4] = b"\xff" * 7
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises((StageFailed, InvalidFile)):
        load_onnx_checked(tmp_path / "net.onnx")
