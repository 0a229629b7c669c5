"""A job's wall time, from 202 to succeeded, beside the same stages as a plain script."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from benchmarks.figures import Figure, Part, percentile
from benchmarks.stand import Stand
from burnish.client import Job
from burnish.local.waiting import wait_until
from shared.schemas import JobRequest

PAIRS = 3
EPOCHS = 6
MOST_RATIO, MOST_SECONDS = 1.05, 2.0
ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "brain_mri"

CPU = "processor time, supervisor excluded"
Seconds = dict[str, float]  # by step


@dataclass(frozen=True)
class Example:
    """The brain MRI example's job file, with a network that was trained for a moment, and the order that it makes."""

    job_file: Path
    weights: Path
    data: Path


def prepare(directory: Path) -> Example:
    """The example's real data and architecture; trained for a moment, so every stage goes on whatever it scores."""
    build = directory / "build"
    run = [sys.executable, str(EXAMPLE / "prepare.py"), "--out", str(build)]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    example = Example(directory / "job.yaml", build / "unet.safetensors", build / "data.safetensors")
    run = [sys.executable, str(EXAMPLE / "train.py"), "--data", str(example.data), "--out", str(example.weights)]
    run += ["--epochs", str(EPOCHS), "--threads", "2"]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    document = yaml.safe_load((EXAMPLE / "job.yaml").read_text(encoding="utf-8"))
    document["recipe"] |= {"goals": [], "expect": {}}
    for stage in document["recipe"]["stages"]:
        stage["on_miss"] = "continue"
    example.job_file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return example


def warm_up(stand: Stand, example: Example) -> JobRequest:
    """Run the job once, unmeasured: libraries come into the disk's cache. Returns its order, files uploaded."""
    job = stand.client.submit(example.job_file).wait()
    return JobRequest(name=job.name, recipe=job.view.recipe, cache=False)


def measure(stand: Stand, order: JobRequest, example: Example) -> Part:
    """Pairs of a job and a script, each first in every other pair."""
    jobs: list[Seconds] = []
    scripts: list[Seconds] = []
    for number in range(PAIRS):
        for is_job in (True, False) if number % 2 == 0 else (False, True):
            if is_job:
                jobs.append(_job(stand, order))
            else:
                scripts.append(_script(order, example))
    return _part(jobs, scripts)


def _job(stand: Stand, order: JobRequest) -> Seconds:
    """`total` by the client's clock, from the 202's arrival to the stream's end; steps by the job's events."""
    worker = psutil.Process(stand.pid("worker-1"))
    cpu_before = _children_cpu(worker.cpu_times())
    job = stand.client.submit(order)
    begin = time.monotonic()
    job.wait()
    total = time.monotonic() - begin
    assert [stage.status for stage in job.view.stages] == ["succeeded"] * len(job.view.stages), job.view.stages
    wait_until(lambda: not worker.children(), timeout_seconds=10)  # only what has ended is in the account
    return {"total": total, **_steps(job), CPU: _children_cpu(worker.cpu_times()) - cpu_before}


def _children_cpu(times: psutil._ntuples.pcputimes) -> float:
    """Processor seconds of all descendants that have ended."""
    return float(times.children_user + times.children_system)


def _steps(job: Job) -> Seconds:
    """Seconds between the events that end a step."""
    steps, before = dict[str, float](), None
    for event in job.events():
        if event.kind in ("log", "progress", "stage_started"):
            continue
        if before is not None:
            steps[_name(event.kind, event.data.get("stage"), job)] = (event.at - before).total_seconds()
        before = event.at
    return steps


def _name(kind: str, stage: int | None, job: Job) -> str:
    match kind:
        case "claimed":
            return "waiting"
        case "baseline_measured":
            return "start and baseline"
        case "stage_finished":
            assert stage is not None
            return f"{stage} {job.view.stages[stage].kind}"
    return "report"


def _script(order: JobRequest, example: Example) -> Seconds:
    """`total` from the start of the process to its end; steps as it tells them."""
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as directory:
        recipe = Path(directory) / "recipe.json"
        recipe.write_text(order.recipe.model_dump_json(), encoding="utf-8")
        files = [str(path) for path in (recipe, example.weights, example.data, Path(directory) / "out")]
        Path(files[-1]).mkdir()
        command = [sys.executable, "-m", "benchmarks.plain_script", *files]
        cpu_before, begin = _children_cpu(psutil.Process().cpu_times()), time.monotonic()
        done = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True)
        total = time.monotonic() - begin
    steps: Seconds = json.loads(done.stdout.splitlines()[-1])
    together = steps.pop("start and imports") + steps.pop("baseline")
    cpu = _children_cpu(psutil.Process().cpu_times()) - cpu_before
    return {"total": total, "start and baseline": together, **steps, CPU: cpu}


def _part(jobs: list[Seconds], scripts: list[Seconds]) -> Part:
    job, script = (percentile([run["total"] for run in runs], 50) for runs in (jobs, scripts))
    most = MOST_RATIO * script + MOST_SECONDS
    steps = list(dict.fromkeys(step for run in jobs for step in run))
    rows = [
        f"| {step} | {_median(jobs, step)} | {_median(scripts, step)} |" for step in (*steps[1:], steps[0])
    ]
    return Part(
        title="A job beside a plain script",
        method=(
            f"The brain MRI example (its data, its architecture, a network trained for {EPOCHS} epochs, its recipe "
            f"without goals), {PAIRS} pairs in turns after one job that is not counted. The job: from the 202's "
            f"arrival to the end of the event stream that `burnish wait` follows, with the api, the worker, the "
            f"sweeper and the servers on the same cores. The script (benchmarks/plain_script.py): from the start of "
            f"its process to its end, with the same stages, evaluations and measurements. Medians."
        ),
        figures=[
            Figure(
                "a job's wall time beside the plain script's",
                f"{job:.1f} s beside {script:.1f} s",
                f"at most {MOST_RATIO:.2f} x + {MOST_SECONDS:g} s = {most:.1f} s",
                job <= most,
            )
        ],
        details=["| step | job, s | script, s |", "|---|---|---|", *rows],
    )


def _median(runs: list[Seconds], step: str) -> str:
    found = [run[step] for run in runs if step in run]
    return f"{percentile(found, 50):.2f}" if found else ""
