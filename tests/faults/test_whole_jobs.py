"""A real network, pruned and fine-tuned: a worker that dies in the middle changes no byte of what comes out."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from shared.db import Sessions
from shared.recipe import Recipe
from shared.report import Report
from shared.settings import Settings
from shared.storage import Storage
from tests.faults.ground import Ground, children, wait_until
from tests.worker.workshop import UNET, slices, unet

WORKER = (sys.executable, "-m", "worker")
EPOCHS = 10
PRUNE = {
    "kind": "prune",
    "soft_targets": None,
    "on_miss": "continue",
    "training": {"epochs": EPOCHS, "batch": 6, "learning_rate": 0.01},
}


def network_recipe(ground: Ground, directory: Path) -> Recipe:
    weights = ground.keep("unet.safetensors", unet(directory / "unet.safetensors").read_bytes())
    data = ground.keep("data.safetensors", slices(directory / "data.safetensors").read_bytes())
    told: dict[str, Any] = {
        "source": {
            "architecture": {"library": "monai", "name": "BasicUNet", "arguments": UNET},
            "weights": str(weights),
        },
        "task": {"kind": "segmentation", "classes": ["air", "tissue", "bone"], "background": 0},
        "data": {"artifact": str(data)},
        "stages": [PRUNE, {"kind": "export_onnx", "on_miss": "continue"}],
        "benchmark": {"runs": 10, "warm_up": 1, "batches": [1]},
    }
    return Recipe.model_validate(told)


def report(ground: Ground, job_id: UUID) -> Report:
    return Report.model_validate(ground.job(job_id).report)


@pytest.mark.fault(3, "kill -9 the whole worker tree")
@pytest.mark.timeout(600)
def test_fine_tuning_killed_in_its_seventh_epoch_repeats_that_epoch_alone(
    settings: Settings, sessions: Sessions, storage: Storage, ground: Ground, tmp_path: Path
) -> None:
    recipe = network_recipe(ground, tmp_path)
    lease = {"BURNISH_LEASE_SECONDS": "20"}
    job_id = ground.submit("whole", recipe=recipe)
    # It dies as the seventh epoch's checkpoint is in storage and no row points to it.
    dying = ground.start([*WORKER], "checkpoint.stored=kill@7", **lease)
    assert dying.wait(timeout=300) == -signal.SIGKILL
    wait_until(lambda: not children(job_id), "the child's end", timeout_seconds=5.0)
    ground.execute("UPDATE jobs SET lease_expires_at = now() WHERE status = 'running'")
    assert ground.sweep() == 1
    unharmed = ground.submit("whole", recipe=recipe)
    ground.start([*WORKER], **lease)
    assert ground.wait_for(job_id, timeout_seconds=300).status == "succeeded", ground.reason(job_id)
    assert ground.wait_for(unharmed, timeout_seconds=300).status == "succeeded", ground.reason(unharmed)

    resumed, whole = (report(ground, found).stages[0].details["training"][0] for found in (job_id, unharmed))
    assert (resumed["resumed_after"], resumed["epochs_run"]) == (6, EPOCHS)
    assert whole["resumed_after"] == 0
    assert resumed["history"] == whole["history"]
    metrics = [
        [stage.measurement.metrics for stage in report(ground, found).stages if stage.measurement is not None]
        for found in (job_id, unharmed)
    ]
    assert metrics[0] == metrics[1]
    assert ground.result(job_id) == ground.result(unharmed)
