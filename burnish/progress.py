"""Shows what is going on: a job's stages as its events come in, and files as they are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from burnish.screen import colour, size
from burnish.upload import OnBytes
from shared.schemas import Event, Job

BASELINE = -1  # the row of the baseline, before stage 0


@contextmanager
def watching(job: Job, console: Console) -> Iterator[Callable[[Event], None]]:
    """Yields what a job's events are to be told to: a live table on a terminal, a line each elsewhere."""
    board = Board(job)
    if not console.is_terminal:
        yield lambda event: _print(console, board.take(event))
        return
    with Live(board, console=console, refresh_per_second=4):
        yield lambda event: _ignore(board.take(event))


@contextmanager
def sending(console: Console) -> Iterator[OnBytes]:
    """Yields what uploads are to be told to: a bar for each file on a terminal, a line each elsewhere."""
    seen = dict[Path, str]()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    tasks = dict[Path, TaskID]()

    def tell(path: Path, doing: Literal["hashing", "sending"], done: int, total: int) -> None:
        if path not in tasks:
            tasks[path] = bars.add_task("", total=None)
        begun = seen.get(path) != doing
        seen[path] = doing
        bars.update(tasks[path], description=f"{doing} {escape(path.name)}", completed=done, total=total)
        if begun and doing == "sending" and not console.is_terminal:
            console.print(f"sending {escape(path.name)} ({size(total)})", soft_wrap=True)

    with bars:
        yield tell
    for path, doing in seen.items():
        if doing == "hashing":
            console.print(f"{escape(path.name)} was uploaded before", soft_wrap=True)


@contextmanager
def receiving(name: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yields what a download is to be told to."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(f"receiving {escape(name)}")
        yield lambda done, total: bars.update(task, completed=done, total=total)


@dataclass
class Row:
    """One line of the board."""

    kind: str
    status: str = "pending"
    fraction: float = 0.0
    message: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def seconds(self) -> float | None:
        if self.started_at is None:
            return None
        return max(0.0, ((self.finished_at or datetime.now(UTC)) - self.started_at).total_seconds())


class Board:
    """A job as its events tell it, from the first on."""

    def __init__(self, job: Job) -> None:
        self.name, self.url, self.status, self.reason = job.name, job.url, "queued", ""
        self.rows = {BASELINE: Row("baseline")} | {stage.position: Row(stage.kind) for stage in job.stages}

    def take(self, event: Event) -> str | None:
        """Note an event; returns the line that tells it, if it is worth one."""
        data, line = event.data, None
        match event.kind:
            case "submitted":
                line = f"submitted: {self.url}"
            case "claimed":
                self.status, self.reason = "running", ""
                self._start(BASELINE, event)
                line = f"attempt {event.attempt} started on {data.get('worker', 'a worker')}"
            case "waiting":
                self.reason = _told(data)
                line = f"waiting: {self.reason}" if self.reason else "waiting for a worker"
            case "baseline_measured":
                self._finish(BASELINE, "succeeded", event)
                line = "baseline measured"
            case "stage_started" | "progress" | "stage_finished":
                line = self._take_stage(event)
            case "cancel_requested":
                self.reason = "to be cancelled"
                line = "cancel requested"
            case "requeued":
                line = self._requeue(event)
            case "succeeded" | "failed" | "cancelled":
                line = self._end(event)
        return line

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False, show_header=False)
        for position, row in self.rows.items():
            table.add_row(
                "" if position == BASELINE else str(position),
                row.kind,
                colour(row.status),
                ProgressBar(total=1.0, completed=row.fraction, width=24),
                "" if row.seconds is None else f"{row.seconds:.0f} s",
                Text(row.message, overflow="ellipsis", no_wrap=True),
            )
        title = f"[bold]{escape(self.name)}[/] {colour(self.status)}"
        title += f": {escape(self.reason)}" if self.reason else ""
        return Group(title, table, Text(self.url, style="dim", no_wrap=True))

    def _take_stage(self, event: Event) -> str | None:
        position = event.data.get("stage")
        position = BASELINE if position is None else int(position)
        row = self.rows.get(position)
        if row is None:
            return None
        name = row.kind if position == BASELINE else f"stage {position} ({row.kind})"
        if event.kind == "progress":
            if row.finished_at is not None:  # a beat of the worker's heart can come after the stage's end
                return None
            before, row.message = (row.message, int(row.fraction * 4)), str(event.data.get("message") or "")
            row.fraction = float(event.data.get("fraction") or 0.0)
            told = before != (row.message, int(row.fraction * 4))
            return f"{name} {row.fraction:.0%} {row.message}".rstrip() if told else None
        if event.kind == "stage_started":
            self._finish(BASELINE, "succeeded", event)
            self._start(position, event)
            return f"{name} started"
        status, row.message = str(event.data.get("status")), str(event.data.get("reason") or "")
        self._finish(position, status, event)
        return f"{name} {status}" + (f": {row.message}" if row.message else "")

    def _start(self, position: int, event: Event) -> None:
        row = self.rows[position]
        if row.status == "pending":
            row.status, row.started_at = "running", event.at

    def _finish(self, position: int, status: str, event: Event) -> None:
        row = self.rows[position]
        if row.finished_at is None:
            row.status, row.fraction, row.finished_at = status, 1.0, event.at

    def _requeue(self, event: Event) -> str:
        self.status, self.reason = "queued", _told(event.data)
        for row in self.rows.values():
            if row.status == "running":
                row.status, row.fraction, row.message, row.started_at = "pending", 0.0, "", None
        return f"attempt {event.attempt} ended, the job waits for another: {self.reason}"

    def _end(self, event: Event) -> str:
        self.status, verdict = event.kind, event.data.get("verdict")
        self.reason = _told(event.data) or (f"verdict {verdict}" if verdict else "")
        for position, row in self.rows.items():
            if row.finished_at is None:
                at_fault = row.status == "running" or position == event.data.get("stage")
                row.status = "failed" if at_fault and event.kind == "failed" else "skipped"
                row.finished_at = event.at
        return self.status + (f": {self.reason}" if self.reason else "")


def _told(data: dict[str, Any]) -> str:
    return str(data.get("message") or "")


def _print(console: Console, line: str | None) -> None:
    if line is not None:
        console.print(escape(line), soft_wrap=True)


def _ignore(line: str | None) -> None:
    """On a terminal the table tells it."""
