"""What can be built for: names, the engines behind them, and what a worker must have."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from shared.recipe import BuildEngine
from shared.targets import Batches, TensorRtRtx, describe, engines_of, every_target, name_of

ADA = {"target": "tensorrt-rtx", "compute_capability": "8.9"}
TURING = {"target": "tensorrt-rtx", "compute_capability": "7.5"}


def build(*targets: Any, **words: Any) -> BuildEngine:
    return BuildEngine.model_validate({"targets": list(targets), **words})


@pytest.mark.parametrize(
    ("target", "name", "engines"),
    [
        ("onnxruntime", "onnxruntime", {"engine:onnxruntime"}),
        ("cpu-fastest", "cpu-fastest", {"engine:onnxruntime", "engine:openvino"}),
        ("tensorrt", "tensorrt", {"engine:tensorrt"}),
        (ADA, "tensorrt-rtx-8.9", {"engine:tensorrt_rtx"}),
    ],
)
def test_a_target_has_a_name_and_asks_a_worker_for_its_engines(target: Any, name: str, engines: set[str]) -> None:
    stage = build(target)
    assert [name_of(one) for one in stage.targets] == [name]
    assert stage.requirements() == engines


def test_several_targets_ask_for_all_their_engines_once() -> None:
    stage = build("cpu-fastest", "openvino", ADA, TURING)
    assert stage.engines == ("onnxruntime", "openvino", "tensorrt_rtx")


def test_one_gpu_generation_and_another_are_two_targets_and_one_twice_is_refused() -> None:
    assert len(build(ADA, TURING).targets) == 2
    with pytest.raises(ValidationError, match=r"the target tensorrt-rtx-8\.9 is named twice"):
        build(ADA, "openvino", ADA)


@pytest.mark.parametrize("target", ["tensorrt-rtx", {"target": "tensorrt-rtx", "compute_capability": "9.9"}, "tpu"])
def test_what_cannot_be_built_for_is_refused(target: Any) -> None:
    with pytest.raises(ValidationError):
        build(target)


def test_batches_are_in_order() -> None:
    assert build("tensorrt", batches={"min": 2, "opt": 4, "max": 16}).batches == Batches(min=2, opt=4, max=16)
    with pytest.raises(ValidationError, match="min <= opt <= max, not 1, 9, 8"):
        build("tensorrt", batches={"opt": 9})


def test_a_workspace_is_at_least_a_mebibyte() -> None:
    assert build("tensorrt", workspace_bytes=2**30).workspace_bytes == 2**30
    with pytest.raises(ValidationError):
        build("tensorrt", workspace_bytes=1024)


def test_every_target_is_listed_once_and_told_in_a_sentence() -> None:
    names = [name_of(target) for target in every_target()]
    assert len(names) == len(set(names))
    assert {"onnxruntime", "openvino", "cpu-fastest", "tensorrt", "tensorrt-rtx-8.9", "tensorrt-rtx-12.0"} <= set(names)
    assert all(describe(target).endswith(".") for target in every_target())
    assert all(engines_of(target) for target in every_target())


def test_a_target_survives_being_written_down() -> None:
    stage = build("cpu-fastest", ADA)
    again = BuildEngine.model_validate_json(stage.model_dump_json())
    assert again == stage
    assert isinstance(again.targets[1], TensorRtRtx)
