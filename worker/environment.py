"""This machine: what a report says of it, and what its worker can do. Libraries are found, never imported."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from shared.recipe import stage_kinds
from shared.report import Environment

CPUINFO = Path("/proc/cpuinfo")
ENGINES = ("onnxruntime", "openvino")
TENSORRT_RTX = ("tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx")
TENSORRT = ("tensorrt", "pycuda")
LIBRARIES = ("torchvision", "monai", "timm")
PACKAGES = (*ENGINES, "tensorrt", "tensorrt-rtx-cu13-bindings", *LIBRARIES, "torch", "onnx", "nncf", "numpy")


# As the kernel's flags name them, and as engines' documentation does. Those that decide an engine's speed, or its int8.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX512F",
    "avx512_vnni": "AVX512_VNNI",
    "avx_vnni": "AVX_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
    "amx_bf16": "AMX_BF16",
}
DOT_PRODUCTS = {"AVX512_VNNI", "AVX_VNNI", "AMX_INT8"}


def environment() -> Environment:
    """The facts that measurements belong to."""
    return Environment(
        machine=platform.node(),
        cpu=cpu_name(),
        cores=cores(),
        memory_bytes=memory_bytes(),
        gpu=gpu_name(),
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := package_version(name)) is not None},
        instruction_sets=instruction_sets(),
    )


def capabilities() -> list[str]:
    """What jobs can require of a worker here: its stages, engines and architecture libraries."""
    found = [f"engine:{name}" for name in ENGINES if find_spec(name)]
    if all(find_spec(name) for name in TENSORRT_RTX):
        found.append("engine:tensorrt_rtx")
    if all(find_spec(name) for name in TENSORRT) and gpu_name() is not None:
        found.append("engine:tensorrt")
    found += [f"library:{name}" for name in LIBRARIES if find_spec(name)]
    found += [f"stage:{kind}" for kind in stage_kinds() if find_spec(f"worker.stages.{kind}")]
    return found


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@lru_cache
def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Of the CPU, those that decide how fast an engine is, as the kernel lists them; empty on other than x86."""
    flags = set(_cpuinfo("flags").split())
    return [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]


def int8_needs_reduced_range() -> bool:
    """Whether int8 weights must keep to 7 bits here.

    An x86 CPU without VNNI or AMX multiplies u8 by s8 in vpmaddubsw, which adds two products in 16 bits and saturates.
    """
    is_x86 = bool(_cpuinfo("flags"))
    return is_x86 and not DOT_PRODUCTS & set(instruction_sets())


def _cpuinfo(field: str) -> str:
    """A line of the first processor in /proc/cpuinfo; empty where there is none."""
    for line in CPUINFO.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """The machine's memory, or the container's limit where that is lower."""
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        return min(total, int(text))
    return total


@lru_cache
def gpu_name() -> str | None:
    """The first GPU and its compute capability, such as 'NVIDIA L4 (8.9)', if the driver shows one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    if told.returncode != 0 or not told.stdout.strip():
        return None
    name, _, capability = told.stdout.strip().splitlines()[0].rpartition(",")
    return f"{name.strip()} ({capability.strip()})"
