"""Every model is evaluated once on each engine, whoever asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared.recipe import ModelFormat, Task
from tests.worker.workbench import Workbench
from worker import engines
from worker.context import Model
from worker.engines import Runner
from worker.evaluation.once import SAME_OUTPUTS, Evaluations, identity
from worker.feed import Floats, Inputs


class Counting:
    """A runner that counts the samples that it runs, and keeps how many it ran at once."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.num_samples, self.batches = runner, 0, set[int]()
        self.engine, self.precision = runner.engine, runner.precision
        self.threads, self.versions = runner.threads, runner.versions

    def run(self, inputs: Inputs) -> Floats:
        return self.run_all(inputs)[0]

    def run_all(self, inputs: Inputs) -> list[Floats]:
        self.num_samples += len(inputs)
        self.batches.add(len(inputs))
        return self.runner.run_all(inputs)


@pytest.fixture
def evaluations(bench: Workbench) -> Evaluations:
    found = Evaluations(bench.recipe, bench.samples, lambda: (bench.source, bench.open_source()))
    found.source_outputs = bench.reference
    return found


def opened(model: Model) -> Counting:
    return Counting(engines.load("onnxruntime").open(model, 1))


def test_a_model_that_was_evaluated_is_not_run_again(
    bench: Workbench, exported: Model, evaluations: Evaluations
) -> None:
    runner = opened(exported)
    first = evaluations.of(bench.reference, exported, runner)
    num_samples = runner.num_samples
    assert num_samples > 0
    assert evaluations.of(bench.reference, exported, runner).evaluation is first.evaluation
    assert runner.num_samples == num_samples


def test_the_same_bytes_under_another_name_are_the_same_model(
    bench: Workbench, exported: Model, evaluations: Evaluations, tmp_path: Path
) -> None:
    copied = replace(exported, path=tmp_path / "copy.onnx")
    copied.path.write_bytes(exported.path.read_bytes())
    first, second = opened(exported), opened(copied)
    assert identity(exported, first) == identity(copied, second)
    evaluations.of(bench.reference, exported, first)
    evaluations.of(bench.reference, copied, second)
    assert second.num_samples == 0


@pytest.mark.parametrize(("timed", "fixed", "expected"), [(1, None, 1), (2, None, 2), (1, 4, 4)])
def test_a_model_is_evaluated_as_it_is_timed(
    bench: Workbench, exported: Model, timed: int, fixed: int | None, expected: int
) -> None:
    """A runtime may compile other code for another number of samples, so that it is the timed one that is checked."""
    settings = bench.recipe.benchmark.model_copy(update={"batches": [timed, 8]})
    recipe = bench.recipe.model_copy(update={"benchmark": settings})
    evaluations = Evaluations(recipe, bench.samples, lambda: (bench.source, bench.open_source()))
    evaluations.source_outputs = bench.reference
    runner = opened(exported)
    if fixed is not None:
        runner.fixed_batch = fixed  # type: ignore[attr-defined]
    evaluations.of(bench.reference, exported, runner)
    assert max(runner.batches) == expected


def test_another_precision_of_the_same_file_is_another_model(exported: Model) -> None:
    runtime = engines.load("openvino")
    plain, half = (runtime.open(replace(exported, precision=precision), 1) for precision in ("fp32", "bf16"))
    assert identity(exported, plain) != identity(exported, half)


def test_metrics_that_cost_much_are_computed_only_for_whoever_wants_them(
    bench: Workbench, exported: Model, evaluations: Evaluations
) -> None:
    runner = opened(exported)
    assert "hd95" not in evaluations.of(bench.reference, exported, runner).metrics
    assert "hd95" in evaluations.of(bench.reference, exported, runner, {"hd95"}).metrics


def test_a_conversion_that_only_rounds_differently_needs_no_sample_to_be_shown_right(
    bench: Workbench, exported: Model, evaluations: Evaluations
) -> None:
    evaluated = evaluations.of(bench.reference, exported, opened(exported))
    (bound,) = evaluated.bounds
    assert evaluated.metrics["rms_error"] < 1e-4
    assert (bound.bound, bound.method) == (bound.value, SAME_OUTPUTS)


def test_without_a_quality_goal_outputs_must_be_close(bench: Workbench, exported: Model) -> None:
    raw = bench.recipe.model_copy(update={"task": Task(kind="raw")})
    found = Evaluations(raw, bench.samples, lambda: (bench.source, bench.open_source()))
    found.source_outputs = bench.reference
    evaluated = found.of(bench.reference, exported, opened(exported))
    assert evaluated.agreement.rule == "close"
    assert evaluated.bounds == []
    assert exported.format == ModelFormat.ONNX
