"""The report for readers: one table, as CSV, and as Markdown with goals, reasons, method and digests."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from shared.recipe import LOWER_IS_BETTER
from shared.report import Candidate, Measurement, Report, StageReport, TargetReport, metric_loss, speedup_of

COLUMNS = ("stage", "status", "engine", "precision", "size %", "latency %", "speedup", "p50 ms", "p99 ms")


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """The report's table: header and rows, baseline first, losses in points (hd95 in pixels)."""
    names = [name for name in report.recipe.task.metrics if name in report.baseline.source.metrics]
    header = list(COLUMNS) + [cell for name in names for cell in (name, f"{name} lost")]
    return header, [_row(report, names, *entry) for entry in _entries(report)]


def _entries(report: Report) -> Iterator[tuple[str, str, Measurement | None]]:
    yield "baseline", "measured", report.baseline.source
    if report.baseline.onnxruntime is not None:
        yield "baseline", "measured", report.baseline.onnxruntime
    for stage in report.stages:
        final = " (delivered)" if stage.position == report.final else ""
        name = f"{stage.position} {stage.kind}"
        if all(target.evaluated for target in stage.targets) and len(stage.targets) < 2:
            yield name, stage.status + final, stage.measurement
            continue
        for target in stage.targets:
            yield f"{name} {target.target}", _target_status(target, stage.status + final), target.measurement


def _target_status(target: TargetReport, status: str) -> str:
    if target.engine is None:
        return "failed"
    return status if target.evaluated else f"{status}, not evaluated: figures of its ONNX"


def _row(report: Report, names: list[str], stage: str, status: str, found: Measurement | None) -> list[str]:
    if found is None:
        return [stage, status] + ["-"] * (len(COLUMNS) - 2 + 2 * len(names))
    source = report.baseline.source
    speedup = speedup_of(source, found)
    row = [stage, status, found.method.engine, found.method.precision]
    row += [f"{100 * found.size_bytes / source.size_bytes:.1f}", f"{100 / speedup:.1f}", f"{speedup:.2f}"]
    row += [f"{found.latency_ms.p50:.2f}", f"{found.latency_ms.p99:.2f}"]
    for name in names:
        value = found.metrics.get(name)
        if value is None:
            row += ["-", "-"]
            continue
        scale = 1 if name in LOWER_IS_BETTER else 100
        row += [f"{scale * value:.2f}", f"{scale * metric_loss(name, source.metrics[name], value):+.2f}"]
    return row


def to_csv(report: Report) -> str:
    """The table as RFC 4180 CSV."""
    header, rows = table(report)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def to_markdown(report: Report) -> str:
    """The whole report for a reader: verdict, table, goals, method, seeds and digests."""
    header, rows = table(report)
    return "\n".join(
        [
            f"# {report.name}: {report.verdict}",
            "",
            report.reason,
            "",
            *_markdown_table(header, rows),
            "",
            "Metrics in percent, what was lost in points (hd95 in pixels); + is worse. Size is against the baseline's "
            "first row. For latency and speedup the source model was timed again in turns with each row, and they are "
            "against that, so that the machine's load falls on both.",
            "",
            *_goal_lines(report),
            *_reason_lines(report),
            *_method_lines(report),
        ]
    )


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _goal_lines(report: Report) -> list[str]:
    if not report.goals:
        return []
    rows = [
        [
            f"{result.goal.kind} of {result.goal.metric}" + (f" ({result.target})" if result.target else ""),
            f"{result.goal.value:g}",
            "-" if result.reached is None else f"{result.reached:.4g}",
            {True: "met", False: "missed", None: "not evaluated"}[result.met],
        ]
        for result in report.goals
    ]
    return ["## Goals", "", *_markdown_table(["goal", "asked", "reached", ""], rows), ""]


def _reason_lines(report: Report) -> list[str]:
    lines = [f"- stage {s.position} ({s.kind}) {s.status}: {s.reason}" for s in report.stages if s.reason]
    lines += [
        f"- stage {s.position} target {t.target}: {t.verdict.replace('_', ' ')}, {t.reason}"
        for s in report.stages
        for t in s.targets
    ]
    lines += [
        f"- stage {s.position} candidate {c.engine} {c.precision}: {'kept' if c.kept else 'not kept'}, {c.reason}"
        for s in report.stages
        for c in _candidates(s)
    ]
    return ["## What happened", "", *lines, ""] if lines else []


def _candidates(stage: StageReport) -> list[Candidate]:
    """The candidates of every target, each once: one engine may have been held for several."""
    found = stage.candidates + [candidate for target in stage.targets for candidate in target.candidates]
    kept_first = sorted(found, key=lambda candidate: not candidate.kept)
    return list({(candidate.engine, candidate.precision): candidate for candidate in reversed(kept_first)}.values())


def _method_lines(report: Report) -> list[str]:
    method, environment = report.baseline.source.method, report.environment
    packages = ", ".join(f"{name} {version}" for name, version in sorted(environment.packages.items()))
    digests = [
        f"- stage {s.position} {a.role} `{a.name}`: {a.size_bytes} bytes, sha256 `{a.sha256}`"
        for s in report.stages
        for a in s.artifacts
    ]
    return [
        "## How it was measured",
        "",
        f"- {method.warm_up} warm-up and {method.runs} timed runs at batch {method.batch} on {method.threads} "
        f"thread(s); latency is one batch's wall time",
        f"- metrics over {method.samples} evaluation samples, computed on what each row's engine put out",
        f"- {environment.cpu}, {environment.cores} cores, {environment.memory_bytes / 2**30:.1f} GiB"
        + (f", {environment.gpu}" if environment.gpu else ""),
        f"- Python {environment.python}, {packages}",
        f"- seed {report.recipe.seed}",
        "",
        "## Digests",
        "",
        f"- job `{report.job}`",
        f"- source model: sha256 `{report.source_sha256}`",
        f"- data set: sha256 `{report.data_sha256}`",
        *digests,
        "",
    ]
