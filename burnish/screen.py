"""What a command tells: its answer on stdout, all else on stderr; with --json the answer is one JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from burnish.errors import BurnishError
from shared.schemas import Artifact, Job, Note, StateReason

PIPE_WIDTH = 10_000  # nothing is cut where a program reads
COLOURS = {
    "succeeded": "green", "met": "green", "ready": "green", "cached": "green", "running": "cyan", "queued": "yellow",
    "missed": "red", "failed": "red", "dropped": "yellow", "cancelled": "magenta", "not_evaluated": "yellow",
    "not_shown": "yellow", "no_gain": "yellow", "skipped": "yellow",
}


class Screen:
    """stdout and stderr of one command."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
        self.err = Console(highlight=False, stderr=True, width=None if sys.stderr.isatty() else PIPE_WIDTH)

    def document(self, document: Any) -> None:
        """The whole answer as one JSON document."""
        click.echo(json.dumps(_plain(document), indent=2, ensure_ascii=False))

    def line(self, text: str) -> None:
        """A line of the answer for a reader."""
        self.out.print(text, soft_wrap=True)

    def text(self, text: str) -> None:
        """Part of the answer, as it is."""
        click.echo(text, nl=not text.endswith("\n"))

    def say(self, text: str) -> None:
        """A word by the way."""
        self.err.print(text, soft_wrap=True)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.out.print(table)

    def error(self, error: BurnishError) -> None:
        """What went wrong, where, and what to do; with --json also as the answer."""
        self.say(f"[bold red]Error:[/] {escape(error.detail)}")
        for found in error.errors:
            self.say(f"  [bold]{escape(found.location or 'here')}[/]: {escape(found.message)}")
        if error.hint:
            self.say(f"[dim]{escape(error.hint)}[/]")
        if self.as_json:
            places = [found.model_dump() for found in error.errors]
            told = {"code": error.code, "detail": error.detail, "hint": error.hint, "errors": places}
            self.document({"error": told, **_ended_job(error)})

    # ------------------------------------------------------------ a job

    def job(self, job: Job, artifacts: Sequence[Artifact] = ()) -> None:
        """One job for a reader, with its stages, and its files if there are any."""
        facts = [
            ("job", f"[bold]{job.id}[/]"),
            ("name", escape(job.name)),
            ("url", escape(job.url)),
            ("status", status_text(job)),
            ("reason", reason_text(job.state_reason)),
            ("verdict", colour(job.verdict)),
            ("headline", escape(job.headline or "")),
            *(("warning", escape(warning)) for warning in job.warnings),
            ("attempt", f"{job.attempt} of {job.max_attempts}" if job.attempt > 1 else ""),
            ("repeats", str(job.retry_of or "")),
            ("tags", escape(", ".join(job.tags))),
            ("submitted", moment(job.created_at)),
            ("started", moment(job.started_at)),
            ("finished", moment(job.finished_at)),
        ]
        for name, value in facts:
            if value:
                self.line(f"{name:<10} {value}")
        self.line("")
        self.table(
            ["stage", "kind", "status", "progress", "message"],
            [
                [str(s.position), s.kind, colour(s.status), f"{s.progress:.0%}", escape(s.message or "")]
                for s in job.stages
            ],
        )
        if artifacts:
            self.line("")
            self.table(
                ["file", "role", "stage", "size", "sha256"],
                [
                    [escape(a.name), a.role, "" if a.stage is None else str(a.stage), size(a.size_bytes), a.sha256]
                    for a in artifacts
                ],
            )


def status_text(job: Job) -> str:
    """A job's status in a few words: what runs, and whether it is to be cancelled."""
    text = colour(job.status)
    running = next((stage for stage in job.stages if stage.status == "running"), None)
    if running is not None:
        text += f": stage {running.position} ({running.kind}) {running.progress:.0%}"
    if job.cancel_requested_at is not None and job.status == "running":
        text += ", to be cancelled"
    return text


def note_text(note: Note) -> str:
    """Advice, with the place that it is about."""
    return f"[yellow]note[/] on {escape(note.location)}: {escape(note.message)}"


def reason_text(reason: StateReason | None) -> str:
    if reason is None:
        return ""
    return escape(f"{reason.message} {reason.hint}" if reason.hint else reason.message)


def colour(word: str | None) -> str:
    """A status or verdict in its colour; nothing for None."""
    if word is None:
        return ""
    style = COLOURS.get(word)
    return f"[{style}]{word}[/]" if style else word


def moment(at: datetime | None) -> str:
    return "" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def age(at: datetime) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0.0, (datetime.now(UTC) - at).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"


def _plain(document: Any) -> Any:
    if isinstance(document, BaseModel):
        return document.model_dump(mode="json")
    if isinstance(document, list):
        return [_plain(item) for item in document]
    return document


def _ended_job(error: BurnishError) -> dict[str, Any]:
    job = getattr(error, "job", None)
    return {} if job is None else {"job": _plain(job.view)}
