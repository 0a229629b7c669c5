"""An int8 file holds little beside its weights, and a customer's own names stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

from worker.context import StageResult
from worker.quantization.qdq import write_qdq

LONG = "a.very.long.name.as.exporters.write.them"


def test_names_inside_are_short_and_those_of_layers_and_ports_are_kept(tmp_path: Path) -> None:
    float_path, int8_path = network(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    write_qdq(float_path, ranges(tmp_path / "ranges.json"), "minmax", int8_path)
    graph = onnx.load(int8_path).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["t0", "out"]
    assert "first" in {node.name for node in graph.node}
    assert not any(LONG in name for node in graph.node for name in (node.name, *node.input, *node.output))
    made = [name for node in graph.node for name in node.output] + [tensor.name for tensor in graph.initializer]
    assert "t0" not in made  # the customer's input is called so
    assert len(set(made)) == len(made)


def test_short_names_change_no_output(tmp_path: Path) -> None:
    float_path, int8_path = network(tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    write_qdq(float_path, ranges(tmp_path / "ranges.json"), "minmax", int8_path)
    inputs = {"t0": np.random.default_rng(0).uniform(-1, 1, (1, 4, 8, 8)).astype(np.float32)}
    expected, found = (onnxruntime.InferenceSession(path).run(None, inputs)[0] for path in (float_path, int8_path))
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


def test_a_files_overhead_is_small(quantized: StageResult) -> None:
    model = onnx.load(quantized.model.path)
    weights = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    nodes = len(model.graph.node) + len(model.graph.initializer)
    assert quantized.model.path.stat().st_size - weights < 100 * nodes


def network(path: Path) -> Path:
    """A convolution whose tensors have long names, of an input that is called as the short ones are."""
    weight = onnx.numpy_helper.from_array(
        np.random.default_rng(1).normal(size=(4, 4, 3, 3)).astype(np.float32), f"{LONG}.weight"
    )
    shape = ["n", 4, 8, 8]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["t0", weight.name], [f"{LONG}.conv"], name="first", pads=[1, 1, 1, 1]),
            onnx.helper.make_node("Relu", [f"{LONG}.conv"], ["out"], name="last"),
        ],
        "net",
        [onnx.helper.make_tensor_value_info("t0", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, shape)],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def ranges(path: Path) -> Path:
    """What calibration would have written down: the output between 0 and 20, the input between -1 and 1."""
    wide = (np.float32(0), np.float32(20))
    found = {name: TensorData(lowest=wide[0], highest=wide[1]) for name in (f"{LONG}.conv", "out")}
    found["t0"] = TensorData(lowest=np.float32(-1), highest=np.float32(1))
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, found), path)
    return path
