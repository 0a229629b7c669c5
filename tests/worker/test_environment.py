"""What a worker says of its machine: what it can build for, and which instructions its CPU has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from shared.targets import every_target
from worker import environment


def test_every_runtime_that_is_installed_is_a_capability() -> None:
    found = environment.capabilities()
    assert len(found) == len(set(found))
    assert {"engine:onnxruntime", "engine:openvino", "stage:build_engine"} <= set(found)
    installed = all(importlib.util.find_spec(name) for name in environment.TENSORRT_RTX)
    assert ("engine:tensorrt_rtx" in found) == installed


def test_tensorrt_is_a_capability_only_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: object())  # as if everything were installed
    monkeypatch.setattr(environment, "gpu_name", lambda: None)
    assert "engine:tensorrt" not in environment.capabilities()
    monkeypatch.setattr(environment, "gpu_name", lambda: "NVIDIA L4 (8.9)")
    assert "engine:tensorrt" in environment.capabilities()


def test_half_of_the_rtx_extra_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: object() if name == "tensorrt_rtx_bindings" else None)
    assert environment.capabilities() == []


def test_every_target_asks_for_a_capability_that_an_environment_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.recipe import BuildEngine

    monkeypatch.setattr(environment, "find_spec", lambda name: object())
    monkeypatch.setattr(environment, "gpu_name", lambda: "NVIDIA L4 (8.9)")
    able = set(environment.capabilities())
    assert all(BuildEngine(targets=[target]).requirements() <= able for target in every_target())


CPUINFO = """processor\t: 0
model name\t: Example CPU
flags\t\t: {flags}

processor\t: 1
model name\t: Example CPU
flags\t\t: {flags}
"""


@pytest.mark.parametrize(
    ("flags", "sets", "reduced"),
    [
        ("sse4_1 fma avx2", ["AVX2"], True),
        ("avx2 avx512f avx512dq", ["AVX2", "AVX512F"], True),
        ("avx2 avx_vnni", ["AVX2", "AVX_VNNI"], False),
        ("avx2 avx512_vnni avx512f avx512_bf16", ["AVX2", "AVX512F", "AVX512_VNNI", "AVX512_BF16"], False),
        ("avx2 avx512f amx_bf16 amx_tile amx_int8", ["AVX2", "AVX512F", "AMX_INT8", "AMX_BF16"], False),
        ("ssse3", [], True),
    ],
)
def test_instruction_sets_are_those_of_the_kernel_and_int8_needs_vnni_or_amx(
    flags: str, sets: list[str], reduced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags=flags))
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    assert environment.instruction_sets() == sets
    assert environment.environment().instruction_sets == sets
    assert environment.int8_needs_reduced_range() is reduced


def test_a_processor_of_another_kind_needs_no_reduced_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    assert environment.instruction_sets() == []
    assert not environment.int8_needs_reduced_range()


def test_instruction_sets_do_not_change_what_measurements_compare_between() -> None:
    here = environment.environment()
    assert here.model_copy(update={"instruction_sets": []}).fingerprint() == here.fingerprint()
