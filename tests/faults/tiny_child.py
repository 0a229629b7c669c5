"""A job's process without any numerical library: real leash, limits and wire, but its models are digests of digests.

It runs in place of worker/child.py as `python -P tiny_child.py <file descriptor>`. The job's name is its script: words
of one deed a stage, separated by semicolons, for instance "wait 0 /tmp/here; kill 1".

    wait P FILE     at stage P, make the file and wait until somebody removes it
    kill P          at stage P, be killed by SIGKILL; segfault P by SIGSEGV
    once P FILE     at stage P, be killed by SIGKILL unless the file is there, and make it
    silent P        at stage P, say nothing any more
    memory P        at stage P, take 2 GiB, which no machine lacks and the job's limit does not allow
    device P        at stage P, fail as a GPU does whose context is lost
    disk P BYTES    at stage P, leave a file so large
    large P BYTES   stage P's file is so large, and the checkpoint after its n-th epoch n times that
    drop P          stage P is told to have missed a goal
    epochs P N [S]  stage P trains for N epochs, of S seconds if told, and keeps a checkpoint after each
    tally P FILE    each epoch of stage P is a line of the file, which outlives whoever is killed
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared.judging import judge_all, verdict_of
from shared.report import Baseline, Environment, Latency, Measurement, Method, Report, StageReport
from worker import child, wire
from worker.causes import cause_of

FORMATS = {"prune": "safetensors", "export_onnx": "onnx", "quantize": "onnx", "build_engine": "engine"}
METHOD = Method(
    engine="none", precision="none", device="none", threads=1, batch=1, warm_up=0, runs=1, samples=1, versions={}
)
DIGEST_BYTES = 2**14
ENVIRONMENT = Environment(machine="tiny", cpu="tiny", cores=1, memory_bytes=1, gpu=None, python="3", packages={})


def main(file_descriptor: int) -> None:
    ticket = wire.Ticket.model_validate_json(Path(wire.TICKET).read_text(encoding="utf-8"))
    mouth = wire.Mouth(file_descriptor)
    pipeline = Pipeline(ticket, mouth)
    try:
        mouth.tell(wire.Finished(report=pipeline.run()))
    except (MemoryError, OSError, RuntimeError) as error:
        cause = cause_of(error)
        told = {"code": cause or "internal_error", "message": str(error), "fault": "platform", "cause": cause}
        mouth.tell(wire.Failed.model_validate({"position": pipeline.position, **told}))


class Pipeline:
    """One attempt at one recipe."""

    def __init__(self, ticket: wire.Ticket, mouth: wire.Mouth) -> None:
        self.ticket, self.mouth = ticket, mouth
        self.position: int | None = None

    def run(self) -> Report:
        ticket = self.ticket
        baseline = ticket.baseline or self._baseline(ticket.cached)
        content, done_stages = ticket.source.read_bytes() + ticket.data.read_bytes(), []
        for position, stage in enumerate(ticket.recipe.stages):
            done = next((done for done in ticket.finished if done.report.position == position), None)
            cached = ticket.cached.stages if ticket.cached is not None else []
            taken = next((taken for taken in cached if taken.report.position == position), None)
            if taken is not None:
                content = taken.files["model"].read_bytes()[:DIGEST_BYTES]
                done_stages.append(self._take(taken))
                continue
            if done is not None:
                content = done.files["model"].read_bytes()[:DIGEST_BYTES]
                done_stages.append(done.report)
                continue
            self.position = position
            self.mouth.ask(wire.StageStarted(position=position))
            content = self._train(position, digest(content, stage.kind))
            self._obey(position)
            done_stages.append(self._finish(position, stage.kind, content))
        final = done_stages[-1]
        goals = judge_all(ticket.recipe.goals_in_force, baseline.source, final)
        return Report(
            job=ticket.job_id,
            name=ticket.name,
            recipe=ticket.recipe,
            source_sha256=ticket.source_sha256,
            data_sha256=ticket.data_sha256,
            environment=ENVIRONMENT,
            baseline=baseline,
            stages=done_stages,
            final=final.position,
            goals=goals,
            verdict=verdict_of(baseline.source, final, goals),
            reason="It is tiny.",
        )

    def _baseline(self, cached: wire.Cached | None) -> Baseline:
        known = cached.baseline if cached is not None else None
        baseline = known or Baseline(source=measured(100), onnxruntime=None, environment=ENVIRONMENT)
        self.mouth.ask(wire.BaselineMeasured(baseline=baseline))
        return baseline

    def _train(self, position: int, content: bytes) -> bytes:
        """A digest an epoch, from the newest checkpoint on."""
        num_epochs, epoch_seconds = epochs(self.ticket.name, position)
        kept = next((kept.path for kept in self.ticket.checkpoints if kept.position == position), None)
        epoch = 0
        if kept is not None:
            number, content = kept.read_bytes().split(b"\n", 1)
            epoch, content = int(number), content[:DIGEST_BYTES]
        path = Path(f"{position}.checkpoint")
        while epoch < num_epochs:
            threading.Event().wait(epoch_seconds)
            epoch, content = epoch + 1, digest(content, "epoch")
            for file in told(self.ticket.name, position, "tally"):
                with Path(file).open("a", encoding="utf-8") as tally:
                    tally.write(f"{position} {epoch}\n")
            self.mouth.tell(wire.Progressed(position=position, fraction=epoch / num_epochs, message=f"epoch {epoch}"))
            print(f"epoch {epoch}", flush=True)
            path.write_bytes(b"%d\n" % epoch + padded(self.ticket.name, position, content, epoch))
            self.mouth.ask(wire.Checkpointed(position=position, name="training", path=path))
        return content

    def _obey(self, position: int) -> None:
        for verb, _, *rest in deeds(self.ticket.name, position):
            match verb:
                case "wait":
                    wait_for_removal(Path(rest[0]))
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "segfault":
                    os.kill(os.getpid(), signal.SIGSEGV)
                case "once":
                    if not Path(rest[0]).exists():
                        Path(rest[0]).touch()
                        os.kill(os.getpid(), signal.SIGKILL)
                case "silent":
                    threading.Event().wait()
                case "memory":
                    bytearray(2**31)
                case "device":
                    raise RuntimeError("CUDA error: device-side assert triggered")
                case "disk":
                    Path("large").write_bytes(bytes(int(rest[0])))

    def _take(self, taken: wire.FinishedStage) -> StageReport:
        self.position = taken.report.position
        self.mouth.ask(wire.StageStarted(position=self.position))
        [note] = taken.report.artifacts
        file = wire.File(role=note.role, name=note.name, format=note.format, path=taken.files[note.role])
        return self._tell(taken.report.model_copy(update={"artifacts": []}), file)

    def _finish(self, position: int, kind: str, content: bytes) -> StageReport:
        name = f"{position}-{kind}.{FORMATS[kind]}"
        Path(name).write_bytes(padded(self.ticket.name, position, content))
        is_dropped = any(verb == "drop" for verb, *_ in deeds(self.ticket.name, position))
        outcome = "dropped" if is_dropped else "succeeded"
        report = StageReport.model_validate(
            {"position": position, "kind": kind, "status": outcome, "seconds": 0, "measurement": measured(len(content))}
        )
        return self._tell(report, wire.File(role="model", name=name, format=FORMATS[kind], path=Path(name)))

    def _tell(self, report: StageReport, file: wire.File) -> StageReport:
        answer = self.mouth.ask(wire.StageFinished(report=report, files=[file]))
        return StageReport.model_validate_json(
            json.dumps({**report.model_dump(mode="json"), "artifacts": answer["artifacts"]})
        )


def deeds(script: str, position: int) -> Iterator[list[str]]:
    """The words of each deed of a stage."""
    for deed in script.split(";"):
        words = deed.split()
        if len(words) > 1 and words[1] == str(position):
            yield words


def told(script: str, position: int, verb: str) -> list[str]:
    """What a deed of a stage tells beside its stage; nothing if there is no such deed."""
    return next((rest for found, _, *rest in deeds(script, position) if found == verb), [])


def epochs(script: str, position: int) -> tuple[int, float]:
    """How many a stage trains for, and the seconds of each."""
    num_epochs, seconds, *_ = (*told(script, position, "epochs"), "0", "0")
    return int(num_epochs), float(seconds)


def padded(script: str, position: int, content: bytes, times: int = 1) -> bytes:
    """A stage's content as large as the script wants its file."""
    return content.ljust(sum(map(int, told(script, position, "large"))) * times, b"\0")


def digest(content: bytes, kind: str) -> bytes:
    """16 KiB that tell what they were made of."""
    return hashlib.sha256(content + kind.encode()).digest() * (DIGEST_BYTES // 32)


def faultless(script: str, kinds: Sequence[str], content: bytes) -> list[str]:
    """sha256 of what each stage of a job leaves when nothing happens to it; `content` is the source and the data."""
    left = []
    for position, kind in enumerate(kinds):
        content = digest(content, kind)
        for _ in range(epochs(script, position)[0]):
            content = digest(content, "epoch")
        left.append(hashlib.sha256(padded(script, position, content)).hexdigest())
    return left


def measured(size_bytes: int) -> Measurement:
    return Measurement(
        parameters=1,
        macs=1,
        size_bytes=size_bytes,
        latency_ms=Latency(p50=1, p90=1),
        baseline_latency_ms=Latency(p50=2, p90=2),
        throughput_per_second={1: 1.0},
        peak_memory_bytes=1,
        metrics={},
        method=METHOD,
    )


def wait_for_removal(file: Path) -> None:
    file.touch()
    pause = threading.Event()
    while file.exists():
        pause.wait(0.01)


if __name__ == "__main__":
    sys.modules["worker.pipeline"] = sys.modules["__main__"]  # what worker/child.py runs once the limits are on
    child.main()
