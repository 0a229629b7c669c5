"""Names in a stranger's file, and what a child says that read it: the job ends with a reason, the worker works on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import onnx
import pytest

from shared.ledger import Progress
from tests.faults.ground import Ground
from tests.worker.workbench import small_onnx
from tests.worker.workshop import Workshop, wait_until
from worker import process
from worker.heart import Heart
from worker.pipeline import Pipeline

Change = Callable[[onnx.ModelProto], None]


def submit(workshop: Workshop, change: Change) -> UUID:
    """A job on an ONNX of one convolution, changed."""
    path = workshop.directory / "strange.onnx"
    model = small_onnx(path, classes=3)
    change(model)
    onnx.save(model, path)
    stages = [{"kind": "quantize", "scheme": "fp16"}]
    return workshop.submit(source={"onnx": str(workshop.keep(path, "onnx"))}, stages=stages)


def test_a_name_with_a_nul_is_told_to_its_owner_with_the_nul_shown(workshop: Workshop) -> None:
    job_id = submit(workshop, lambda model: domain(model, "e\0vil", "Conv"))
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert (reason["code"], reason["fault"]) == ("invalid_onnx", "user")
    assert reason["message"] == "The model uses operators outside the ONNX standard: e\\x00vil::Conv."


def test_a_refusal_that_is_too_long_is_cut_and_told(workshop: Workshop) -> None:
    job_id = submit(workshop, lambda model: domain(model, "evil", "x" * 5000))
    assert workshop.work() == "failed"
    job = workshop.job(job_id)
    assert job.state_reason is not None
    assert (job.state_reason["code"], job.crashes) == ("invalid_onnx", 0)
    assert job.state_reason["message"].endswith("xxx…")


def domain(model: onnx.ModelProto, name: str, operator: str) -> None:
    model.graph.node[0].domain, model.graph.node[0].op_type = name, operator
    model.opset_import.append(onnx.helper.make_opsetid(name, 1))


def test_every_refusal_can_be_told() -> None:
    """Also of a safetensors file whose names are half a character, and one in which every text is far too long."""
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.position = 3
    told = pipeline.failure("weights_mismatch", "1 unknown (a\ud800)", "Give\0 it.")
    assert (told.position, told.message, told.hint) == (3, "1 unknown (a\\ud800)", "Give\\x00 it.")
    told = pipeline.failure("c" * 100, "m" * 10_000, "h" * 10_000, "platform", "device")
    assert [len(text or "") for text in (told.code, told.message, told.hint)] == [60, 4000, 2000]
    assert (told.fault, told.cause) == ("platform", "device")


# ---------------------------------------------------------------- a child that lies

LIAR = """
import json, socket, sys
from pathlib import Path
child = socket.socket(fileno=int(sys.argv[1]))
answers = child.makefile("rb")
Path("file").write_bytes(b"a file")
for line in json.loads(Path(json.loads(Path("ticket.json").read_text())["name"]).read_text()):
    child.sendall(json.dumps(line).encode() + b"\\n")
    if line["kind"] in ("stage_started", "stage_finished", "checkpointed"):
        answers.readline()
"""
STARTED = {"kind": "stage_started", "position": 0}
FILE = {"role": "model", "name": "0-quantize.onnx", "format": "onnx", "path": "file"}


def work(ground: Ground, monkeypatch: pytest.MonkeyPatch, *said: dict[str, Any]) -> dict[str, Any]:
    """Have a child say so and end; the reason with which the job failed."""
    monkeypatch.setattr(process, "PROGRAM", ("-P", "-c", LIAR))
    script = ground.directory / "said.json"
    script.write_text(json.dumps(said), encoding="utf-8")
    job_id = ground.submit(str(script))
    assert ground.work() == "failed", ground.reason(job_id)
    return ground.reason(job_id)


def finished(*files: dict[str, Any], position: int = 0, **details: Any) -> dict[str, Any]:
    report = {"position": position, "kind": "quantize", "status": "succeeded", "seconds": 1.0, "details": details}
    return {"kind": "stage_finished", "report": report, "files": list(files)}


def failure(**changes: Any) -> dict[str, Any]:
    return {"kind": "failed", "position": None, "code": "x", "message": "m", "fault": "user", **changes}


@pytest.mark.parametrize(
    "said",
    [
        [failure(message="e\0vil")],
        [failure(**{"e\0vil": "what the protocol has not"})],
        [failure(position=2**40)],
        [STARTED, {"kind": "progressed", "position": 0, "fraction": 0.5, "message": "e\0vil"}],
        [STARTED, finished(layer="a\0b")],
        [STARTED, finished({**FILE, "role": "timings"})],
        [STARTED, {"kind": "checkpointed", "position": 0, "name": "a", "path": "file"},
         finished({**FILE, "name": "0-a.checkpoint"})],
    ],
    ids=["a refusal", "a word", "a position", "progress", "a report", "a role", "a checkpoint's name"],
)  # fmt: skip
def test_what_the_ledger_cannot_keep_ends_the_job_and_not_its_worker(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, said: list[dict[str, Any]]
) -> None:
    reason = work(ground, monkeypatch, *said)
    assert (reason["code"], reason["fault"]) == ("protocol_broken", "platform")
    assert reason["message"].startswith("The job's process broke the protocol: ")


def test_what_the_database_itself_refuses_ends_the_job_and_not_its_worker(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reason = work(ground, monkeypatch, STARTED, finished(position=2**40))
    assert (reason["code"], reason["fault"]) == ("internal_error", "platform")
    assert "out of range" in reason["message"]
    [told] = [record for record in caplog.records if record.getMessage() == "ledger_refused"]
    assert told.exc_info is not None


def test_progress_that_the_database_refuses_is_left_untold(workshop: Workshop) -> None:
    job_id = workshop.submit(**workshop.brief())
    settings = workshop.settings.model_copy(update={"heartbeat_seconds": 0.05})
    log = workshop.directory / "log"
    heart = Heart(workshop.sessions, workshop.sessions, workshop.claim(), settings, log, lambda: None)
    heart.start()
    heart.carry(Progress(0, 0.5, "e\0vil"))
    wait_until(lambda: heart._progress is None, "it to be looked at")
    heart.carry(Progress(0, 0.75, "good"))
    workshop.wait_for_event(job_id, "progress", message="good")
    heart.stop()
    assert heart.cause is None


def test_the_script_of_a_liar_is_believed_where_it_is_right(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is refused above is refused for what it says."""
    reason = work(ground, monkeypatch, STARTED, finished(FILE, layer="ab"), failure(position=1, message="m" * 4000))
    assert (reason["code"], reason["stage"], len(reason["message"])) == ("x", 1, 4000)


def test_a_path_of_the_childs_is_its_own(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = work(ground, monkeypatch, STARTED, finished({**FILE, "path": str(Path("..") / "file")}))
    assert reason["message"].endswith("is not a plain file of the job's directory")
