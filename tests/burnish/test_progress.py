"""What is shown while a job runs and while files are sent."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from rich.console import Console

from burnish.progress import BASELINE, Board, receiving, sending, watching
from burnish.screen import age, size
from shared.recipe import Recipe
from shared.schemas import Event, Job, StageView
from tests.burnish.workbench import RECIPE

AT = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
ID = UUID("01990000-0000-7000-8000-000000000001")


def a_job() -> Job:
    ids = {"source": {**RECIPE["source"], "weights": str(ID)}, "data": {"artifact": str(ID)}}
    recipe = Recipe.model_validate({**RECIPE, **ids})
    pending: dict[str, Any] = dict.fromkeys(("attempt", "message", "started_at", "finished_at"))
    stages = [
        StageView(position=position, kind=stage.kind, status="pending", progress=0.0, **pending)
        for position, stage in enumerate(recipe.stages)
    ]
    nothing: dict[str, Any] = dict.fromkeys(
        ("state_reason", "verdict", "retry_of", "cancel_requested_at", "started_at", "finished_at")
    )
    return Job(
        id=ID, url=f"http://here/v1/jobs/{ID}", name="unet [T1]", tags=[], status="queued", attempt=0, max_attempts=3,
        priority=0, queue="default", created_at=AT, last_sequence=1, stages=stages, recipe=recipe, **nothing,
    )


def tell(board: Board, *told: tuple[str, dict[str, Any]], attempt: int = 1) -> list[str | None]:
    events = [
        Event(sequence=number, at=AT + timedelta(seconds=number), attempt=attempt, kind=kind, data=data)
        for number, (kind, data) in enumerate(told, 1)
    ]
    return [board.take(event) for event in events]


def terminal(is_terminal: bool = True) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=is_terminal, width=120, color_system=None, highlight=False), out


@pytest.fixture
def board() -> Board:
    return Board(a_job())


STARTED = [("claimed", {"worker": "w1"}), ("baseline_measured", {}), ("stage_started", {"stage": 0})]


def test_a_stage_runs_from_its_start_to_its_end(board: Board) -> None:
    tell(board, *STARTED)
    assert [row.status for row in board.rows.values()] == ["succeeded", "running", "pending", "pending"]

    tell(board, ("stage_finished", {"stage": 0, "status": "dropped", "reason": "Dice fell by 0.2"}))
    assert (board.rows[0].status, board.rows[0].message) == ("dropped", "Dice fell by 0.2")


def test_progress_without_a_stage_is_the_baselines(board: Board) -> None:
    tell(board, STARTED[0], ("progress", {"stage": None, "fraction": 0.5, "message": "measuring"}))
    assert (board.rows[BASELINE].fraction, board.rows[BASELINE].message) == (0.5, "measuring")


def test_progress_is_a_line_only_when_it_says_something_new(board: Board) -> None:
    steps = [0.1, 0.2, 0.24, 0.26, 0.3, 0.9]
    told = tell(board, *[("progress", {"stage": 0, "fraction": step, "message": "tuning"}) for step in steps])
    assert told == [
        "stage 0 (export_onnx) 10% tuning", None, None, "stage 0 (export_onnx) 26% tuning", None,
        "stage 0 (export_onnx) 90% tuning",
    ]


def test_progress_that_comes_after_the_end_is_not_told(board: Board) -> None:
    late = ("progress", {"stage": 0, "fraction": 0.6, "message": "checking"})
    told = tell(board, *STARTED, ("stage_finished", {"stage": 0, "status": "succeeded"}), late)
    assert told[-1] is None
    assert board.rows[0].fraction == 1.0


def test_a_requeued_job_starts_its_running_stage_again(board: Board) -> None:
    told = tell(board, *STARTED, ("requeued", {"cause": "lost", "message": "The worker stopped answering."}))
    assert told[-1] == "attempt 1 ended, the job waits for another: The worker stopped answering."
    assert (board.status, board.rows[0].status, board.rows[BASELINE].status) == ("queued", "pending", "succeeded")

    tell(board, ("claimed", {"worker": "w2"}), ("stage_started", {"stage": 0}), attempt=2)
    assert (board.status, board.rows[0].status) == ("running", "running")


def test_a_failed_job_fails_its_stage_and_skips_the_rest(board: Board) -> None:
    tell(board, *STARTED, ("failed", {"stage": 0, "message": "The model has no batch."}))
    assert [row.status for row in board.rows.values()] == ["succeeded", "failed", "skipped", "skipped"]
    assert board.reason == "The model has no batch."


def test_a_job_that_fails_before_its_first_stage_fails_at_the_baseline(board: Board) -> None:
    tell(board, STARTED[0], ("failed", {"message": "The weights do not fit."}))
    assert [row.status for row in board.rows.values()] == ["failed", "skipped", "skipped", "skipped"]


def test_a_job_that_waits_says_why_and_that_it_no_longer_does(board: Board) -> None:
    reason = {"code": "no_worker", "message": "No worker is alive."}
    assert tell(board, ("waiting", reason), ("waiting", {})) == ["waiting: No worker is alive.", "waiting for a worker"]


def test_the_end_tells_the_verdict(board: Board) -> None:
    assert tell(board, ("succeeded", {"verdict": "met"})) == ["succeeded: verdict met"]
    assert tell(board, ("cancelled", {}))[0] == "cancelled"


def test_an_event_of_a_later_version_is_no_error(board: Board) -> None:
    assert tell(board, ("polished", {"by": "hand"}), ("log", {"text": "line"}), ("stage_started", {"stage": 9})) == [
        None, None, None,
    ]


def test_a_terminal_shows_one_table_that_lives() -> None:
    console, out = terminal()
    with watching(a_job(), console) as on_event:
        for number, (kind, data) in enumerate([*STARTED, ("succeeded", {"verdict": "met"})]):
            on_event(Event(sequence=number, at=AT, attempt=1, kind=kind, data=data))

    shown = out.getvalue()
    assert "unet [T1] succeeded: verdict met" in shown
    assert f"http://here/v1/jobs/{ID}" in shown
    assert "build_engine" in shown


def test_a_pipe_gets_a_line_for_each_event() -> None:
    console, out = terminal(is_terminal=False)
    with watching(a_job(), console) as on_event:
        for number, (kind, data) in enumerate(STARTED):
            on_event(Event(sequence=number, at=AT, attempt=1, kind=kind, data=data))

    assert out.getvalue().splitlines() == [
        "attempt 1 started on w1", "baseline measured", "stage 0 (export_onnx) started",
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_files_are_shown_as_they_are_sent(is_terminal: bool) -> None:
    console, out = terminal(is_terminal)
    path, known = Path("weights.safetensors"), Path("data.zip")
    with sending(console) as on_bytes:
        for doing in ("hashing", "sending"):
            for done in (1000, 2000):
                on_bytes(path, doing, done, 2000)
        on_bytes(known, "hashing", 10, 10)

    assert "sending weights.safetensors" in out.getvalue()
    assert "data.zip was uploaded before" in out.getvalue()


def test_a_download_is_shown_on_a_terminal_alone() -> None:
    for is_terminal in (True, False):
        console, out = terminal(is_terminal)
        with receiving("engine.zip", console) as on_bytes:
            on_bytes(10, 10)
        assert ("receiving engine.zip" in out.getvalue()) == is_terminal


def test_sizes_and_ages_are_told_in_fitting_units() -> None:
    assert [size(n) for n in (999, 1000, 1_500_000, 2_500_000_000)] == ["999 B", "1 kB", "1.5 MB", "2.5 GB"]
    now = datetime.now(UTC)
    assert [age(now - timedelta(seconds=n)) for n in (-5, 61, 7200, 200_000)] == ["0 s", "1 min", "2 h", "2 d"]
