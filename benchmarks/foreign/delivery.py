"""What the service makes of a network: one job with default words and one goal, and the engine that it delivers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks.foreign.by_hand import THREADS, Engine
from benchmarks.foreign.networks import Network, Source
from benchmarks.foreign.pictures import Part, Pictures
from benchmarks.stand import Stand
from burnish.errors import BurnishError
from shared.recipe import ModelFormat
from shared.report import Report
from worker import engines
from worker.context import Model
from worker.engines import archive

JOB_PARTS: tuple[Part, ...] = ("calibration", "evaluation")
DELIVERED = "delivered"


@dataclass(frozen=True)
class Delivery:
    """What a job left in its folder: an engine and the report, or the service's own words of refusal."""

    folder: Path

    @property
    def package(self) -> Path:
        return self.folder / "engine.zip"

    @property
    def is_there(self) -> bool:
        return self.package.exists() or (self.folder / "refusal.txt").exists()

    @property
    def refusal(self) -> str | None:
        path = self.folder / "refusal.txt"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def report(self) -> Report | None:
        path = self.folder / "report.json"
        return Report.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None

    def open(self) -> tuple[Engine, str]:
        """The engine as its runtime runs it, and what it is, such as `openvino int8`."""
        directory = self.folder / "unpacked"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        manifest = archive.read(self.package, directory)
        runtime = engines.load(manifest.engine)
        entry = directory / manifest.entry
        runner = runtime.open(Model(ModelFormat.ENGINE, entry, precision=manifest.precision), THREADS)
        engine = Engine(DELIVERED, tuple(runtime.files(entry)), runner.run_all)
        return engine, f"{manifest.engine} {manifest.precision}"


def deliver(network: Network, source: Source, stand: Stand, work: Path, folder: Path, with_goal: bool) -> Delivery:
    """Run the network's job to its end and keep what it leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.safetensors"
    write_data(network, {part: network.pictures(work, part) for part in JOB_PARTS}, data)
    delivery = Delivery(folder)
    try:
        job = stand.client.submit(order(network, source, data, with_goal)).wait()
        report = job.report()
        (folder / "report.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
        if report.final is None:
            raise BurnishError(f"The job delivers nothing: {report.reason}")
        job.download(folder / "download").rename(delivery.package)
    except BurnishError as error:
        words = " ".join(filter(None, [error.detail, error.hint, *(each.message for each in error.errors)]))
        (folder / "refusal.txt").write_text(words, encoding="utf-8")
    return delivery


def write_data(network: Network, parts: dict[Part, Pictures], path: Path) -> None:
    """The data set as a job reads it: the stored values of both parts, and labels where the task has some."""
    tensors = {}
    for part, pictures in parts.items():
        tensors[f"{part}.images"] = np.ascontiguousarray(pictures.images)
        if network.has_labels:
            assert pictures.targets is not None
            name = "labels" if network.task["kind"] == "classification" else "masks"
            tensors[f"{part}.{name}"] = np.ascontiguousarray(pictures.targets)
    save_file(tensors, path)


def order(network: Network, source: Source, data: Path, with_goal: bool) -> dict[str, Any]:
    """The job: export where the network is PyTorch, quantize, and the fastest engine for a CPU."""
    export = [{"kind": "export_onnx"}] if source.is_torch else []
    return {
        "name": f"foreign-{network.name.replace('_', '-')}",
        "recipe": {
            "source": source.words,
            "task": network.task,
            "data": {"artifact": str(data), "preprocessing": network.preprocessing},
            "stages": [*export, {"kind": "quantize"}, {"kind": "build_engine", "targets": ["cpu-fastest"]}],
            "goals": [network.goal.words()] if with_goal else [],
        },
    }
