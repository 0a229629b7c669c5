"""The gate at work: whole jobs in which a stage's result is wrong, too weak or not worth having, and what is delivered.

The networks are trained for seconds on data that they can learn, so that there is something to lose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from safetensors.torch import save_file

from shared import checkpoints
from shared.recipe import Architecture, BuildEngine, ExportOnnx, Goal, ModelFormat, Quantize, Task
from shared.report import Report
from tests.worker.workbench import TISSUES, UNET, Workbench, baseline_of, recipe_of
from tests.worker.workshop import Workshop, kill_in_epoch
from worker import engines
from worker.context import Model
from worker.data import open_samples
from worker.engines import Runner
from worker.evaluation.agreement import keep_reference
from worker.evaluation.metrics import evaluate
from worker.predict import load_engine

INT8 = {"kind": "quantize", "calibration_samples": 8}

SIZE, STEPS = 24, 240
BALLS = Task(kind="segmentation", classes=["void", "soft", "hard"], background=0)
NETWORK = Architecture(
    library="monai",
    name="UNet",
    arguments={"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [8, 16, 16], "strides": [2, 2]},
)
MOST_LOST = 0.02  # of Dice


def report_of(workshop: Workshop, job_id: UUID) -> Report:
    return Report.model_validate(workshop.job(job_id).report)


def fetched(workshop: Workshop, job_id: UUID, name: str) -> Path:
    """A file of the job's, downloaded as its owner would."""
    [artifact] = [artifact for artifact in workshop.artifacts(job_id) if artifact.name == name]
    path = workshop.directory / name
    workshop.storage.fetch(artifact.key, path, sha256=artifact.sha256, size_bytes=artifact.size_bytes)
    return path


def dice(runner: Runner, bench: Workbench) -> float:
    """What an independent look at the evaluation part gives."""
    return evaluate(runner.run, bench.samples("evaluation"), bench.recipe.task).means["dice"]


# ---------------------------------------------------------------- pruning


def submit_tissues(workshop: Workshop, bench: Workbench, **changes: Any) -> UUID:
    """A job on the bench's U-Net, which reaches a Dice of .9."""
    weights = workshop.keep(bench.source.path, "safetensors")
    data = workshop.keep(bench.directory / "data.safetensors", "safetensors")
    preprocessing = bench.recipe.data.preprocessing.model_dump(mode="json")
    return workshop.submit(
        source={"architecture": UNET.model_dump(mode="json"), "weights": str(weights)},
        task=TISSUES.model_dump(mode="json"),
        data={"artifact": str(data), "preprocessing": preprocessing},
        **changes,
    )


def test_a_prune_that_costs_too_much_is_dropped_and_the_int8_of_the_unpruned_model_is_delivered(
    workshop: Workshop, bench: Workbench
) -> None:
    prune = {"kind": "prune", "pruning_ratio": 0.75, "round_to": 2, "training": None}
    job_id = submit_tissues(
        workshop,
        bench,
        stages=[prune, {"kind": "export_onnx"}, INT8, {"kind": "build_engine", "targets": ["onnxruntime"]}],
        goals=[
            {"metric": "dice", "kind": "max_drop", "value": 0.02},
            {"metric": "size", "kind": "max_ratio", "value": 0.8},
        ],
    )
    assert workshop.work() == "succeeded"
    report = report_of(workshop, job_id)
    dropped, exported, _, built = report.stages
    assert [stage.status for stage in report.stages] == ["dropped", *["succeeded"] * 3]
    assert [stage.status for stage in workshop.stages(job_id)] == ["dropped", *["succeeded"] * 3]

    # what was dropped is told with its figures and why
    assert dropped.reason is not None
    assert dropped.reason.startswith("max_drop of dice: ")
    assert dropped.reason.endswith(" points, at most 2 points wanted")
    assert [result.outcome for result in dropped.gate] == ["missed"]
    assert dropped.measurement is not None
    assert dropped.details["parameters"][1] == dropped.measurement.parameters
    source = report.baseline.source
    assert dropped.measurement.parameters is not None
    assert source.parameters is not None
    assert dropped.measurement.parameters < 0.1 * source.parameters

    # what is delivered is the source's int8, and nothing of it was pruned
    assert report.final == 3
    assert not [result for result in report.goals if result.outcome == "missed"]
    assert report.reason.startswith("The model of stage 3 (build_engine) is delivered; ")
    assert "1 of 4 stages was dropped (prune: max_drop of dice: " in report.reason
    assert exported.measurement is not None
    assert exported.measurement.metrics["dice"] == pytest.approx(source.metrics["dice"], abs=1e-3)
    assert built.measurement is not None
    assert built.measurement.method.precision == "int8"
    assert built.measurement.macs == source.macs
    engine = load_engine(fetched(workshop, job_id, "3-build_engine.onnxruntime.zip"))
    assert engine.manifest.precision == "int8"
    lost = source.metrics["dice"] - dice(engine, bench)
    assert lost <= 0.02


def test_a_good_prune_is_delivered_though_its_worker_died_in_mid_fine_tuning(
    workshop: Workshop, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"epochs": 12, "batch": 4, "learning_rate": 0.01, "ema_decay": 0.9}
    prune = {"kind": "prune", "pruning_ratio": 0.25, "round_to": 2, "training": training}
    prune["soft_targets"] = {"teacher": "always"}
    goals = [{"metric": "dice", "kind": "max_drop", "value": 0.05}]
    job_id = submit_tissues(workshop, bench, stages=[prune, {"kind": "export_onnx"}], goals=goals)
    kill_in_epoch(workshop, job_id, 7, monkeypatch)
    assert [artifact.name for artifact in checkpoints.of_job(workshop.sessions, job_id)] == ["0-training.checkpoint"]
    assert workshop.work() == "succeeded"

    report = report_of(workshop, job_id)
    assert [stage.status for stage in report.stages] == ["succeeded", "succeeded"]
    assert report.final == 1
    assert report.goals[0].outcome in ("met", "not_shown")  # 20 samples cannot show a loss of 5 points at most
    pruned, exported = report.stages

    # the report says what went, what stayed, and how it was healed
    assert pruned.details["pruned"] is True
    assert 0.2 < pruned.details["channels_removed_ratio"] < 0.3
    assert pruned.details["heads"] == ["final_conv"]
    assert pruned.details["teacher"] == "the source model"
    [log] = pruned.details["training"]
    assert (log["resumed_after"], log["epochs_run"]) == (6, 12)  # only the epoch that was cut is repeated
    assert pruned.agreement is not None
    assert pruned.agreement.outputs[0].max_error > 0.05  # it was trained: its metrics are what it is judged by

    # later stages are held against the network that was fine-tuned, not against the source
    assert exported.agreement is not None
    assert exported.agreement.outputs[0].max_error < 1e-3
    delivered = Model(ModelFormat.ONNX, fetched(workshop, job_id, "1-export_onnx.onnx"))
    runner: Runner = engines.load("onnxruntime").open(delivered, 1)
    reached = dice(runner, bench)
    assert pruned.measurement is not None
    assert reached == pytest.approx(pruned.measurement.metrics["dice"], abs=1e-3)
    assert report.baseline.source.metrics["dice"] - reached <= 0.05


# ---------------------------------------------------------------- int8 of volumes, which ONNX Runtime runs slowly


def balls(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Volumes (count, 1, S, S, S) of noise with four balls of two kinds, and what each voxel is (count, S, S, S)."""
    rng, grid = np.random.default_rng(seed), np.indices((SIZE,) * 3)
    found = np.zeros((count, SIZE, SIZE, SIZE), dtype=np.uint8)
    for volume in found:
        for kind in (1, 2, 1, 2):
            radius = rng.uniform(3, 6)
            center = rng.uniform(radius, SIZE - radius, (3, 1, 1, 1))
            volume[((grid - center) ** 2).sum(axis=0) < radius**2] = kind
    images = found[:, None] + rng.normal(0, 0.25, (count, 1, SIZE, SIZE, SIZE))
    return torch.from_numpy(images.astype(np.float32)), torch.from_numpy(found)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A 3D U-Net that was trained for seconds, the balls that it knows, and its baseline."""
    torch.set_num_threads(1)
    directory, tensors = tmp_path_factory.mktemp("volumes"), dict[str, torch.Tensor]()
    for seed, (part, count) in enumerate({"train": 16, "calibration": 12, "evaluation": 8}.items()):
        tensors[f"{part}.images"], tensors[f"{part}.masks"] = balls(count, seed)
    save_file(tensors, directory / "data.safetensors")
    save_file(trained(tensors["train.images"], tensors["train.masks"].long()), directory / "weights.safetensors")

    source = Model(ModelFormat.TORCH, directory / "weights.safetensors", NETWORK)
    goal = Goal(metric="dice", kind="max_drop", value=MOST_LOST)
    recipe = recipe_of([ExportOnnx(), Quantize(), BuildEngine()], task=BALLS).model_copy(update={"goals": [goal]})
    samples = open_samples(directory / "data.safetensors", "safetensors", "evaluation", recipe.data, BALLS)
    runner: Runner = engines.load("torch eager").open(source, 1)
    keep_reference(runner, samples, directory / "reference.npy")
    baseline = baseline_of(source, runner, samples, recipe)
    assert baseline.metrics["dice"] > 0.8
    return Workbench(directory, recipe, source, directory / "reference.npy", baseline)


def trained(images: torch.Tensor, masks: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = UNet(**NETWORK.arguments)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for step in range(STEPS):
        batch = slice(4 * (step % 4), 4 * (step % 4) + 4)
        loss = torch.nn.functional.cross_entropy(network(images[batch]), masks[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.state_dict()


@pytest.fixture(scope="module")
def volumes_onnx(volumes: Workbench) -> Model:
    return volumes.run(ExportOnnx(), volumes.source, volumes.directory / "exported").model


def test_int8_that_is_slower_than_fp32_is_dropped_as_not_paying(workshop: Workshop, volumes: Workbench) -> None:
    """ONNX Runtime's int8 of this network takes 1.6 times as long as its fp32, on a busy machine too."""
    weights = workshop.keep(volumes.source.path, "safetensors")
    job_id = workshop.submit(
        source={"architecture": NETWORK.model_dump(mode="json"), "weights": str(weights)},
        task=BALLS.model_dump(mode="json"),
        data={"artifact": str(workshop.keep(volumes.directory / "data.safetensors", "safetensors"))},
        stages=[{"kind": "export_onnx"}, INT8],
        goals=[{"metric": "dice", "kind": "max_drop", "value": MOST_LOST}],
    )
    assert workshop.work() == "succeeded"
    report = report_of(workshop, job_id)
    exported, dropped = report.stages
    assert (exported.status, dropped.status) == ("succeeded", "dropped")
    assert dropped.agreement is not None
    assert dropped.agreement.passed
    assert [result.outcome for result in dropped.gate] != ["missed"]  # it is as right as was asked, and slower
    assert dropped.reason is not None
    assert dropped.reason.startswith("it does not pay: ")
    assert dropped.reason.endswith("times fp32's latency in onnxruntime")
    assert dropped.details["onnxruntime"]["speedup_over_fp32"] < 0.95
    assert report.final == 0
    assert "The model of stage 0 (export_onnx) is delivered" in report.reason


def test_an_engine_of_int8_that_is_slower_than_fp32_is_not_kept_either(
    volumes: Workbench, volumes_onnx: Model, tmp_path: Path
) -> None:
    quantized = volumes.run(Quantize(calibration_samples=8), volumes_onnx, tmp_path / "quantized")
    assert quantized.unpaid is None  # that is build_engine's to judge
    built = volumes.run(BuildEngine(targets=["onnxruntime"]), quantized.model, tmp_path / "built")
    kept = next(candidate for candidate in built.candidates if candidate.kept)
    slower = [candidate for candidate in built.candidates if candidate.precision == "int8"]
    assert kept.precision == "fp32"
    assert slower
    assert all("times the latency of onnxruntime fp32" in candidate.reason for candidate in slower)
    assert load_engine(built.model.path).manifest.precision == "fp32"


@pytest.mark.parametrize("allowed", [MOST_LOST, 0.0], ids=["a loss is allowed", "none is"])
def test_a_3d_network_leaves_as_the_fastest_engine_that_is_right(
    volumes: Workbench, volumes_onnx: Model, tmp_path: Path, allowed: float
) -> None:
    goals = [Goal(metric="dice", kind="max_drop", value=allowed)]
    quantized = volumes.run(Quantize(calibration_samples=8), volumes_onnx, tmp_path / "quantized", goals=goals)
    built = volumes.run(BuildEngine(), quantized.model, tmp_path / "built", goals=goals)
    runtimes = {(candidate.engine, candidate.precision.split("+")[0]) for candidate in built.candidates}
    assert runtimes >= {("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "int8")}
    (kept,) = [candidate for candidate in built.candidates if candidate.kept]
    assert not [goal for goal in kept.goals if goal.outcome == "missed"]
    assert kept.measurement is not None
    for faster in built.candidates:  # whatever is clearly faster was evaluated, and loses more than is allowed
        assert faster.measurement is not None
        if faster.measurement.latency_ms.p50 < 0.8 * kept.measurement.latency_ms.p50:
            assert [goal.outcome for goal in faster.goals] == ["missed"]

    # the file itself is what the report says
    engine = load_engine(built.model.path)
    assert (engine.manifest.engine, engine.manifest.precision) == (kept.engine, kept.precision)
    reached = dice(engine, volumes)
    assert built.measurement is not None
    assert reached == pytest.approx(built.measurement.metrics["dice"], abs=1e-4)
    assert volumes.baseline.metrics["dice"] - reached <= allowed + 1e-9
