"""A report as a job makes it, for the tests of what is read from one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from uuid import UUID

from shared.recipe import Goal, Recipe
from shared.report import (
    Agreement,
    ArtifactNote,
    Baseline,
    Bound,
    Candidate,
    Environment,
    GoalResult,
    Latency,
    Measurement,
    Method,
    OutputAgreement,
    Ratio,
    Report,
    StageReport,
)

RECIPE = Recipe.model_validate(
    {
        "source": {"onnx": "01990000-0000-7000-8000-000000000001"},
        "task": {"kind": "segmentation", "classes": ["other", "lesion"], "background": 0},
        "data": {"artifact": "01990000-0000-7000-8000-000000000002"},
        "stages": [{"kind": "quantize"}, {"kind": "build_engine"}],
        "seed": 7,
    }
)
MACHINE = Environment(
    machine="x86_64",
    cpu="EPYC",
    cores=2,
    memory_bytes=2**33,
    gpu=None,
    python="3.11.9",
    packages={"torch": "2.14.1", "onnxruntime": "1.32.0"},
)


def agreement(passed: bool = True, rule: Literal["broken", "close"] = "broken") -> Agreement:
    reason = None if passed else "its decisions are not the source model's"
    output = OutputAgreement(
        name="y", kind="decisions", rms_error=0.02, cosine=0.99, max_error=0.1, decisions=0.99, dice=0.98,
        passed=passed, reason=reason,
    )  # fmt: skip
    return Agreement(samples=8, rule=rule, outputs=[output])


def measured(
    p50: float = 10.0,
    size_bytes: int = 1000,
    engine: str = "torch eager",
    precision: str = "fp32",
    parameters: int | None = 100,
    peak_memory_bytes: int | None = 500,
    speedup: Ratio | None = None,
    bounds: Sequence[Bound] = (),
    **metrics: float,
) -> Measurement:
    method = Method(
        engine=engine,
        precision=precision,
        device="cpu: EPYC",
        threads=1,
        batch=1,
        warm_up=5,
        runs=50,
        samples=40,
        versions={},
    )
    return Measurement(
        parameters=parameters,
        macs=2000,
        size_bytes=size_bytes,
        latency_ms=Latency(p50=p50, p90=1.5 * p50),
        speedup=speedup,
        throughput_per_second={1: 1000 / p50},
        peak_memory_bytes=peak_memory_bytes,
        metrics=metrics,
        bounds=list(bounds),
        method=method,
    )


def bound(value: float, limit: float, kind: Literal["threshold", "max_drop"] = "max_drop") -> Bound:
    return Bound(metric="dice", kind=kind, value=value, bound=limit, groups=40, method="bootstrap-t over samples")


def exactly(value: float) -> Ratio:
    """A speedup without an interval."""
    return Ratio(value=value, low=value, high=value)


BASELINE = measured(dice=0.9, hd95=3.0)
INT8 = measured(2.5, 251, "onnxruntime", "int8", speedup=exactly(4), dice=0.895, hd95=3.5)


def make_report(**changes: Any) -> Report:
    goal = Goal(metric="latency", kind="min_speedup", value=3)
    facts: dict[str, Any] = {
        "job": UUID(int=7),
        "name": "brain-mri",
        "recipe": RECIPE,
        "source_sha256": "aa" * 32,
        "data_sha256": "bb" * 32,
        "environment": MACHINE,
        "baseline": Baseline(
            source=BASELINE,
            onnxruntime=measured(8.0, engine="onnxruntime", speedup=exactly(1.25), dice=0.9, hd95=3.0),
            environment=MACHINE,
        ),
        "stages": [
            StageReport(position=0, kind="quantize", status="dropped", reason="Dice fell by 3 points.", seconds=1.0),
            StageReport(
                position=1,
                kind="build_engine",
                status="succeeded",
                seconds=2.0,
                measurement=INT8,
                candidates=[
                    Candidate(
                        engine="openvino",
                        precision="int8",
                        measurement=None,
                        agreement=agreement(),
                        kept=False,
                        reason="slower than onnxruntime.",
                    ),
                    Candidate(
                        engine="onnxruntime",
                        precision="int8",
                        measurement=INT8,
                        agreement=agreement(),
                        kept=True,
                        reason="the fastest.",
                    ),
                ],
                artifacts=[
                    ArtifactNote(role="engine", format="zip", name="engine.zip", sha256="cc" * 32, size_bytes=251)
                ],
            ),
        ],
        "final": 1,
        "goals": [GoalResult(goal=goal, reached=4.0, outcome="met")],
        "verdict": "met",
        "reason": "Every goal is met.",
    }
    return Report(**{**facts, **changes})
