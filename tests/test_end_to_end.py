"""One real job through the whole house, with nothing but what a user types; then the report is checked from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
import yaml
from monai.networks.nets import BasicUNet
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file

from tests.worker.workshop import UNET, slices

BURNISH = Path(sys.executable).parent / "burnish"
CLASSES = ["air", "tissue", "bone"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder: a trained network, its data, a job file, and a local service started from there."""
    folder = tmp_path_factory.mktemp("home")
    slices(folder / "data.safetensors")
    train(folder / "data.safetensors", folder / "unet.safetensors")
    (folder / "job.yaml").write_text(yaml.safe_dump(job()), encoding="utf-8")
    burnish(folder, "local", "up", "--port", "0", "--detach")
    yield folder
    burnish(folder, "local", "down")


def burnish(folder: Path, *arguments: str, code: int = 0) -> str:
    """What `burnish ARGUMENTS` prints when it is typed in the folder; it must end with that exit code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BURNISH_")}
    command = [str(BURNISH), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def train(data: Path, out: Path) -> None:
    """Eighty steps: enough to tell three grey levels apart."""
    torch.manual_seed(0)
    tensors = load_file(data)
    images, masks = torch.from_numpy(normalized(tensors["train.images"])), torch.from_numpy(tensors["train.masks"])
    network = BasicUNet(**UNET)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), masks.long()).backward()
        optimizer.step()
    save_file(network.state_dict(), out)


def normalized(images: np.ndarray) -> np.ndarray:
    """Stored values as the network takes them: what the job's preprocessing says."""
    return ((images - 0.5) / 2.0).astype(np.float32)


def job() -> dict[str, Any]:
    return {
        "name": "three-greys",
        "tags": ["end-to-end"],
        "recipe": {
            "source": {
                "architecture": {"library": "monai", "name": "BasicUNet", "arguments": UNET},
                "weights": "unet.safetensors",
            },
            "task": {"kind": "segmentation", "classes": CLASSES, "background": 0},
            "data": {"artifact": "data.safetensors", "preprocessing": {"mean": [0.5], "std": [2.0], "channels": 1}},
            "stages": [{"kind": "export_onnx"}, {"kind": "quantize"}, {"kind": "build_engine"}],
            # twelve evaluation samples can show no less than 4.4 points
            "goals": [{"metric": "dice", "kind": "max_drop", "value": 0.05}],
            "benchmark": {"runs": 50, "warm_up": 5, "batches": [1]},
        },
    }


@pytest.fixture(scope="module")
def done(home: Path) -> dict[str, Any]:
    """The job, submitted and waited for."""
    told = json.loads(burnish(home, "submit", "job.yaml", "--wait", "--json"))
    assert told["status"] == "succeeded"
    assert told["verdict"] == "met"
    return dict(told)


@pytest.fixture(scope="module")
def report(home: Path, done: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(burnish(home, "report", done["id"], "--format", "json")))


@pytest.fixture(scope="module")
def engine(home: Path, done: dict[str, Any]) -> Path:
    return home / json.loads(burnish(home, "download", done["id"], "--output", "results", "--json"))["path"]


def test_the_job_shows_where_it_can_be_seen_and_what_each_stage_did(home: Path, done: dict[str, Any]) -> None:
    assert done["url"] in burnish(home, "show", done["id"])
    assert done["id"] in burnish(home, "jobs")
    assert [stage["status"] for stage in done["stages"]] == ["succeeded"] * 3
    assert "stage 2: build_engine" in burnish(home, "logs", done["id"])
    table = burnish(home, "report", done["id"], "--format", "md")
    assert "# three-greys: met" in table
    assert "| 2 build_engine | succeeded (delivered) |" in table


def test_the_reports_figures_are_those_of_the_engine_that_was_downloaded(
    home: Path, engine: Path, report: dict[str, Any]
) -> None:
    measured = report["stages"][2]["measurement"]
    run, manifest = open_engine(engine, home / "opened")
    tensors = load_file(home / "data.safetensors")
    images = normalized(tensors["evaluation.images"])
    masks = tensors["evaluation.masks"]

    decisions = np.concatenate([run(images[start : start + 1]).argmax(axis=1) for start in range(len(images))])
    assert measured["metrics"]["dice"] == pytest.approx(mean_dice(decisions, masks), abs=0.005)

    times_ms = [timed_ms(run, images[:1]) for _ in range(60)][10:]
    # A shared machine: the same order of magnitude, not the same figure.
    assert np.median(times_ms) == pytest.approx(measured["latency_ms"]["p50"], rel=2.0)
    assert manifest["precision"] == measured["method"]["precision"]
    files = [file for file in manifest["files"] if file["role"] == "engine" or file["name"] == manifest["entry"]]
    loaded = [file["name"] for file in files]
    assert sum((home / "opened" / name).stat().st_size for name in loaded) == measured["size_bytes"]
    digest = next(file["sha256"] for file in report["stages"][2]["artifacts"] if file["role"] == "engine")
    assert subprocess.run(["sha256sum", engine], capture_output=True, text=True, check=True).stdout.startswith(digest)


def open_engine(engine: Path, folder: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    """The engine loaded as anybody could, without a line of Burnish."""
    with zipfile.ZipFile(engine) as archive:
        archive.extractall(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    path = folder / manifest["entry"]
    if manifest["engine"] == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda inputs: np.asarray(session.run(None, {name: inputs})[0]), manifest
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda inputs: np.array(compiled(inputs)[0]), manifest


def mean_dice(decisions: np.ndarray, masks: np.ndarray) -> float:
    """Dice by sample and class (tissue, bone), averaged where the truth holds the class."""
    found = []
    for decision, mask in zip(decisions, masks, strict=True):
        for index in (1, 2):
            ours, truth = decision == index, mask == index
            if truth.any():
                found.append(2 * (ours & truth).sum() / (ours.sum() + truth.sum()))
    return float(np.mean(found))


def timed_ms(run: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray) -> float:
    begin = time.perf_counter()
    run(inputs)
    return 1000 * (time.perf_counter() - begin)


def test_the_engine_segments_an_image_from_a_file(home: Path, engine: Path) -> None:
    tensors = load_file(home / "data.safetensors")
    np.save(home / "slice.npy", tensors["evaluation.images"][0])
    burnish(home, "predict", str(engine), "slice.npy", "--output", "mask.png")
    mask = np.array(Image.open(home / "mask.png"))
    assert mask.shape == (32, 32)
    assert (mask == tensors["evaluation.masks"][0]).mean() > 0.9


def test_the_same_files_are_not_uploaded_twice_and_the_same_job_gives_the_same_engine(
    home: Path, done: dict[str, Any], report: dict[str, Any]
) -> None:
    again = json.loads(burnish(home, "submit", "job.yaml", "--wait", "--json"))
    assert again["id"] != done["id"]
    assert again["recipe"] == done["recipe"]  # the artifacts' ids among it
    repeated = json.loads(burnish(home, "report", again["id"], "--format", "json"))
    assert models(report) == models(repeated)


def models(report: dict[str, Any]) -> list[str]:
    return [file["sha256"] for stage in report["stages"][:2] for file in stage["artifacts"]]


def test_a_job_that_fails_ends_in_a_sentence_and_an_exit_code(home: Path) -> None:
    wrong = job()
    wrong["recipe"]["source"]["architecture"]["arguments"] = {**UNET, "out_channels": 9}
    (home / "wrong.yaml").write_text(yaml.safe_dump(wrong), encoding="utf-8")
    told = json.loads(burnish(home, "submit", "wrong.yaml", "--wait", "--json", code=1))
    assert told["job"]["status"] == "failed"
    assert told["job"]["state_reason"]["code"] == "weights_mismatch"
    assert told["job"]["state_reason"]["fault"] == "user"


def test_a_recipe_that_does_not_chain_is_refused_before_anything_is_kept(home: Path) -> None:
    before = json.loads(burnish(home, "jobs", "--json"))
    wrong = job()
    wrong["recipe"]["stages"] = [{"kind": "build_engine"}]
    (home / "unchained.yaml").write_text(yaml.safe_dump(wrong), encoding="utf-8")
    burnish(home, "submit", "unchained.yaml", code=2)
    assert json.loads(burnish(home, "jobs", "--json")) == before
