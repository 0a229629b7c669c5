"""What a training step computes in: fp32 or half precision, and the order of values in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

LEAST_GAIN = 1.2  # below which a step's time is no reason to leave fp32
LEAST_STEPS, LEAST_SECONDS = 100, 20.0  # of a training that is worth measuring for
TIMED_STEPS = 2

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepForm:
    """How a step is computed. Weights stay fp32; with `channels_last` a voxel's channels lie side by side."""

    precision: Precision = "fp32"
    channels_last: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.precision != "fp32")

    def laid_out(self, inputs: torch.Tensor) -> torch.Tensor:
        """A batch (n, C, [D,] H, W) in the memory format of the step."""
        return inputs.contiguous(memory_format=_memory_format(inputs.ndim)) if self.channels_last else inputs

    def lay_out(self, network: nn.Module) -> None:
        """Bring the network's weights into the memory format of the step, in place."""
        for parameter in network.parameters():
            wanted = _memory_format(parameter.ndim) if self.channels_last else torch.contiguous_format
            parameter.data = parameter.data.contiguous(memory_format=wanted)


PLAIN = StepForm()


def _memory_format(rank: int) -> torch.memory_format:
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(rank, torch.contiguous_format)


def form_on_gpu(device: torch.device) -> StepForm:
    """bf16 where the GPU computes in it, else fp16."""
    return StepForm("fp16" if torch.cuda.get_device_capability(device) < (8, 0) else "bf16")


def fastest_form(
    step: Callable[[StepForm], None], num_steps: int, clock: Callable[[], float] = time.monotonic
) -> StepForm:
    """The form in which a CPU does a step fastest, by real steps; plain fp32 unless another is clearly faster.

    A training that is short anyway is not measured for: its weights are then the same whatever else the machine does.
    """
    if num_steps < LEAST_STEPS:
        return PLAIN
    seconds = {PLAIN: _seconds(step, PLAIN, clock)}
    if seconds[PLAIN] * num_steps < LEAST_SECONDS:
        return PLAIN
    for form in _others():
        seconds[form] = _seconds(step, form, clock)
    fastest = min(seconds, key=lambda form: seconds[form])
    return fastest if seconds[PLAIN] >= LEAST_GAIN * seconds[fastest] else PLAIN


def _others() -> Iterator[StepForm]:
    yield StepForm(channels_last=True)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported():
        yield StepForm("bf16")
        yield StepForm("bf16", channels_last=True)


def _seconds(step: Callable[[StepForm], None], form: StepForm, clock: Callable[[], float]) -> float:
    """A step's time, after one that does not count."""
    step(form)
    times = []
    for _ in range(TIMED_STEPS):
        began = clock()
        step(form)
        times.append(clock() - began)
    return min(times)
