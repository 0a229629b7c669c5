"""Memory that running a model adds to a process, measured in a fresh one: `python -m worker.footprint`.

Within the workshop's own process the figure would be lost among libraries, data and what earlier models left. The
fresh process imports the runtime, loads one batch, notes its resident memory, loads the model, runs it, and tells by
how much the peak of running lies above that. Weights and what the runtime unpacks them to are in it, the runtime's
code is not.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.errors import StageFailed
from shared.recipe import Architecture, ModelFormat
from worker import engines, feed
from worker.context import Blueprint, Graph, Model
from worker.feed import Inputs

RUNS = 3
TIMEOUT_SECONDS = 300


def added_bytes(model: Model, engine: str, threads: int, batch: Inputs) -> int | None:
    """Peak memory that the model adds, for one batch (n, C, H, W); None where the process or /proc does not tell."""
    with tempfile.TemporaryDirectory(prefix="burnish-footprint-") as directory:
        order = {
            "engine": engine,
            "threads": threads,
            "batch": str(feed.save(batch, Path(directory))),
            "format": model.format,
            "path": str(model.path),
            "precision": model.precision,
            "pruned": model.pruned,
            **_blueprint(model),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "worker.footprint", json.dumps(order)],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                timeout=TIMEOUT_SECONDS,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else int(found)


def _blueprint(model: Model) -> dict[str, Any]:
    if isinstance(model.architecture, Graph):
        return {"graph": str(model.architecture.path)}
    return {} if model.architecture is None else {"architecture": model.architecture.model_dump(mode="json")}


def main() -> None:
    """The fresh process: one order as JSON on the command line, one number on the last line of stdout."""
    order = json.loads(sys.argv[1])
    batch = feed.load(Path(order["batch"]))
    runtime = engines.load(order["engine"])
    blueprint: Blueprint | None = None
    if "graph" in order:
        blueprint = Graph(Path(order["graph"]))
    elif "architecture" in order:
        blueprint = Architecture.model_validate(order["architecture"])
    model = Model(
        ModelFormat(order["format"]), Path(order["path"]), blueprint, order["precision"], pruned=order["pruned"]
    )
    before = _status("VmRSS")
    runner = runtime.open(model, order["threads"])
    runner.run(batch)  # which compiles for this batch, where that was not done yet
    gc.collect()
    _reset_peak()  # what loading needed for a moment is not counted, what it keeps is
    for _ in range(RUNS):
        runner.run(batch)
    after = _status("VmHWM")
    print(json.dumps(max(0, after - before) if after is not None and before is not None else None))


def _reset_peak() -> None:
    """Set the kernel's high-water mark back to what is resident now, where that is allowed."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    try:
        main()
    except StageFailed as error:
        sys.exit(str(error))
