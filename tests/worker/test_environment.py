"""A worker says that it can build for a GPU only where it has what that takes."""

from __future__ import annotations

import importlib.util

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
