"""What the child may say: what the ledger can keep, and files under roles and names of its own stage's."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.recipe import ModelFormat
from shared.report import StageReport
from shared.storable import why_not_storable
from shared.targets import every_target, name_of
from worker import wire
from worker.context import Form, Graph, Model
from worker.handover import files_of


@contextmanager
def line_between() -> Iterator[tuple[wire.Mouth, wire.Ear]]:
    """The child's end of a socket, and its supervisor's."""
    ours, theirs = socket.socketpair()
    mouth = wire.Mouth(theirs.detach())
    with ours, mouth._socket:
        yield mouth, wire.Ear(ours)
        mouth._answers.close()


def failed(**changes: Any) -> bytes:
    told = {"kind": "failed", "position": None, "code": "x", "message": "It failed.", "fault": "user", **changes}
    return json.dumps(told).encode()


# ---------------------------------------------------------------- texts


def test_what_a_file_is_called_by_its_owner_arrives_in_letters_that_the_ledger_has() -> None:
    details = {"layers": ["a\0b", "c\ud800d"], "by\0name": {"1": 0.5, "é": None}}
    report = StageReport(position=0, kind="quantize", status="succeeded", seconds=1.0, details=details)
    with line_between() as (mouth, ear):
        mouth.tell(wire.StageFinished(report=report, files=[]))
        [line] = ear.lines() or []
    said = wire.parse(line)
    assert isinstance(said, wire.StageFinished)
    assert said.report.details == {"layers": ["a\\x00b", "c\\ud800d"], "by\\x00name": {"1": 0.5, "é": None}}


@pytest.mark.parametrize(
    "line",
    [
        failed(message="e\0vil"),
        failed(hint="e\0vil"),
        failed(code="e\0vil"),
        json.dumps({"kind": "progressed", "position": 0, "fraction": 0.5, "message": "\0"}).encode(),
        json.dumps({"kind": "checkpointed", "position": 0, "name": "a", "path": "a\0b"}).encode(),
    ],
)
def test_a_text_that_the_ledger_cannot_keep_is_none_of_the_protocol(line: bytes) -> None:
    with pytest.raises(ValueError, match="NUL character"):
        wire.parse(line)


def test_a_name_deep_in_a_report_is_looked_at_too() -> None:
    report = StageReport(position=0, kind="quantize", status="succeeded", seconds=1.0, details={"a": [{"b\0": 1}]})
    line = wire.StageFinished(report=report, files=[]).model_dump_json().encode()
    with pytest.raises(ValueError, match="NUL character"):
        wire.parse(line)


def test_what_is_no_number_arrives_as_null() -> None:
    line = wire.StageFinished(
        report=StageReport(position=0, kind="k", status="succeeded", seconds=1.0, details={"loss": 0.5}), files=[]
    ).model_dump_json()
    said = wire.parse(line.replace("0.5", "NaN").encode())
    assert isinstance(said, wire.StageFinished)
    assert why_not_storable(said.report.model_dump(mode="json")) is None


@pytest.mark.parametrize("position", [-1, 2**31])
@pytest.mark.parametrize("kind", ["progressed", "stage_started", "checkpointed", "failed"])
def test_a_position_is_one_that_the_ledger_could_hold(kind: str, position: int) -> None:
    told = {
        "progressed": {"fraction": 0.5, "message": ""},
        "stage_started": {},
        "checkpointed": {"name": "a", "path": "a"},
        "failed": {"code": "x", "message": "m", "fault": "user"},
    }
    with pytest.raises(ValueError, match="position"):
        wire.parse(json.dumps({"kind": kind, "position": position, **told[kind]}).encode())


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("role", ["timings", "checkpoint", "log", "report", "upload", "", "model\n", "form", "engine."])
def test_a_role_that_is_no_stages_is_refused(role: str) -> None:
    with pytest.raises(ValueError, match="role"):
        wire.File(role=role, name="0-a.onnx", format="onnx", path=Path("file"))


def test_every_file_that_a_stage_leaves_has_a_role_and_a_name_that_are_taken() -> None:
    runtimes = ("any", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")
    forms = tuple(
        Form(runtime, precision, Path(f"model.{runtime}.xml"))
        for runtime in runtimes
        for precision in ("fp32", "fp16", "bf16", "int8", "int8+fp32")
    )
    engines = tuple(Path(f"{name_of(target)}.zip") for target in every_target())
    models = [
        Model(ModelFormat.TORCH, Path("model.safetensors"), Graph(Path("graph.onnx"))),
        Model(ModelFormat.ONNX, Path("model.onnx"), forms=forms),
        Model(ModelFormat.ENGINE, engines[0], engines=engines[1:]),
    ]
    for model in models:
        report = StageReport(position=19, kind="build_engine", status="succeeded", seconds=1.0)
        assert len(files_of(report, model)) == len(model.files())
