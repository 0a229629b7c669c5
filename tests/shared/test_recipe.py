"""The language of recipes: what it takes, and the sentence with which it refuses the rest."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from pydantic import TypeAdapter, ValidationError

from shared.metrics import AGREEMENT, METRICS
from shared.recipe import (
    RESOURCES,
    Benchmark,
    BuildEngine,
    ExportOnnx,
    Goal,
    ModelFormat,
    OnnxSource,
    Preprocessing,
    Quantize,
    Recipe,
    StageSpec,
    Task,
    TorchSource,
    stage_kinds,
)

WEIGHTS, DATA = "01990000-0000-7000-8000-000000000001", "01990000-0000-7000-8000-000000000002"
UNET = {"library": "monai", "name": "BasicUNet", "arguments": {"features": [8, 16]}}
TORCH = {"architecture": UNET, "weights": WEIGHTS}
ONNX = {"onnx": WEIGHTS}
SEGMENTATION = {"kind": "segmentation", "classes": ["background", "grey", "white"], "background": 0}
CLASSIFICATION = {"kind": "classification", "classes": ["0", "1"]}
LABELS = {"kind": "multilabel", "classes": ["grey", "white"]}
STRUCTURES = {**LABELS, "per": "voxel"}
EXPORT, QUANTIZE, BUILD = {"kind": "export_onnx"}, {"kind": "quantize"}, {"kind": "build_engine"}


def _recipe(**changes: Any) -> Recipe:
    words = {"source": TORCH, "task": SEGMENTATION, "data": {"artifact": DATA}, "stages": [EXPORT, QUANTIZE, BUILD]}
    return Recipe.model_validate({**words, **changes})


def _refusal(**changes: Any) -> str:
    """The one sentence with which a recipe is refused."""
    with pytest.raises(ValidationError) as refused:
        _recipe(**changes)
    [error] = refused.value.errors()
    return str(error["msg"]).removeprefix("Value error, ")


def test_a_whole_recipe_is_taken_and_survives_json() -> None:
    recipe = _recipe(goals=[{"metric": "dice", "kind": "max_drop", "value": 0.01}], seed=7)
    assert isinstance(recipe.source, TorchSource)
    assert recipe.source.architecture.arguments == {"features": [8, 16]}
    assert [type(stage) for stage in recipe.stages] == [ExportOnnx, Quantize, BuildEngine]
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


def test_a_source_is_known_by_its_words() -> None:
    assert isinstance(_recipe(source=ONNX, stages=[BUILD]).source, OnnxSource)
    torch, onnx = _recipe().source, _recipe(source=ONNX, stages=[BUILD]).source
    assert (torch.format, onnx.format) == (ModelFormat.TORCH, ModelFormat.ONNX)
    assert torch.artifact_id == onnx.artifact_id == UUID(WEIGHTS)
    again = OnnxSource(onnx=UUID(WEIGHTS))
    assert _recipe(source=again, stages=[BUILD]).source == again


@pytest.mark.parametrize(
    ("source", "stages", "sentence"),
    [
        (TORCH, [BUILD], "stage 0 (build_engine) needs onnx, but holds torch: put an export_onnx stage before it"),
        (TORCH, [QUANTIZE], "stage 0 (quantize) needs onnx, but holds torch: put an export_onnx stage before it"),
        (
            ONNX,
            [EXPORT],
            "stage 0 (export_onnx) needs torch, but holds onnx: it is onnx already, so leave it out",
        ),
        (
            TORCH,
            [EXPORT, EXPORT],
            "stage 1 (export_onnx) needs torch, but holds onnx: it is onnx already, so leave it out",
        ),
        (
            TORCH,
            [EXPORT, BUILD, QUANTIZE],
            "stage 2 (quantize) needs onnx, but holds engine: build_engine must be the last stage",
        ),
        (
            ONNX,
            [BUILD, EXPORT],
            "stage 1 (export_onnx) needs torch, but holds engine: build_engine must be the last stage",
        ),
        (ONNX, [QUANTIZE, QUANTIZE, BUILD], "stages 0 and 1 both quantize; a model is quantized once"),
    ],
)
def test_a_chain_that_does_not_fit_is_refused_with_the_reason(source: Any, stages: Any, sentence: str) -> None:
    assert _refusal(source=source, stages=stages) == sentence


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({**SEGMENTATION, "classes": ["a", "b", "a"]}, "two classes have the same name"),
        ({**CLASSIFICATION, "background": 0}, "only a segmentation has a background class"),
        ({**SEGMENTATION, "background": 3}, "background is class 3, but the classes end at 2"),
        ({**SEGMENTATION, "background": -1}, "Input should be greater than or equal to 0"),
        ({**SEGMENTATION, "classes": ["one"], "background": None}, "a segmentation has at least 2 classes"),
        ({"kind": "raw", "classes": ["a", "b"]}, "a raw task has no classes"),
        ({"kind": "multilabel"}, "a multilabel task names at least one label in classes"),
        ({**LABELS, "background": 0}, "only a segmentation has a background class"),
        ({**LABELS, "thresholds": [0.5]}, "thresholds has 1 values, classes 2"),
        ({**LABELS, "thresholds": [0.5, 1.0]}, "Input should be less than 1"),
        ({**SEGMENTATION, "thresholds": [0.5, 0.5, 0.5]}, "per and thresholds are for a multilabel task"),
        ({**CLASSIFICATION, "per": "voxel"}, "per and thresholds are for a multilabel task"),
        ({**SEGMENTATION, "spacing": [1.0]}, "List should have at least 2 items after validation, not 1"),
        ({**SEGMENTATION, "spacing": [1.0, 0.0]}, "Input should be greater than 0"),
        ({**SEGMENTATION, "surface_tolerance": 0}, "Input should be greater than 0"),
        ({**SEGMENTATION, "classes": ["", "b"], "background": 0}, "String should have at least 1 character"),
    ],
)
def test_a_task_that_does_not_hold_together_is_refused(task: Any, sentence: str) -> None:
    assert _refusal(task=task) == sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"channels": 3, "mean": [0.5, 0.5]}, "mean has 2 values; give one, or 3 (one a channel)"),
        ({"channels": 1, "std": [0.5, 0.5, 0.5]}, "std has 3 values; give one, or 1 (one a channel)"),
        ({"std": [0.0]}, "Input should be greater than 0"),
        ({"channels": 2}, "Input should be 1 or 3"),
        ({"size": [0, 5]}, "Input should be greater than or equal to 1"),
        ({"scale": float("nan")}, "Input should be a finite number"),
        ({"mean": [float("inf")]}, "Input should be a finite number"),
    ],
)
def test_preprocessing_that_does_not_hold_together_is_refused(words: Any, sentence: str) -> None:
    assert _refusal(data={"artifact": DATA, "preprocessing": words}) == sentence


def test_one_value_serves_every_channel() -> None:
    assert Preprocessing(channels=3, mean=[0.5], std=[1, 2, 3]).mean == [0.5]


@pytest.mark.parametrize(
    ("goal", "sentence"),
    [
        (("size", "min_speedup", 2), "min_speedup is a goal of latency, not of 'size'"),
        (("dice", "max_ratio", 0.5), "max_ratio is a goal of size, latency, parameters, macs, memory, not of 'dice'"),
        (("macs", "at_most", 5), "at_most is a goal of latency, size, memory, not of 'macs'"),
        (("latency", "at_least", 5), "at_least is a goal of throughput, not of 'latency'"),
        (("latency", "max_drop", 0.5), f"max_drop is a goal of {', '.join(METRICS)}, not of 'latency'"),
        (("agreement", "max_drop", 0.5), f"max_drop is a goal of {', '.join(METRICS)}, not of 'agreement'"),
        (("speed", "threshold", 0.5), f"threshold is a goal of {', '.join([*METRICS, *AGREEMENT])}, not of 'speed'"),
        (("dice", "max_drop", 1.5), "dice lies between 0 and 1, so 1.5 is never reached: 1 point is 0.01"),
        (("iou", "threshold", 90), "iou lies between 0 and 1, so 90.0 is never reached: 1 point is 0.01"),
        (("top1", "max_drop", 0.01), "top1 is not a metric of segmentation; choose of dice, iou, hd95, nsd"),
        (("dice", "threshold", 0), "threshold must be greater than 0"),
        (("latency", "at_most", 0), "at_most must be greater than 0"),
        (("dice", "max_drop", -0.1), "Input should be greater than or equal to 0"),
        (("dice", "max_drop", float("nan")), "Input should be a finite number"),
        (
            ("dice", "at_best", 0.5),
            "Input should be 'threshold', 'max_drop', 'min_speedup', 'max_ratio', 'at_most' or 'at_least'",
        ),
    ],
)
def test_a_goal_that_could_never_be_judged_is_refused(goal: Any, sentence: str) -> None:
    metric, kind, value = goal
    assert _refusal(goals=[{"metric": metric, "kind": kind, "value": value}]) == sentence


def test_every_metric_has_its_goals() -> None:
    for metric in METRICS:
        assert Goal(metric=metric, kind="threshold", value=0.5).is_quality
        assert Goal(metric=metric, kind="max_drop", value=0.5).is_quality
    for metric in AGREEMENT:
        goal = Goal(metric=metric, kind="threshold", value=0.5)
        assert goal.is_quality
        assert goal.of_agreement
    for metric in RESOURCES:
        assert not Goal(metric=metric, kind="max_ratio", value=0.5).is_quality
    for metric in ("latency", "size", "memory"):
        assert not Goal(metric=metric, kind="at_most", value=0.5).is_quality
    assert not Goal(metric="throughput", kind="at_least", value=100).is_quality
    assert not Goal(metric="latency", kind="min_speedup", value=3).is_quality
    assert Goal(metric="hd95", kind="threshold", value=4.5).value == 4.5
    assert Goal(metric="dice", kind="max_drop", value=0).value == 0


@pytest.mark.parametrize(
    ("kind", "metric", "higher"),
    [
        ("threshold", "dice", True), ("threshold", "hd95", False), ("threshold", "ece", False),
        ("threshold", "agreement", True), ("threshold", "rms_error", False), ("max_drop", "dice", False),
        ("min_speedup", "latency", True), ("max_ratio", "size", False), ("at_most", "latency", False),
        ("at_least", "throughput", True),
    ],
)  # fmt: skip
def test_a_goal_knows_which_way_is_better(kind: Any, metric: str, higher: bool) -> None:
    assert Goal(metric=metric, kind=kind, value=0.5).higher_is_better is higher


# ---------------------------------------------------------------- goals in force


def test_without_goals_a_point_of_the_leading_metric_is_assumed() -> None:
    assumed = [Goal(metric="dice", kind="max_drop", value=0.01)]
    assert _recipe().assumed_goals == _recipe().goals_in_force == assumed
    assert _recipe().has_quality_goal
    own = [{"metric": "latency", "kind": "min_speedup", "value": 2}]
    recipe = _recipe(goals=own)
    assert (recipe.assumed_goals, recipe.goals_in_force) == ([], recipe.goals)
    assert not recipe.has_quality_goal


def test_without_a_task_nothing_is_assumed_and_closeness_can_be_a_goal() -> None:
    stages = [EXPORT, QUANTIZE, BUILD]
    raw = _recipe(task={"kind": "raw"}, stages=stages)
    assert (raw.goals_in_force, raw.has_quality_goal) == ([], False)
    close = {"metric": "rms_error", "kind": "threshold", "value": 0.1}
    assert _recipe(task={"kind": "raw"}, stages=stages, goals=[close]).has_quality_goal
    assert _recipe(goals=[{**close, "metric": "fidelity_dice"}]).has_quality_goal
    refused = _refusal(task={"kind": "raw"}, goals=[{"metric": "dice", "kind": "max_drop", "value": 0.1}])
    assert refused == "a goal of dice needs a task, for without one nothing can be evaluated"


def test_what_the_source_should_reach_is_named_by_the_tasks_metrics() -> None:
    assert _recipe(expect={"dice": 0.9}).expect == {"dice": 0.9}
    assert _refusal(expect={"top1": 0.9}) == (
        "expect names 'top1', which is no metric of segmentation; choose of dice, iou, hd95, nsd"
    )
    assert _refusal(task={"kind": "raw"}, expect={"dice": 0.9}) == (
        "expect names 'dice', which is no metric of raw; a raw task has none"
    )


def test_runs_are_as_many_as_it_takes_unless_a_number_is_asked_for() -> None:
    assert Benchmark().runs is None
    assert _recipe(benchmark={"runs": None}).benchmark.runs is None
    assert _recipe(benchmark={"runs": 50}).benchmark.runs == 50


# ---------------------------------------------------------------- tasks


def test_a_task_leads_with_its_first_metric() -> None:
    assert Task.model_validate(SEGMENTATION).metrics == ("dice", "iou", "hd95", "nsd")
    assert Task.model_validate(STRUCTURES).metrics == ("dice", "iou", "hd95", "nsd")
    assert Task.model_validate(CLASSIFICATION).metrics[:2] == ("top1", "auroc")
    assert Task.model_validate(LABELS).metrics[0] == "auroc"
    assert "top1" not in Task.model_validate(LABELS).metrics
    assert Task(kind="raw").metrics == ()


def test_labels_belong_to_images_or_to_voxels() -> None:
    tasks = [Task.model_validate(words) for words in (LABELS, STRUCTURES, CLASSIFICATION, SEGMENTATION)]
    assert [task.target for task in tasks] == ["labels", "masks", "labels", "masks"]
    assert [task.key for task in tasks] == ["multilabel images", "multilabel voxels", "classification", "segmentation"]
    assert Task.model_validate({**LABELS, "thresholds": [0.3, 0.7]}).thresholds == [0.3, 0.7]
    assert Task.model_validate({"kind": "multilabel", "classes": ["lesion"]}).classes == ["lesion"]


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": []},
        {"stages": [EXPORT] * 21},
        {"seed": -1},
        {"seed": 2**31},
        {"benchmark": {"threads": 0}},
        {"benchmark": {"batches": []}},
        {"benchmark": {"runs": 9}},
        {"source": {"onnx": "not-a-uuid"}, "stages": [BUILD]},
        {"source": {"onnx": WEIGHTS, "weights": WEIGHTS}, "stages": [BUILD]},
        {"source": {"architecture": {"library": "os", "name": "system"}, "weights": WEIGHTS}},
        {"source": {"architecture": {"library": "monai", "name": ""}, "weights": WEIGHTS}},
        {"stages": [EXPORT, {"kind": "quantise"}]},
        {"stages": [EXPORT, {"kind": "quantize", "bits": 4}]},
        {"stages": [EXPORT, {"kind": "quantize", "tolerance": 0}]},
        {"stages": [EXPORT, {"kind": "build_engine", "targets": ["coreml"]}]},
        {"stages": [EXPORT, {"kind": "build_engine", "targets": ["tensorrt-rtx"]}]},
        {"stages": [EXPORT, {"kind": "build_engine", "targets": ["openvino", "openvino"]}]},
        {"stages": [{"kind": "export_onnx", "opset": 17}]},
        {"stages": [{"kind": "export_onnx", "on_miss": "ignore"}]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_what_the_language_does_not_have_is_refused(changes: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        _recipe(**changes)
    assert refused.value.error_count() >= 1


def test_a_recipe_never_changes() -> None:
    recipe = _recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


# ---------------------------------------------------------------- what a recipe needs


@pytest.mark.parametrize(
    ("source", "stages", "needs"),
    [
        (TORCH, [EXPORT], ["engine:onnxruntime", "library:monai", "stage:export_onnx"]),
        (ONNX, [{"kind": "quantize", "scheme": "fp16"}], ["engine:onnxruntime", "stage:quantize"]),
        (ONNX, [QUANTIZE], ["engine:onnxruntime", "engine:openvino", "stage:quantize"]),
        (
            ONNX,
            [{"kind": "build_engine", "targets": ["onnxruntime"]}],
            ["engine:onnxruntime", "stage:build_engine"],
        ),
        (ONNX, [BUILD], ["engine:onnxruntime", "engine:openvino", "stage:build_engine"]),
    ],
)
def test_a_recipe_says_what_its_worker_must_have(source: Any, stages: Any, needs: list[str]) -> None:
    assert _recipe(source=source, stages=stages).requirements() == needs


def test_a_recipe_says_which_parts_of_the_data_it_reads() -> None:
    assert _recipe(stages=[EXPORT, BUILD]).parts() == {"evaluation"}
    assert _recipe().parts() == {"evaluation", "calibration"}
    assert _recipe(stages=[EXPORT, {"kind": "quantize", "scheme": "fp16"}]).parts() == {"evaluation"}


def test_cpu_fastest_builds_every_cpu_engine() -> None:
    assert BuildEngine().engines == ("onnxruntime", "openvino")
    assert BuildEngine(targets=["openvino"]).engines == ("openvino",)


# ---------------------------------------------------------------- the language itself


def test_every_stage_says_its_kind_its_formats_and_its_purpose() -> None:
    kinds = stage_kinds()
    assert {"export_onnx", "quantize", "build_engine"} <= set(kinds)
    for kind, cls in kinds.items():
        stage = cls(**({"width": 0.5} if kind == "distill" else {}))
        assert isinstance(stage, StageSpec)
        assert stage.kind == kind  # type: ignore[attr-defined]
        assert isinstance(cls.consumes, ModelFormat)
        assert isinstance(cls.produces, ModelFormat)
        assert (cls.__doc__ or "").strip().endswith(".")
        assert stage.on_miss == "keep_best"


def test_the_schema_shows_every_stage_with_its_defaults() -> None:
    schema = TypeAdapter(Recipe).json_schema()
    stages = schema["properties"]["stages"]["items"]
    assert set(stages["discriminator"]["mapping"]) == set(stage_kinds())
    for kind, reference in stages["discriminator"]["mapping"].items():
        shown = schema["$defs"][reference.rpartition("/")[2]]
        assert shown["properties"]["kind"]["const"] == kind
        assert shown["additionalProperties"] is False
        assert all("default" in word for word in shown["properties"].values())
    assert schema["required"] == ["source", "data", "stages"]
    assert len(schema["properties"]["source"]["oneOf"]) == 2
    assert json.loads(json.dumps(schema)) == schema


# ---------------------------------------------------------------- training for int8


def test_training_for_int8_reads_the_train_part() -> None:
    trained = {"kind": "quantize", "training": {"epochs": 5}}
    assert _recipe(stages=[EXPORT, QUANTIZE]).parts() == {"evaluation", "calibration"}
    assert _recipe(stages=[EXPORT, trained]).parts() == {"evaluation", "calibration", "train"}
    assert Quantize().training is None


@pytest.mark.parametrize("scheme", ["int8_dynamic", "fp16"])
def test_training_is_refused_where_nothing_is_calibrated(scheme: str) -> None:
    refused = _refusal(stages=[EXPORT, {"kind": "quantize", "scheme": scheme, "training": {}}])
    assert refused == f"training is for int8_static; {scheme} has no ranges that a network could learn"


def test_training_for_int8_needs_a_task() -> None:
    on_labels = {"kind": "quantize", "training": {}, "soft_targets": None}
    assert _refusal(task={"kind": "raw"}, stages=[EXPORT, on_labels]) == (
        "stage 1 (quantize) trains on labels, which need a task; without labels a stage learns from the source model "
        "alone: soft_targets: {alpha: 1}"
    )
    alone = {**on_labels, "soft_targets": {"alpha": 1}}
    assert _recipe(task={"kind": "raw"}, stages=[EXPORT, alone]).parts() == {"evaluation", "calibration", "train"}
