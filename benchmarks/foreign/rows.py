"""One row of the table: the delivered engine and the hand-made ones, judged on the same pictures, timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from benchmarks.foreign.by_hand import SOURCE, Engine, Failure, make_all
from benchmarks.foreign.closeness import scores_of
from benchmarks.foreign.delivery import DELIVERED, Delivery
from benchmarks.foreign.networks import Network, Source, prepared
from benchmarks.foreign.pictures import batches
from benchmarks.foreign.timing import Ratio, median_of, ratio, time_in_turns


class Measured(BaseModel):
    """One engine on the unseen pictures. `kind` says what it is where the name does not."""

    name: str
    kind: str
    size_bytes: int
    latency_ms: float
    speedup: Ratio  # over the source in ONNX Runtime
    scores: dict[str, float]
    meets_goal: bool


class Row(BaseModel):
    """All that is known of one network, every figure from one run."""

    network: str
    title: str
    origin: str
    remark: str
    goal: str
    batch: int
    num_unseen: int
    source_scores: dict[str, float]
    engines: list[Measured]
    failures: dict[str, str]
    delivered: Measured | None
    against_rival: Ratio | None  # how many times faster than the fastest hand-made engine that meets the goal
    refusal: str | None
    verdict: str | None
    reason: str | None

    @property
    def rival(self) -> Measured:
        """The fastest of the hand-made engines, the source among them, that meets the goal."""
        return min((engine for engine in self.engines if engine.meets_goal), key=lambda engine: engine.latency_ms)

    @property
    def size_ratio(self) -> float | None:
        return None if self.delivered is None else self.delivered.size_bytes / self.rival.size_bytes


def measure(network: Network, source: Source, work: Path, directory: Path, delivery: Delivery | None) -> Row:
    """Make what is missing by hand, run everything on the unseen pictures, then time everything in turns."""
    inputs = {part: _batches(network, work, part) for part in ("calibration", "unseen")}
    (calibration, _), (unseen, targets) = inputs["calibration"], inputs["unseen"]
    made = make_all(source.onnx, calibration, directory / "by_hand")
    engines = [engine for engine in made if isinstance(engine, Engine)]
    kinds = {engine.name: engine.name for engine in engines}
    if delivery is not None and delivery.refusal is None:
        delivered, kinds[DELIVERED] = delivery.open()
        engines.append(delivered)
    found = _measured(network, engines, kinds, unseen, targets)
    report = delivery.report() if delivery else None
    measured, blocks, source_scores = found
    row = Row(
        network=network.name,
        title=network.title,
        origin=network.origin,
        remark=network.remark,
        goal=network.goal.text(),
        batch=network.batch,
        num_unseen=len(unseen) * network.batch,
        source_scores=source_scores,
        engines=[engine for engine in measured if engine.name != DELIVERED],
        failures={failure.name: failure.reason for failure in made if isinstance(failure, Failure)},
        delivered=next((engine for engine in measured if engine.name == DELIVERED), None),
        against_rival=None,
        refusal=delivery.refusal if delivery else None,
        verdict=report.verdict if report else None,
        reason=report.reason if report else None,
    )
    if row.delivered is not None:
        row.against_rival = ratio(blocks[row.rival.name], blocks[DELIVERED])
    return row


def _batches(network: Network, work: Path, part: Any) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[Any] | None]:
    """The part as the network takes it, and what is known of it."""
    pictures = network.pictures(work, part)
    found = list(batches(prepared(pictures.images, network.preprocessing), network.batch))
    targets = pictures.targets
    return found, None if targets is None else targets[: len(found) * network.batch]


def _measured(
    network: Network,
    engines: Sequence[Engine],
    kinds: dict[str, str],
    unseen: Sequence[npt.NDArray[np.float32]],
    targets: npt.NDArray[Any] | None,
) -> tuple[list[Measured], dict[str, Any], dict[str, float]]:
    assert engines[0].name == SOURCE, "the source does not run in ONNX Runtime"
    reference = [engines[0].run(batch) for batch in unseen]
    scores = {}
    for engine in engines:
        outputs = [engine.run(batch) for batch in unseen]
        scores[engine.name] = scores_of(outputs, reference, network.decision, targets, network.background)
    timed = time_in_turns([partial(engine.run, unseen[0]) for engine in engines])
    blocks = {engine.name: times for engine, times in zip(engines, timed, strict=True)}
    measured = [
        Measured(
            name=engine.name,
            kind=kinds[engine.name],
            size_bytes=engine.size_bytes,
            latency_ms=median_of(blocks[engine.name]),
            speedup=ratio(blocks[SOURCE], blocks[engine.name]),
            scores=scores[engine.name],
            meets_goal=network.goal.is_met(scores[engine.name], scores[SOURCE]),
        )
        for engine in engines
    ]
    return measured, blocks, scores[SOURCE]
