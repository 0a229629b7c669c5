"""From a customer's file to a network, without running anything of theirs.

PyTorch networks are built by name from the registry of a known library and filled from safetensors; ONNX files are
read without external data and without custom operators. Names and shapes are compared before memory is allocated.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import monai.networks.nets
import onnx
import onnx.checker
import onnx.inliner
import psutil
import safetensors.torch
import torch
import torchvision.models
from google.protobuf.message import DecodeError
from torch.overrides import TorchFunctionMode

from shared.errors import StageFailed
from shared.formats import DTYPE_BYTES, inspect_file
from shared.recipe import Architecture, OnnxSource, Source
from worker.context import Model

MIN_OPSET = 9
CONSTRUCTION_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def check_source(path: Path, source: Source) -> None:
    """Vet the source model's file before a runtime sees it. Raises UnsafeFormat, InvalidFile, StageFailed."""
    if isinstance(source, OnnxSource):
        load_onnx_checked(path)
        return
    with path.open("rb") as file:
        inspect_file(file, path.stat().st_size, "safetensors")


def digest(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- PyTorch


def load_module(model: Model) -> torch.nn.Module:
    """The network of `model.architecture` with the weights of `model.path`, in evaluation mode, fp32, on the CPU.

    Raises StageFailed: unknown_architecture, invalid_arguments, weights_mismatch, model_too_large.
    """
    assert model.architecture is not None
    with model.path.open("rb") as file:
        stored = inspect_file(file, model.path.stat().st_size, "safetensors")["tensors"]
    _check_fits_in_memory(stored)
    build = constructor(model.architecture)
    outline = _construct(build, model.architecture, _LargeTensorsOnMeta())
    _check_weights(outline.state_dict(), stored, model.architecture)
    module = _construct(build, model.architecture, None)
    module.load_state_dict(safetensors.torch.load_file(model.path), strict=True)
    return module.float().eval()


def constructor(architecture: Architecture) -> Callable[[], torch.nn.Module]:
    """What builds the named network: the library's own callable, bound to the recipe's arguments.

    Raises StageFailed: unknown_architecture, invalid_arguments.
    """
    known = registry(architecture.library)
    if architecture.name not in known:
        close = difflib.get_close_matches(architecture.name, known, n=3, cutoff=0.5)
        some = ", ".join(close or sorted(known)[:5])
        raise StageFailed(
            f"{architecture.library} has no network named {architecture.name!r}.",
            hint=f"Close names: {some}." if close else f"It has {len(known)}, among them {some}.",
            code="unknown_architecture",
        )
    build = known[architecture.name]
    fixed = _without_downloads(build, architecture)
    return lambda: build(**{**architecture.arguments, **fixed})


def registry(library: str) -> Mapping[str, Callable[..., torch.nn.Module]]:
    """Every network of a library by the name that a recipe may give it."""
    if library == "torchvision":
        modules = (torchvision.models, torchvision.models.segmentation)
        names = [name for module in modules for name in torchvision.models.list_models(module=module)]
        return {name: torchvision.models.get_model_builder(name) for name in names}
    return {
        name: found
        for name, found in vars(monai.networks.nets).items()
        if isinstance(found, type) and issubclass(found, torch.nn.Module) and not name.startswith("_")
    }


def _without_downloads(build: Callable[..., Any], architecture: Architecture) -> dict[str, Any]:
    """Values for the arguments that would fetch or read weights, so that none does."""
    parameters = inspect.signature(build).parameters
    fetching = [name for name in parameters if "pretrain" in name or name.startswith("weights")]
    for name, value in architecture.arguments.items():
        if ("pretrain" in name or name.startswith("weights") or "path" in name) and value not in (None, False):
            raise StageFailed(
                f"The argument {name!r} of {architecture.name} would load weights by itself.",
                hint="Leave it out: the weights come from the upload.",
                code="invalid_arguments",
            )
    return {name: False if isinstance(parameters[name].default, bool) else None for name in fetching}


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Within it, a tensor of more than 65,536 elements has a shape but no memory.

    Not all go to torch's meta device, because constructors compute on small ones (a schedule of drop rates).
    """

    FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FACTORIES:
            sizes = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
            if math.prod(int(size) for size in sizes if isinstance(size, int)) > 2**16:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _construct(
    build: Callable[[], torch.nn.Module], architecture: Architecture, mode: TorchFunctionMode | None
) -> torch.nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            warnings.filterwarnings("ignore", category=FutureWarning, module="monai|torchvision")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="monai|torchvision")
            warnings.filterwarnings("ignore", message="The default weight initialization of")
            if mode is None:
                return build()
            with mode:
                return build()
    except MemoryError:
        raise
    except CONSTRUCTION_ERRORS as error:
        raise StageFailed(
            f"{architecture.name} cannot be built with these arguments: {error or type(error).__name__}",
            hint=f"It takes {_signature(architecture)}.",
            code="invalid_arguments",
        ) from error


def _signature(architecture: Architecture) -> str:
    parameters = inspect.signature(registry(architecture.library)[architecture.name]).parameters
    return ", ".join(name for name in parameters if name not in ("self", "args", "kwargs"))


def _check_weights(
    expected: Mapping[str, torch.Tensor], stored: Mapping[str, Mapping[str, Any]], architecture: Architecture
) -> None:
    """Compare names, shapes and kinds of the weights with the network's, naming the first few that differ."""
    missing = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected]
    wrong = [
        f"{name} is {stored[name]['shape']}, the network has {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and list(tensor.shape) != stored[name]["shape"]
    ]
    kinds = [
        f"{name} is {stored[name]['dtype']}, the network has {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in expected.items()
        if name in stored and tensor.is_floating_point() != ("F" in stored[name]["dtype"])
    ]
    problems = [("missing", missing), ("unknown", unknown), ("of another shape", wrong), ("of another type", kinds)]
    told = [f"{len(names)} {problem} ({_few(names)})" for problem, names in problems if names]
    if told:
        raise StageFailed(
            f"The weights do not fit {architecture.name}: {len(stored)} tensors, of them {'; '.join(told)}.",
            hint="Give the architecture the arguments that the network was trained with.",
            code="weights_mismatch",
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _check_fits_in_memory(stored: Mapping[str, Mapping[str, Any]]) -> None:
    """The file's tensors and the network's own, side by side in fp32, must fit."""
    needed_bytes = sum(
        math.prod(entry["shape"]) * (4 + DTYPE_BYTES[entry["dtype"]]) for entry in stored.values()
    )
    available_bytes = psutil.virtual_memory().available
    if needed_bytes > available_bytes:
        raise StageFailed(
            f"The model needs {needed_bytes / 2**30:.1f} GiB of memory; {available_bytes / 2**30:.1f} GiB are free.",
            code="model_too_large",
        )


class TensorOutput(torch.nn.Module):
    """A network that gives one tensor, whatever the wrapped one gives.

    Of a dict (torchvision's segmentation networks) that is `out`, or else its first value; of a list or tuple
    (deep supervision, auxiliary heads) the first.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: Any = self.network(inputs)
        while not isinstance(found, torch.Tensor):
            if isinstance(found, dict):
                found = found["out"] if "out" in found else next(iter(found.values()))
            else:
                found = found[0]
        return found


# ---------------------------------------------------------------- ONNX


def load_onnx_checked(path: Path) -> onnx.ModelProto:
    """The ONNX model, if it is whole in itself: one fp32 input of images, standard operators, all weights inside.

    Initializers that are also graph inputs are taken out of the inputs (no runtime folds constants that a caller
    could replace), local functions are inlined. Raises StageFailed with code invalid_onnx.
    """
    with path.open("rb") as file:
        inspect_file(file, path.stat().st_size, "onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except (ValueError, RuntimeError, OSError, DecodeError) as error:
        raise _invalid(f"The ONNX file cannot be read: {error}") from error
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise _invalid(
                f"The weights {tensor.name!r} lie in another file.",
                hint="Save one file: onnx.save(model, path, save_as_external_data=False).",
            )
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _check_domains(model)
    _take_initializers_out_of_inputs(model)
    _check_graph(model)
    return model


def _check_domains(model: onnx.ModelProto) -> None:
    foreign = sorted({node.domain for node in _nodes(model.graph)} - {"", "ai.onnx"})
    if foreign:
        operators = sorted({f"{node.domain}::{node.op_type}" for node in _nodes(model.graph) if node.domain in foreign})
        raise _invalid(
            f"The model uses operators outside the ONNX standard: {_few(operators)}.",
            hint="Export it again with standard operators only; custom operators cannot be vetted.",
        )
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset, newest = versions.get("", versions.get("ai.onnx", 0)), onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise _invalid(f"The model has opset {opset}; {MIN_OPSET} to {newest} are accepted.")
    if model.ir_version > onnx.IR_VERSION:
        raise _invalid(f"The model has IR version {model.ir_version}; up to {onnx.IR_VERSION} are accepted.")


def _take_initializers_out_of_inputs(model: onnx.ModelProto) -> None:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)


def _check_graph(model: onnx.ModelProto) -> None:
    graph = model.graph
    if len(graph.input) != 1:
        names = ", ".join(value.name for value in graph.input)
        raise _invalid(f"The model has {len(graph.input)} inputs ({names}); a network of one input is needed.")
    shape = input_shape(model)
    kind = graph.input[0].type.tensor_type.elem_type
    if kind != onnx.TensorProto.FLOAT:
        raise _invalid(f"The model's input is {onnx.TensorProto.DataType.Name(kind)}; FLOAT is needed.")
    if len(shape) != 4 or any(size is not None and not 1 <= size <= 65_536 for size in shape):
        raise _invalid(f"The model's input has the shape {shape}; (samples, channels, height, width) is needed.")
    if not graph.output or graph.output[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise _invalid("The model's first output must be FLOAT.")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise _invalid(f"The ONNX model is not valid: {str(error).splitlines()[0]}") from error


def input_shape(model: onnx.ModelProto) -> list[int | None]:
    """Shape of the model's input; a dimension that varies is None."""
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    return [entry.dim_value if entry.HasField("dim_value") else None for entry in dimensions]


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of the graph and of the graphs within its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in the model: weights, sparse weights, and constants in attributes, at any depth."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _graph_tensors(inner)


def _invalid(detail: str, hint: str | None = None) -> StageFailed:
    return StageFailed(detail, hint=hint, code="invalid_onnx")
