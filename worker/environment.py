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

ENGINES = ("onnxruntime", "openvino")
TENSORRT_RTX = ("tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx")
TENSORRT = ("tensorrt", "pycuda")
LIBRARIES = ("torchvision", "monai", "timm")
PACKAGES = (*ENGINES, "tensorrt", "tensorrt-rtx-cu13-bindings", *LIBRARIES, "torch", "onnx", "nncf", "numpy")


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
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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
