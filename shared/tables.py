"""The report for readers: one table, as CSV, and as Markdown with goals, reasons, method and digests."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from shared import figures, metrics
from shared.judging import speedup_of
from shared.metrics import AGREEMENT
from shared.report import Candidate, Measurement, Ratio, Report, StageReport, TargetReport

COLUMNS = (
    "stage", "status", "engine", "precision", "size %", "latency %", "speedup", "over ONNX Runtime fp32", "p50 ms",
    "p90 ms",
)  # fmt: skip


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """The report's table: header and rows, baseline first.

    Beside COLUMNS it has the speedup's 95 % interval and p99 where a row has them; of the task's metrics the leading
    one and the goals' own, each with what was lost; and of closeness to the source's outputs what a goal names, or
    rms_error where the task has no metric. Ratios and their losses are in points, distances in mm or pixels.
    """
    entries = list(_entries(report))
    rows = [row for _, _, row in entries if row is not None]
    named = {*report.recipe.task.metrics[:1], *(result.goal.metric for result in report.goals)}
    names = [name for name in report.recipe.task.metrics if name in named & report.baseline.source.metrics.keys()]
    close = [name for name in AGREEMENT if name in named] or ([] if report.recipe.task.metrics else ["rms_error"])
    names += [name for name in close if any(name in row.metrics for row in rows)]
    columns = list(COLUMNS)
    if any(_interval(row) for row in rows):
        columns.insert(columns.index("speedup") + 1, "speedup 95 %")
    if any(row.latency_ms.p99 is not None for row in rows):
        columns.append("p99 ms")
    columns += [cell for name in names for cell in ([name] if name in AGREEMENT else [name, f"{name} lost"])]
    cells = [_cells(report, names, *entry) for entry in entries]
    return columns, [[row.get(column, "-") for column in columns] for row in cells]


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


def _cells(
    report: Report, names: list[str], stage: str, status: str, row: Measurement | None
) -> dict[str, str]:
    """What a row says, by column."""
    cells = {"stage": stage, "status": status}
    if row is None:
        return cells
    source = report.baseline.source
    cells |= {
        "engine": row.method.engine,
        "precision": row.method.precision,
        "size %": f"{100 * row.size_bytes / source.size_bytes:.1f}",
        "p50 ms": f"{row.latency_ms.p50:.2f}",
        "p90 ms": f"{row.latency_ms.p90:.2f}",
    }
    speedup = Ratio(value=1, low=1, high=1) if row is source else speedup_of(row)
    if speedup is not None:
        cells |= {"latency %": f"{100 / speedup.value:.1f}", "speedup": f"{speedup.value:.2f}"}
    if row.speedup_over_onnxruntime is not None:
        cells["over ONNX Runtime fp32"] = f"{row.speedup_over_onnxruntime.value:.2f}"
    if _interval(row):
        cells["speedup 95 %"] = _interval(row)
    if row.latency_ms.p99 is not None:
        cells["p99 ms"] = f"{row.latency_ms.p99:.2f}"
    for name in names:
        if name not in row.metrics:
            continue
        value = row.metrics[name]
        cells[name] = f"{metrics.shown(name, value):.2f}"
        if name not in AGREEMENT:
            lost = metrics.shown(name, metrics.loss_of(name, source.metrics[name], value))
            cells[f"{name} lost"] = "" if row is source else f"{lost:+.2f}"
    return cells


def _interval(row: Measurement) -> str:
    ratio = speedup_of(row)
    return "" if ratio is None else figures.interval(ratio)


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
            *[f"- warning: {warning}" for warning in report.warnings],
            *([""] if report.warnings else []),
            *_markdown_table(header, rows),
            "",
            "Metrics and what was lost of them are in points (distances in mm or pixels); + is worse. Sizes are "
            "against the source model's, the first row. Speedups are against the source model as it came, and against "
            "its fp32 graph in ONNX Runtime; both were timed in turns with each row, so that the machine's load falls "
            "on all.",
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
            figures.goal_name(result),
            figures.wanted(result.goal),
            figures.reached(result),
            "-" if result.bound is None else figures.quantity(result.goal, result.bound),
            figures.outcome(result),
        ]
        for result in report.goals
    ]
    header = ["goal", "wanted", "reached", "95 % bound", "outcome"]
    assumed = ["The recipe names no goal; these were assumed.", ""] if report.goals_assumed else []
    bound = "With 95 % confidence the true figure is no worse than the bound; a goal is met if its bound is inside."
    explained = ["", bound] if any(result.bound is not None for result in report.goals) else []
    return ["## Goals", "", *assumed, *_markdown_table(header, rows), *explained, ""]


def _reason_lines(report: Report) -> list[str]:
    lines = [f"- stage {s.position} ({s.kind}) {s.status}: {s.reason}" for s in report.stages if s.reason]
    lines += [
        f"- stage {s.position} target {t.target}: {t.verdict.replace('_', ' ')}, {t.reason}"
        for s in report.stages
        for t in s.targets
    ]
    lines += [
        f"- stage {s.position} candidate {_candidate_name(c)}: {'kept' if c.kept else 'not kept'}, {c.reason}"
        for s in report.stages
        for c in _candidates(s)
    ]
    return ["## What happened", "", *lines, ""] if lines else []


def _candidates(stage: StageReport) -> list[Candidate]:
    """The candidates of every target, each once: one engine may have been held for several."""
    found = stage.candidates + [candidate for target in stage.targets for candidate in target.candidates]
    kept_first = sorted(found, key=lambda candidate: not candidate.kept)
    return list({_candidate_name(candidate): candidate for candidate in reversed(kept_first)}.values())


def _candidate_name(candidate: Candidate) -> str:
    return " ".join(part for part in (candidate.engine, candidate.precision, candidate.form) if part)


def _bound_lines(report: Report) -> list[str]:
    """By which method each metric of what is delivered has its bound."""
    delivered = next((stage.measurement for stage in report.stages if stage.position == report.final), None)
    bounds = [] if delivered is None else delivered.bounds
    return [
        f"- bound of {bound.metric} ({bound.kind}): {bound.method}, from {bound.groups} independent samples or groups"
        for bound in bounds
    ]


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
        f"- at least {method.warm_up} warm-up and {method.runs} timed runs of the baseline at batch {method.batch} on "
        f"{method.threads} thread(s); latency is one batch's wall time; rows are timed in turns with the source model",
        f"- metrics over {method.samples} evaluation samples, computed on what each row's engine put out",
        *_bound_lines(report),
        f"- {environment.cpu}, {environment.cores} cores, {environment.memory_bytes / 2**30:.1f} GiB"
        + (f", {environment.gpu}" if environment.gpu else "")
        + (f"; {', '.join(environment.instruction_sets)}" if environment.instruction_sets else ""),
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
