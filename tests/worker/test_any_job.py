"""Whole jobs on sources of any origin: what the recipe leaves open is settled in the workshop, and told."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shared.recipe import Preprocessing
from shared.report import Report
from tests.worker import strangers
from tests.worker.workbench import small_onnx
from tests.worker.workshop import Workshop, slices
from worker.quantization.qdq import write_dynamic


def test_an_onnx_of_two_inputs_without_a_task_is_built_and_told_as_not_evaluated(
    workshop: Workshop, tmp_path: Path
) -> None:
    network = workshop.keep(strangers.with_age(tmp_path / "net.onnx"), "onnx")
    tensors = {"images": torch.randn(6, 1, strangers.SIZE, strangers.SIZE), "age": torch.rand(6, 1)}
    save_file({f"evaluation.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "ages.safetensors")
    job_id = workshop.submit(
        source={"onnx": str(network), "constants": {"slope": 0.5}, "outputs": {"logits": "scores"}},
        task={"kind": "raw"},
        data={"artifact": str(workshop.keep(tmp_path / "ages.safetensors", "safetensors"))},
        stages=[{"kind": "build_engine"}],
        goals=[{"metric": "size", "kind": "max_ratio", "value": 2.0}],
    )
    assert workshop.work() == "succeeded"
    report = Report.model_validate(workshop.job(job_id).report)
    assert (report.goals[0].outcome, report.final) == ("met", 0)
    assert report.baseline.source.metrics == {}
    assert report.preprocessing == Preprocessing()
    assert report.stages[0].agreement is not None
    assert report.stages[0].agreement.passed


def test_what_cannot_calibrate_is_told_before_the_baseline(workshop: Workshop, tmp_path: Path) -> None:
    tensors = load_file(slices(tmp_path / "data.safetensors"))
    tensors["calibration.images"][-1] = torch.nan
    save_file(tensors, tmp_path / "spoilt.safetensors")
    spoilt = workshop.keep(tmp_path / "spoilt.safetensors", "safetensors")
    job_id = workshop.submit(data={"artifact": str(spoilt)})
    assert workshop.work() == "failed"
    job = workshop.job(job_id)
    assert job.state_reason is not None
    assert job.state_reason["code"] == "data_not_finite"
    assert "baseline_measured" not in [event.kind for event in workshop.events(job_id)]


def test_a_quantized_source_is_refused_before_the_baseline(workshop: Workshop, tmp_path: Path) -> None:
    small_onnx(tmp_path / "float.onnx", classes=3)
    write_dynamic(tmp_path / "float.onnx", tmp_path / "quantized.onnx")
    source = {"onnx": str(workshop.keep(tmp_path / "quantized.onnx", "onnx"))}
    job_id = workshop.submit(source=source, stages=[{"kind": "quantize", "calibration_samples": 4}])
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert reason["code"] == "already_quantized"
    assert "baseline_measured" not in [event.kind for event in workshop.events(job_id)]


def test_a_preset_of_three_channels_does_not_fit_images_of_one(workshop: Workshop, tmp_path: Path) -> None:
    network = workshop.keep(strangers.plain(tmp_path / "net.onnx"), "onnx")
    images = torch.rand(4, 1, strangers.SIZE, strangers.SIZE) * 255
    save_file({"evaluation.images": images}, tmp_path / "images.safetensors")
    data = str(workshop.keep(tmp_path / "images.safetensors", "safetensors"))
    preset = "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    job_id = workshop.submit(
        source={"onnx": str(network)},
        task={"kind": "raw"},
        data={"artifact": data, "preprocessing": {"preset": preset}},
        stages=[{"kind": "build_engine", "targets": ["onnxruntime"]}],
    )
    assert workshop.work() == "failed"
    job = workshop.job(job_id)
    assert job.state_reason is not None
    assert "mean has 3 values" in job.state_reason["message"]
