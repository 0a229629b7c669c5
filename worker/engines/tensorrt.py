"""TensorRT in its two editions, which have one Python API: the file's suffix tells them apart.

TensorRT for RTX (.rtx) builds ahead of time on any machine, without a GPU, for the compute capability that is named;
TensorRT (.trt) builds for the GPU that it runs on. Networks are strongly typed: the precision is that of the ONNX.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx

from shared.errors import StageFailed
from shared.targets import Batches
from worker.context import Model, Progress
from worker.engines.cuda import CudaRunner, gpu

EDITIONS = {".rtx": "tensorrt_rtx", ".trt": "tensorrt"}
RTX_LIBRARIES = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")


@dataclass(frozen=True)
class Plan:
    """What TensorRT is told beside the network. `sample` is one sample's shape, for dimensions that vary.

    `compute_capability` is that of TensorRT for RTX (8.9). `timing_cache` is a file that is read if it is there, and
    written: TensorRT's measurements of its kernels on this GPU. TensorRT for RTX has none.
    """

    edition: str
    sample: tuple[int, ...]
    batches: Batches = field(default_factory=Batches)
    compute_capability: str | None = None
    workspace_bytes: int | None = None
    timing_cache: Path | None = None


def build(model: Model, directory: Path, plan: Plan, progress: Progress) -> Path:
    """The engine's file, for the ONNX of the model.

    Raises StageFailed: operator_refused, with every operator that TensorRT does not take, or engine_failed. What
    `progress` raises ends the build and is raised again.
    """
    trt, told = library(plan.edition), _log(plan.edition)
    builder = trt.Builder(told)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, told)
    content = model.path.read_bytes()
    if not parser.parse(content):
        raise _refusal([parser.get_error(index) for index in range(parser.num_errors)], content)
    config = builder.create_builder_config()
    configure(trt, builder, network, config, plan)

    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    with _timing_cache(config, plan):
        built = builder.build_serialized_network(network, config)
    if monitor.keeper.error is not None:
        raise monitor.keeper.error
    if built is None:
        raise StageFailed(
            f"TensorRT cannot build the engine: {_builders_sentence(told.last_error)}.",
            hint="Name a CPU target instead; what TensorRT said beside this is in the job's log.",
            code="engine_failed",
        )
    suffix = next(suffix for suffix, edition in EDITIONS.items() if edition == plan.edition)
    path = directory / f"model{suffix}"
    path.write_bytes(built)
    return path


def open(model: Model, threads: int) -> CudaRunner:
    """The engine on the first GPU; it uses one CPU thread, whatever is asked.

    Raises StageFailed (engine_failed) where there is no fitting GPU or the file is refused.
    """
    edition = EDITIONS.get(model.path.suffix)
    if edition is None:
        raise StageFailed(f"{model.path.name} is no engine of TensorRT.", code="engine_failed")
    device = gpu()
    if isinstance(device, str):
        raise StageFailed(
            f"An engine of TensorRT needs an NVIDIA GPU: {device}.",
            hint="Run it on the machine that it was built for; the portable ONNX beside it runs anywhere.",
            code="engine_failed",
        )
    trt, told = library(edition), _log(edition)
    with device.current():
        engine = trt.Runtime(told).deserialize_cuda_engine(model.path.read_bytes())
        if engine is None:
            raise StageFailed(f"TensorRT refuses the engine: {told.last_error}", code="engine_failed")
        return CudaRunner(edition, model.precision, trt, engine, device)


def files(path: Path) -> list[Path]:
    """Every file that the runtime loads."""
    return [path]


def not_here(edition: str, compute_capability: str | None) -> str | None:
    """Why an engine cannot run on this machine; None if it can."""
    device = gpu()
    if isinstance(device, str):
        return device
    if edition == "tensorrt_rtx" and device.compute_capability != compute_capability:
        return f"the GPU's compute capability is {device.compute_capability}, the engine's {compute_capability}"
    return None


def timing_cache_name() -> str:
    """Timings fit one GPU and one version of TensorRT, and are kept by them."""
    device = gpu()
    name = "none" if isinstance(device, str) else f"{device.name}-{device.compute_capability}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"timing-{library('tensorrt').__version__}-{name}")


# ---------------------------------------------------------------- the library


@lru_cache
def library(edition: str) -> Any:
    """The Python package of an edition. Raises StageFailed (engine_missing) where it is not installed.

    The bindings of TensorRT for RTX look for its libraries in the process: the wheel of ONNX Runtime's provider has
    them.
    """
    try:
        if edition == "tensorrt":
            return importlib.import_module("tensorrt")
        provider = importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
        if provider is None or provider.origin is None:
            raise ImportError("onnxruntime_ep_nv_tensorrt_rtx is not installed")
        for pattern in RTX_LIBRARIES:
            (path,) = Path(provider.origin).parent.glob(pattern)
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("tensorrt_rtx_bindings")
    except (ImportError, OSError, ValueError) as error:
        extra = "gpu" if edition == "tensorrt" else "rtx"
        raise StageFailed(
            f"{edition} is not installed here: {error}",
            hint=f"Install the worker with the extra {extra!r}.",
            code="engine_missing",
        ) from error


@lru_cache
def _log(edition: str) -> Any:
    """The edition's one logger (the library keeps the first that it is given): warnings and errors to the job's log."""
    trt = library(edition)
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
    }

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "it does not say why"

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level == logging.ERROR:
                self.last_error = message
            if level is not None:
                logging.log(level, "%s: %s", edition, message)

    return Log()


# ---------------------------------------------------------------- what is refused


def _refusal(errors: list[Any], content: bytes) -> StageFailed:
    """Every error of the parser by node and operator, in words, and what can be done about it."""
    numbered = any(error.node() >= 0 for error in errors)  # where there is no graph, no node is to blame
    nodes = onnx.load_model_from_string(content).graph.node if numbered else []
    told, hints = [], []
    for error in errors:
        node = nodes[error.node()] if 0 <= error.node() < len(nodes) else None
        operator = error.node_operator() or (node.op_type if node is not None else "")
        name = error.node_name() or (node.name or node.output[0] if node is not None else "")
        cause, hint = _cause(operator, error.desc())
        told.append(f"{name} ({operator}): {cause}" if operator else cause)
        hints.append(hint)
    return StageFailed(
        f"TensorRT does not take the network: {'; '.join(dict.fromkeys(told))}.",
        hint=" ".join(dict.fromkeys(hints)),
        code="operator_refused",
    )


QUANTIZE_FOR_IT = (
    "Let the recipe's quantize stage come before a build_engine stage that names the TensorRT target: it then makes "
    "the symmetric form that TensorRT takes; or leave quantize out."
)


def _cause(operator: str, told: str) -> tuple[str, str]:
    """The parser's message in our words, and what to do."""
    words = told.lower()
    if operator in ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"):
        return "dynamic quantization is not taken", QUANTIZE_FOR_IT
    if operator in ("QuantizeLinear", "DequantizeLinear"):
        if "int32" in words:
            return "a quantized bias is not taken", QUANTIZE_FOR_IT
        if "zero" in words or "uint8" in words:
            return "a zero point other than 0 is not taken", QUANTIZE_FOR_IT
        return f"this quantization is not taken ({_sentence(told)})", QUANTIZE_FOR_IT
    return _cause_of_float(operator, told)


def _cause_of_float(operator: str, told: str) -> tuple[str, str]:
    if "plugin" in told.lower() or told in ("", "false"):
        return "TensorRT has no such operator", (
            "Export the network with operators that TensorRT takes in its place, or name a CPU target instead."
        )
    if (untaken := re.search(r"does not support (\w+) types?", told)) is not None:
        return f"TensorRT does not compute in {untaken.group(1)}", (
            "Let the network compute in float or int32 there, or name a CPU target instead."
        )
    if "failed to parse the onnx" in told.lower():
        return "the file cannot be read", "Export the model again."
    return _sentence(told), "Export the model with a newer opset, or name a CPU target instead."


def _sentence(told: str) -> str:
    """The parser's own message without the C++ before it."""
    lines = told.strip().splitlines() or ["no reason given"]
    return lines[0].removeprefix("Assertion failed: ").strip()[:300]


def _builders_sentence(told: str) -> str:
    """The builder's own message without the C++ around it."""
    inner = re.search(r"Error Code \d+: [^(]*\((.*)\)", told, re.DOTALL)
    return re.split(r"\s+In \w+ at |\n", told if inner is None else inner.group(1))[0].strip(" .")[:500]


# ---------------------------------------------------------------- building


def configure(trt: Any, builder: Any, network: Any, config: Any, plan: Plan) -> Any:
    """Set shapes, workspace and compute capability; returns the profile of a network whose shapes vary."""
    if network.num_inputs != 1:
        raise StageFailed(
            f"TensorRT engines are built for networks of one input; this one has {network.num_inputs}.",
            hint="Name a CPU target instead.",
            code="engine_failed",
        )
    entry, profile = network.get_input(0), None
    if -1 in tuple(entry.shape):
        batches = (plan.batches.min, plan.batches.opt, plan.batches.max)
        wanted = [zip(entry.shape, (batch, *plan.sample), strict=True) for batch in batches]
        shapes = [tuple(given if fixed == -1 else fixed for fixed, given in pairs) for pairs in wanted]
        profile = builder.create_optimization_profile()
        profile.set_shape(entry.name, *shapes)
        config.add_optimization_profile(profile)
    if plan.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_bytes)
    if plan.compute_capability is not None:
        capability = getattr(trt.ComputeCapability, f"SM{plan.compute_capability.replace('.', '')}", None)
        config.num_compute_capabilities = 1
        if capability is None or not config.set_compute_capability(capability, 0):
            raise StageFailed(
                f"TensorRT {trt.__version__} does not build for compute capability {plan.compute_capability}.",
                code="engine_failed",
            )
    return profile


@contextlib.contextmanager
def _timing_cache(config: Any, plan: Plan) -> Iterator[None]:
    """Use and refresh the file of kernel timings; one of another GPU or version is not used, and written anew."""
    path = plan.timing_cache
    if path is None or plan.edition == "tensorrt_rtx":
        yield
        return
    known = config.create_timing_cache(path.read_bytes()) if path.exists() else None  # None for bytes that are none
    if known is None or not config.set_timing_cache(known, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    yield
    path.write_bytes(config.get_timing_cache().serialize())


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases lie within each other; each tells how many steps it has, and the innermost is heard most often."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases, self.keeper = Phases(), Keeper()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name, step + 1)
            with self.keeper:
                progress(self.phases.fraction, f"TensorRT: {phase_name}")
            return self.keeper.error is None

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()


class Keeper:
    """Keeps what is raised within it, to be raised later: an exception may not pass through the library's own code."""

    error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = self.error or error
        return True


class Phases:
    """How far a build is, of phases within phases: the fraction never goes back."""

    def __init__(self) -> None:
        self._spans: dict[str, tuple[float, float, int]] = {}  # where it begins, how much it is, its steps
        self.fraction = 0.0

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        begin, share = self.fraction, 1.0 - self.fraction
        if parent in self._spans:
            _, outer, steps = self._spans[parent]
            share = outer / max(steps, 1)
        self._spans[name] = (begin, share, num_steps)

    def step(self, name: str, done: int) -> None:
        if name in self._spans:
            begin, share, steps = self._spans[name]
            self.fraction = min(1.0, max(self.fraction, begin + share * done / max(steps, 1)))

    def finish(self, name: str) -> None:
        self._spans.pop(name, None)
