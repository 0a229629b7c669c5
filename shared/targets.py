"""What an engine can be built for: the runtimes of a CPU, and NVIDIA's TensorRT in its two editions."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from shared.subject import Words

CpuTarget = Literal["onnxruntime", "openvino", "cpu-fastest"]
ComputeCapability = Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]


class TensorRtRtx(Words):
    """TensorRT for RTX, built ahead of time on any machine for the RTX GPUs of one compute capability."""

    target: Literal["tensorrt-rtx"]
    compute_capability: ComputeCapability


Target = CpuTarget | Literal["tensorrt"] | TensorRtRtx


class Batches(Words):
    """Batch sizes that a TensorRT engine takes, and the one that it is tuned for."""

    min: int = Field(default=1, ge=1, le=256)
    opt: int = Field(default=1, ge=1, le=256)
    max: int = Field(default=8, ge=1, le=256)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"batches need min <= opt <= max, not {self.min}, {self.opt}, {self.max}")
        return self


def name_of(target: Target) -> str:
    """The target's name in reports and file names: tensorrt-rtx-8.9."""
    return f"tensorrt-rtx-{target.compute_capability}" if isinstance(target, TensorRtRtx) else target


def engines_of(target: Target) -> tuple[str, ...]:
    """The runtimes that are built for the target, and compared where there are several."""
    match target:
        case TensorRtRtx():
            return ("tensorrt_rtx",)
        case "cpu-fastest":
            return ("onnxruntime", "openvino")
        case _:
            return (target,)


def every_target() -> list[Target]:
    """All that can be asked for."""
    plain: list[Target] = [*get_args(CpuTarget), "tensorrt"]
    return plain + [
        TensorRtRtx(target="tensorrt-rtx", compute_capability=capability) for capability in get_args(ComputeCapability)
    ]


def describe(target: Target) -> str:
    """What is built for the target, and where it runs."""
    match target:
        case "cpu-fastest":
            return "Engines for onnxruntime and openvino; the fastest that agrees with the source model is kept."
        case "tensorrt":
            return "An engine of TensorRT for the GPU of the worker that builds it, measured there."
        case TensorRtRtx():
            return f"An engine of TensorRT for RTX, built ahead of time for GPUs of {target.compute_capability}."
        case _:
            return f"An engine for {target}."
