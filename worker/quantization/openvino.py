"""Int8 for OpenVINO: quantized once by NNCF, then layers are put back into float by taking their quantizers out.

NNCF puts a FakeQuantize before each input and each weight that is to be int8. An operator whose inputs bypass theirs is
in float again, so that "all but these layers" and "these layers alone" are edits of one network, for which the
statistics are collected once. NNCF also corrects each bias for what rounding does to the layer's mean; a layer in float
gets the bias from before, and so do all where the correction does not help.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import onnx
import openvino
from nncf.common.factory import build_graph
from nncf.openvino.graph.model_utils import remove_friendly_name_duplicates
from nncf.openvino.graph.node_utils import get_number_if_op
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from nncf.quantization.algorithms.bias_correction.algorithm import BiasCorrection
from nncf.quantization.algorithms.fast_bias_correction.algorithm import FastBiasCorrection
from nncf.quantization.algorithms.pipeline import Pipeline, collect_statistics
from nncf.quantization.algorithms.post_training.pipeline import create_ptq_pipeline
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from openvino._offline_transformations import compress_quantize_weights_transformation

from worker import engines
from worker.cleanup import CLEANUP_ERRORS, quiet
from worker.environment import int8_needs_reduced_range
from worker.feed import Array
from worker.quantization.calibration import Calibration
from worker.quantization.failure import failed

ERRORS = (*CLEANUP_ERRORS, nncf.ValidationError, nncf.UnsupportedModelError, nncf.InternalError)
RANGES = {
    "minmax": RangeEstimatorParametersSet.MINMAX,
    "entropy": RangeEstimatorParametersSet.HISTOGRAM,
    "percentile": RangeEstimatorParametersSet.MEAN_QUANTILE,
}
PRODUCTS = {
    "Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData", "MatMul",
}  # fmt: skip
# Operators that compute nothing: one quantizer before them serves what comes after.
PASSING = {
    "BatchToSpace", "Broadcast", "Concat", "DepthToSpace", "Gather", "MaxPool", "Pad", "ReduceMax", "Reshape",
    "ShuffleChannels", "SpaceToBatch", "SpaceToDepth", "Split", "Squeeze", "StridedSlice", "Tile", "Transpose",
    "Unsqueeze", "VariadicSplit",
}  # fmt: skip
BOTH_SIGNS = {
    "Celu", "Elu", "Erf", "Gelu", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Selu", "Swish",
}  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """A way in which NNCF quantizes. `name` is what the report calls it."""

    name: str
    words: dict[str, Any]


PLAIN = Scheme("plain", {})
TRANSFORMER = Scheme("transformer", {"model_type": nncf.ModelType.TRANSFORMER})
MIXED = Scheme("mixed preset", {"preset": nncf.QuantizationPreset.MIXED})


def schemes(network: Path) -> list[Scheme]:
    """What may fit the network: NNCF smooths activations before attention, and shifts the zero where both signs are."""
    graph = onnx.load(network).graph
    softmax = {name for node in graph.node if node.op_type == "Softmax" for name in node.output}
    attends = any(node.op_type == "MatMul" and softmax & set(node.input) for node in graph.node)
    both_signs = bool({node.op_type for node in graph.node} & BOTH_SIGNS)
    return [PLAIN, *([TRANSFORMER] if attends else []), *([MIXED] if both_signs else [])]


class QuantizedNetwork:
    """The network with quantizers at every place that NNCF finds for them. Raises StageFailed (quantize_failed)."""

    def __init__(
        self,
        network: Path,
        calibration: Calibration,
        method: str,
        scheme: Scheme = PLAIN,
        *,
        on_progress: Callable[[float], None],
    ) -> None:
        num_read = 0

        def read(index: int) -> dict[str, Array]:
            nonlocal num_read
            on_progress(min(num_read / (2 * len(calibration)), 1.0))
            num_read += 1
            return calibration.read(index)

        parameters = AdvancedQuantizationParameters(activations_range_estimator_params=RANGES[method])
        if int8_needs_reduced_range():
            parameters.overflow_fix = OverflowFix.ENABLE
        words = {"subset_size": len(calibration), "advanced_parameters": parameters, **scheme.words}
        runtime = engines.load("openvino")
        try:
            with quiet():
                nncf.set_log_level(logging.WARNING)
                source = runtime.read(network)
                runtime.settle_names(source)  # NNCF makes its own names from them
                dataset = nncf.Dataset(range(len(calibration)), read)
                self._quantize(remove_friendly_name_duplicates(source), dataset, words)
        except ERRORS as error:
            raise failed("int8 for OpenVINO", error) from error
        self.layers = [] if self.uncorrected is None else _quantized_layers(self.corrected)

    def without_bias_correction(self) -> QuantizedNetwork | None:
        """The same network with the float network's biases; None of a network with branches.

        NNCF estimates the correction on a constant image, every pixel of which is its channel's mean. With padding its
        borders differ from real images', so that with wide kernels on small images the correction can make the error
        several times as large.
        """
        if self.uncorrected is None:
            return None
        other = copy.copy(self)
        other.corrected, other.bias_correction = self.uncorrected, False
        return other

    def _quantize(self, source: openvino.Model, dataset: nncf.Dataset, words: dict[str, Any]) -> None:
        """As nncf.quantize does, but keep the network from before the biases are corrected, and weights in float."""
        self.corrected: openvino.Model
        self.bias_correction = True
        self.uncorrected: openvino.Model | None = None
        if get_number_if_op(source) > 0:
            self.corrected = nncf.quantize(source, dataset, **words)  # branches within it are quantized too
            return
        pipeline = create_ptq_pipeline(fast_bias_correction=True, **words)
        model = source
        for algorithms in pipeline.pipeline_steps:
            graph = build_graph(model)
            points = Pipeline([algorithms]).get_statistic_points_for_step(0, model, graph)
            statistics = collect_statistics(points, model, graph, dataset)
            for algorithm in algorithms:
                if isinstance(algorithm, FastBiasCorrection | BiasCorrection):
                    self.uncorrected = model.clone()
                model = algorithm.apply(model, build_graph(model), statistics)
        self.corrected = model

    def save(self, path: Path, *, in_float: Collection[str] = (), products_only: bool = False) -> Path:
        """Write the network with these layers in float, or everything but the products."""
        products = {name for name, is_product in self.layers if is_product}
        names = {name for name, _ in self.layers if name in in_float or (products_only and name not in products)}
        return self._write(path, names)

    def save_alone(self, path: Path, layers: Collection[str]) -> Path:
        """Write the network with these layers in int8 and all others in float."""
        return self._write(path, {name for name, _ in self.layers} - set(layers))

    def _write(self, path: Path, in_float: Collection[str]) -> Path:
        model = self.corrected.clone()
        if self.uncorrected is not None:
            _put_into_float(model, in_float, _biases(self.uncorrected))
            compress_quantize_weights_transformation(model)
        engines.load("openvino").save(model, path)
        return path

    def segments(self) -> list[tuple[str, ...]]:
        """The layers in the network's order, each product with what is quantized between it and the next one."""
        found: list[list[str]] = []
        for name, is_product in self.layers:
            if is_product or not found:
                found.append([])
            found[-1].append(name)
        return [tuple(names) for names in found]


def onnx_name(layer: str) -> str:
    """OpenVINO names a layer as ONNX does, or splits the sum with its bias off."""
    return layer.removesuffix("/WithoutBiases")


# ---------------------------------------------------------------- quantizers


def _quantized_layers(model: openvino.Model) -> list[tuple[str, bool]]:
    """Every operator with a quantizer at an input, in the network's order, and whether it is a product."""
    found = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in PASSING or kind in ("FakeQuantize", "Result"):
            continue
        if any(_quantizer_before(value) for value in node.input_values()):
            found.append((node.get_friendly_name(), kind in PRODUCTS))
    return found


def _quantizer_before(value: openvino.Output) -> bool:
    node = value.get_node()
    kind = node.get_type_name()
    return kind == "FakeQuantize" or (kind in PASSING and any(map(_quantizer_before, node.input_values())))


def _put_into_float(model: openvino.Model, layers: Collection[str], biases: dict[str, openvino.Output]) -> None:
    """Bypass the quantizers of these layers, and give them back the biases that they had before the correction."""
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in layers:
            continue
        for value in node.inputs():
            _bypass(value)
        for target in node.output(0).get_target_inputs():
            bias = target.get_node()
            if bias.get_friendly_name() in biases and bias.get_type_name() == "Add":
                position = _constant_at(bias)
                assert position is not None
                bias.input(position).replace_source_output(biases[bias.get_friendly_name()])


def _bypass(value: openvino.Input) -> None:
    """Read what the quantizer reads; those before operators that compute nothing are bypassed too."""
    source = value.get_source_output()
    node = source.get_node()
    if node.get_type_name() == "FakeQuantize":
        value.replace_source_output(node.input_value(0))
    elif node.get_type_name() in PASSING and _quantizer_before(source):
        for before in node.inputs():
            _bypass(before)


def _biases(model: openvino.Model) -> dict[str, openvino.Output]:
    """The constant of every sum that has one, by the sum's name."""
    found = {}
    for node in model.get_ordered_ops():
        position = _constant_at(node) if node.get_type_name() == "Add" else None
        if position is not None:
            constant = node.input_value(position).get_node()
            copied = openvino.opset13.constant(constant.get_data(), dtype=constant.get_output_element_type(0))
            found[node.get_friendly_name()] = copied.output(0)
    return found


def _constant_at(node: openvino.Node) -> int | None:
    """Which input of an operator of two is a constant."""
    kinds = [value.get_node().get_type_name() for value in node.input_values()]
    return kinds.index("Constant") if "Constant" in kinds else None
