"""A whole job in the workshop: from a claim to its report and its files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.report import Report
from shared.tables import to_csv, to_markdown
from tests.worker.test_engines_tensorrt import needs_rtx
from tests.worker.workshop import Workshop, slices, unet

EXPORT, QUANTIZE, BUILD = 0, 1, 2


def test_a_job_leaves_a_report_an_engine_and_a_log(workshop: Workshop) -> None:
    goals = [
        {"metric": "dice", "kind": "max_drop", "value": 0.5},
        {"metric": "size", "kind": "max_ratio", "value": 1.0},
    ]
    job_id = workshop.submit(goals=goals)
    assert workshop.work() == "succeeded"

    job = workshop.job(job_id)
    report = Report.model_validate(job.report)
    assert (report.verdict, report.final, job.verdict) == ("met", BUILD, "met"), report.reason
    assert [stage.status for stage in report.stages] == ["succeeded"] * 3
    assert [stage.status for stage in workshop.stages(job_id)] == ["succeeded"] * 3
    assert report.baseline.source.method.engine == "torch eager"
    assert report.baseline.onnxruntime is not None
    assert {candidate.engine for candidate in report.stages[BUILD].candidates} == {"onnxruntime", "openvino"}
    assert sum(candidate.kept for candidate in report.stages[BUILD].candidates) == 1
    assert all(stage.measurement and stage.measurement.baseline_latency_ms for stage in report.stages)
    assert report.stages[QUANTIZE].measurement is not None
    assert report.stages[QUANTIZE].measurement.method.precision == "int8"

    artifacts = {artifact.name: artifact for artifact in workshop.artifacts(job_id)}
    assert {"0-export_onnx.onnx", "1-quantize.onnx", "2-build_engine.cpu-fastest.zip"} <= set(artifacts)
    assert {"attempt-1.log", "report.json", "source-sample.png"} <= set(artifacts)
    for artifact in artifacts.values():
        assert workshop.storage.digest(artifact.key) == (artifact.sha256, artifact.size_bytes)
    assert report.stages[BUILD].artifacts[0].sha256 == artifacts["2-build_engine.cpu-fastest.zip"].sha256

    told = [event.kind for event in workshop.events(job_id) if event.kind not in ("progress", "log")]
    assert told == ["submitted", "claimed", "baseline_measured", *["stage_started", "stage_finished"] * 3, "succeeded"]
    assert "2 build_engine" in to_csv(report)
    assert f"# job: {report.verdict}" in to_markdown(report)


@needs_rtx
def test_a_job_of_two_targets_delivers_both_and_judges_the_one_that_ran(workshop: Workshop) -> None:
    rtx = {"target": "tensorrt-rtx", "compute_capability": "8.9"}
    stages = [{"kind": "build_engine", "targets": [rtx, "onnxruntime"]}]
    job_id = workshop.submit(**workshop.brief(stages=stages))
    assert workshop.work() == "succeeded"
    report = Report.model_validate(workshop.job(job_id).report)
    assert [(one.target, one.verdict) for one in report.stages[0].targets] == [
        ("onnxruntime", "no_gain"),  # it is the source's own graph, in its own runtime
        ("tensorrt-rtx-8.9", "not_evaluated"),
    ]
    assert report.verdict == "no_gain"
    assert "not evaluated: max_drop of dice (tensorrt-rtx-8.9), the engine for tensorrt-rtx-8.9." in report.reason
    kept = {artifact.role: artifact.name for artifact in workshop.artifacts(job_id) if artifact.format == "engine"}
    assert kept == {
        "engine": "0-build_engine.onnxruntime.zip",
        "engine.tensorrt-rtx-8.9": "0-build_engine.tensorrt-rtx-8.9.zip",
    }
    assert "0 build_engine tensorrt-rtx-8.9" in to_csv(report)


def test_an_onnx_source_needs_no_export(workshop: Workshop) -> None:
    job_id = workshop.submit(**workshop.brief())
    assert workshop.work() == "succeeded"
    report = Report.model_validate(workshop.job(job_id).report)
    assert report.baseline.source.method.engine == "onnxruntime"
    assert report.baseline.onnxruntime is not None  # the cleaned graph
    assert report.stages[0].details["precision"] == "fp16"


def test_a_missed_gate_drops_the_stage_and_the_job_delivers_the_last_good_model(workshop: Workshop) -> None:
    # No network reaches a Dice of 1 untrained, so every stage misses; the export is all that is left to judge.
    job_id = workshop.submit(goals=[{"metric": "dice", "kind": "threshold", "value": 1.0}])
    assert workshop.work() == "succeeded"
    report = Report.model_validate(workshop.job(job_id).report)
    assert [stage.status for stage in report.stages] == ["dropped", "skipped", "skipped"]
    assert report.stages[1].reason == "it needs onnx, but the last good model is torch"
    assert (report.verdict, report.final) == ("missed", None)
    assert "threshold of dice" in (report.stages[0].reason or "")


def test_a_missed_gate_can_be_passed_over(workshop: Workshop) -> None:
    stages = [{"kind": "quantize", "scheme": "fp16", "on_miss": "continue"}]
    goals = [{"metric": "dice", "kind": "threshold", "value": 1.0}]
    job_id = workshop.submit(**workshop.brief(stages=stages, goals=goals))
    assert workshop.work() == "succeeded"
    report = Report.model_validate(workshop.job(job_id).report)
    assert report.stages[0].status == "succeeded"
    assert (report.verdict, report.final) == ("missed", 0)
    assert report.reason.startswith("The model of stage 0 (quantize) is delivered, but it misses threshold of dice: ")


def test_a_missed_gate_can_end_the_job(workshop: Workshop) -> None:
    stages = [{"kind": "quantize", "scheme": "fp16", "on_miss": "fail"}]
    goals = [{"metric": "dice", "kind": "threshold", "value": 1.0}]
    job_id = workshop.submit(**workshop.brief(stages=stages, goals=goals))
    assert workshop.work() == "failed"
    job = workshop.job(job_id)
    assert job.state_reason is not None
    assert (job.state_reason["code"], job.state_reason["stage"]) == ("goal_missed", 0)
    assert "threshold of dice: " in job.state_reason["message"]
    assert [stage.status for stage in workshop.stages(job_id)] == ["failed"]


def test_a_speed_goal_out_of_reach_is_missed_but_the_work_is_kept(workshop: Workshop) -> None:
    goals = [{"metric": "latency", "kind": "min_speedup", "value": 100_000}]
    job_id = workshop.submit(**workshop.brief(goals=goals))
    assert workshop.work() == "succeeded"
    job = workshop.job(job_id)
    assert job.verdict == "missed"
    assert "1-build_engine.onnxruntime.zip" in [artifact.name for artifact in workshop.artifacts(job_id)]


def nan_images(directory: Path) -> Path:
    images = torch.zeros(12, 1, 32, 32)
    images[3] = torch.nan
    return slices(directory / "nan.safetensors", **{"evaluation.images": images})


def class_seven(directory: Path) -> Path:
    return slices(directory / "seven.safetensors", **{"evaluation.masks": torch.full((12, 32, 32), 7)})


def too_few_masks(directory: Path) -> Path:
    return slices(directory / "few.safetensors", **{"evaluation.masks": torch.zeros(5, 32, 32, dtype=torch.uint8)})


def no_samples(directory: Path) -> Path:
    nothing = {"evaluation.images": torch.zeros(0, 1, 32, 32), "evaluation.masks": torch.zeros(0, 32, 32).byte()}
    return slices(directory / "nothing.safetensors", **nothing)


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (nan_images, "data_not_finite", "evaluation"),
        (class_seven, "data_mismatch", "holds class 7, but the classes are 0 to 2"),
        (too_few_masks, "data_mismatch", "12"),
        (no_samples, "evaluation_empty", "evaluation"),
    ],
)
def test_unusable_data_fails_the_job_with_a_sentence(workshop: Workshop, make: Any, code: str, words: str) -> None:
    data = workshop.keep(make(workshop.directory), "safetensors")
    job_id = workshop.submit(data={"artifact": str(data)})
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert (reason["code"], reason["fault"]) == (code, "user")
    assert words in reason["message"]
    assert all(artifact.stage_position is None for artifact in workshop.artifacts(job_id))


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"name": "BasicUnet3000"}, "unknown_architecture", "no network named 'BasicUnet3000'"),
        ({"arguments": {"spatial_dims": 2, "colour": "blue"}}, "invalid_arguments", "colour"),
        ({"arguments": {"spatial_dims": 2, "out_channels": 9}}, "weights_mismatch", "shape"),
    ],
)
def test_a_network_that_does_not_fit_its_weights_fails_the_job_with_a_sentence(
    workshop: Workshop, change: dict[str, Any], code: str, words: str
) -> None:
    architecture = {"library": "monai", "name": "BasicUNet", "arguments": {}, **change}
    job_id = workshop.submit(source={"architecture": architecture, "weights": str(workshop.weights)})
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert (reason["code"], reason["fault"]) == (code, "user")
    assert words in reason["message"]


def test_a_network_that_does_not_fit_into_memory_fails_the_job_with_a_sentence(workshop: Workshop) -> None:
    huge = {"spatial_dims": 2, "features": [4096, 4096, 8192, 16384, 32768, 4096]}
    architecture = {"library": "monai", "name": "BasicUNet", "arguments": huge}
    job_id = workshop.submit(source={"architecture": architecture, "weights": str(workshop.weights)})
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert reason["code"] in ("weights_mismatch", "model_too_large", "out_of_memory")


def test_a_network_of_nan_is_blamed_on_the_source(workshop: Workshop) -> None:
    path = workshop.directory / "nan.safetensors"
    tensors = load_file(unet(path))
    broken = {name: tensor * torch.nan for name, tensor in tensors.items() if tensor.is_floating_point()}
    save_file({**tensors, **broken}, path)
    source = {**workshop.recipe()["source"], "weights": str(workshop.keep(path, "safetensors"))}
    job_id = workshop.submit(source=source)
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert (reason["code"], reason["fault"]) == ("source_not_finite", "user")


def test_a_corrupted_input_is_noticed_before_anything_reads_it(workshop: Workshop) -> None:
    wrong = hashlib.sha256(b"other bytes").hexdigest()
    weights = workshop.keep(unet(workshop.directory / "other.safetensors", seed=1), "safetensors", sha256=wrong)
    source = {**workshop.recipe()["source"], "weights": str(weights)}
    job_id = workshop.submit(source=source)
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert (reason["code"], reason["fault"]) == ("digest_mismatch", "platform")
    assert workshop.job(job_id).baseline is None


def test_an_input_that_is_gone_fails_the_job_with_a_sentence(workshop: Workshop) -> None:
    job_id = workshop.submit()
    for key in list(workshop.storage.list_keys("uploads/unet")):
        workshop.storage.remove(key)
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert reason["code"] == "input_missing"
