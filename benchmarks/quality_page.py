"""The table of the quality bench: each method's size, latency and loss beside the bar that it is held against."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shared.report import Report


@dataclass(frozen=True)
class Bar:
    """The most that a method may have, in percent of the source's and in points."""

    size: float
    latency: float
    lost: float
    exact: bool = False  # else in whole percent, as such tables are written

    def told(self) -> str:
        return f"{self.size:g} / {self.latency:g} / {self.lost:g}"


BARS = {
    "distillation": Bar(25, 60, 1.2),
    "quantization": Bar(25, 40, 0.8),
    "pruning + quantization": Bar(15, 30, 2.1),
    "engine": Bar(15, 20, 2.1),
}
OWN = {("brain_mri", "engine"): Bar(8, 10, 1.0, exact=True)}


@dataclass(frozen=True)
class Found:
    """One row of one seed: percent of the source's size and latency, points lost (negative: gained).

    `lost_to_best` is against the best fp32 network of that seed: the source, its student or what pruning left.
    """

    example: str
    seed: int
    method: str
    engine: str
    size: float
    latency: float
    lost: float
    lost_to_best: float
    metric: str
    source: float


def page(found: Sequence[Found], reports: Sequence[Report], notes: Sequence[str]) -> tuple[str, bool]:
    """The page in Markdown, and whether every bar is kept by the mean over the seeds."""
    lines = ["# What the stages are worth", "", *_method(reports[-1]), ""]
    lines += ["| example | method | engine | size % | latency % | speedup | points lost | to the best | bar | |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    all_kept = True
    for example, method in dict.fromkeys((row.example, row.method) for row in found):
        here = [row for row in found if (row.example, row.method) == (example, method)]
        for bar in filter(None, (BARS[method], OWN.get((example, method)))):
            kept = keeps(here, bar)
            all_kept &= kept
            verdict = "kept" if keeps(here, replace(bar, exact=True)) else "kept when rounded" if kept else "**missed**"
            engines = "; ".join(sorted({row.engine for row in here}))
            cells = [example, method, engines]
            cells += [_spread([row.size for row in here], 2), _spread([row.latency for row in here])]
            cells += [_spread([100 / row.latency for row in here], 2), _spread([row.lost for row in here], 2)]
            cells += [_spread([row.lost_to_best for row in here], 2), bar.told()]
            lines.append(f"| {' | '.join(cells)} | {verdict} |")
    lines += [
        "",
        "Mean and, in brackets, lowest to highest over the seeds. A bar is size / latency / points lost and is held "
        "against the mean; the four methods' size and latency in whole percent, as those bars are written (*kept when "
        "rounded*: the exact mean is above its bar by less than half a percent), and the second bar of the brain MRI's "
        "engine exactly. Negative points are gained.",
        "",
        "*To the best* is the stricter reading, held against no bar: points lost against the best fp32 network of that "
        "seed, be it the source, its student or the pruned network after fine-tuning. Where it is far from *points "
        "lost*, the source was not trained as well as this data allows, and what was gained over it is not owed to "
        "the method alone.",
        "",
    ]
    return "\n".join([*lines, *_scores(found), "", *_settings(reports), "", *notes]) + "\n", all_kept


def keeps(rows: Sequence[Found], bar: Bar) -> bool:
    """Whether the mean over the seeds is within the bar."""
    size, latency, lost = (float(np.mean([getattr(row, name) for row in rows])) for name in ("size", "latency", "lost"))
    if not bar.exact:
        size, latency = round(size), round(latency)
    return size <= bar.size and latency <= bar.latency and lost <= bar.lost


def _method(report: Report) -> list[str]:
    method, here = report.baseline.source.method, report.environment
    packages = ", ".join(f"{name} {version}" for name, version in sorted(here.packages.items()))
    return [
        "Size and latency are percentages of the source in eager PyTorch, fp32, timed in turns with each row at "
        f"{method.threads} thread and batch {method.batch}. Size is that of the files that a runtime loads: of the "
        "source its safetensors, of an engine its ONNX or its .xml and .bin, graph and weights together. Points are of "
        "mean Dice or top-1 on the evaluation part. Each seed trains a source of its own. The first three rows are "
        "what those stages left; the engine is what the job that prunes and quantizes delivers.",
        "",
        "Written by `make bench-quality`.",
        "",
        f"- {here.cpu}, {here.cores} cores, {here.memory_bytes / 2**30:.1f} GiB, load average "
        f"{', '.join(f'{load:.1f}' for load in os.getloadavg())} at the end; GPU: {here.gpu or 'none'}",
        f"- Python {here.python}, {packages}",
    ]


def _scores(found: Sequence[Found]) -> list[str]:
    """Seed by seed what was reached."""
    methods = list(BARS)
    lines = ["## Scores, seed by seed", "", f"| example | seed | metric | source | {' | '.join(methods)} |"]
    lines += ["|---|---|---|---|" + "---|" * len(methods)]
    for example, seed in dict.fromkeys((row.example, row.seed) for row in found):
        here = {row.method: row for row in found if (row.example, row.seed) == (example, seed)}
        first = here[methods[0]]
        scores = [f"{first.source - here[method].lost:.2f}" for method in methods]
        lines.append(f"| {example} | {seed} | {first.metric} | {first.source:.2f} | {' | '.join(scores)} |")
    return lines


def _settings(reports: Sequence[Report]) -> list[str]:
    """How the stages that train were told to, and what their kept-out samples said."""
    lines = ["## How the jobs trained", "", "The score is that of the epoch taken, on the samples kept out.", ""]
    lines += ["| job | seed | settings | learnt from | kept out | epoch taken | score |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for report in reports:
        for stage, words in zip(report.stages, report.recipe.stages, strict=True):
            if stage.kind not in ("distill", "prune"):
                continue
            for log in stage.details.get("training", [stage.details]):  # a pruning has one a round
                score = log[f"validation_{report.recipe.task.metrics[0]}"]
                cells = [f"{report.recipe.task.kind}, {stage.kind}", report.recipe.seed, _told(words.model_dump())]
                cells += [log["train_samples"], log["validation_samples"], log["best_epoch"]]
                lines.append(f"| {' | '.join(map(str, cells))} | {'none' if score is None else f'{100 * score:.2f}'} |")
    return lines


def _told(words: dict[str, Any]) -> str:
    training, soft = words["training"], words["soft_targets"]
    what = [f"{name} {words[name]:g}" for name in ("width", "pruning_ratio") if words.get(name) is not None]
    what += [f"{training['epochs']} epochs", f"batch {training['batch']}"]
    what += [f"learning rate {training['learning_rate']:g}"]
    if soft is not None:
        what.append(f"temperature {soft['temperature']:g}, alpha {soft['alpha']:g}")
    return ", ".join(what)


def _spread(values: Sequence[float], digits: int = 1) -> str:
    low, mean, high = min(values), float(np.mean(values)), max(values)
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
