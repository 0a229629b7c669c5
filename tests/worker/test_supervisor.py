"""What the supervisor does when something dies, is cancelled, takes too long, or lies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, update

from burnish.local.apps import environment_of
from shared import lifecycle
from shared.db import make_sessions, transaction
from shared.errors import LeaseLost
from shared.ledger import Reason
from shared.models import Job
from shared.report import Report, StageReport
from tests.worker.workshop import BRIEF, Workshop, children, wait_until
from worker import wire
from worker.custody import Custody, Forged

LONG = {"runs": 2000, "warm_up": 1, "batches": [1]}  # so that a stage can be met in its middle


def test_a_killed_child_resumes_after_the_last_finished_stage(workshop: Workshop) -> None:
    job_id = workshop.submit(**workshop.brief(benchmark=LONG))
    _, thread = workshop.start()
    workshop.wait_for_event(job_id, "stage_started", stage=1)
    [child] = [process for process in children(job_id) if "worker.child" in process.cmdline()]
    child.kill()
    thread.join(timeout=30)

    job = workshop.job(job_id)
    assert (job.status, job.crashes, job.attempt) == ("queued", 1, 1)
    assert [stage.status for stage in workshop.stages(job_id)] == ["succeeded", "pending"]
    requeued = workshop.wait_for_event(job_id, "requeued")
    assert requeued.data["message"].startswith("The job's process ended in stage 1: SIGKILL")

    assert workshop.work() == "succeeded", workshop.job(job_id).state_reason
    events = [event for event in workshop.events(job_id) if event.kind == "stage_started"]
    started = [(event.attempt, event.data["stage"]) for event in events]
    assert started == [(1, 0), (1, 1), (2, 1)]
    report = Report.model_validate(workshop.job(job_id).report)
    assert [stage.status for stage in report.stages] == ["succeeded"] * 2
    assert sum(event.kind == "baseline_measured" for event in workshop.events(job_id)) == 1
    assert {"attempt-1.log", "attempt-2.log"} <= {artifact.name for artifact in workshop.artifacts(job_id)}


def test_a_child_that_dies_twice_without_progress_is_quarantined(workshop: Workshop) -> None:
    job_id = workshop.submit()
    for attempt in (1, 2):
        _, thread = workshop.start()
        child = wait_until(lambda: next(iter(children(job_id)), None), f"the child of attempt {attempt}")
        child.kill()
        thread.join(timeout=30)
    job = workshop.job(job_id)
    assert job.state_reason is not None
    assert (job.status, job.state_reason["code"]) == ("failed", "quarantined")


def test_a_cancel_in_mid_stage_ends_in_cancelled_with_no_process_left(workshop: Workshop) -> None:
    job_id = workshop.submit(**workshop.brief(benchmark={**LONG, "runs": 10_000}))
    settings = workshop.settings.model_copy(update={"heartbeat_seconds": 0.1})
    workshop.tools = replace(workshop.tools, settings=settings)
    _, thread = workshop.start()
    workshop.wait_for_event(job_id, "stage_started", stage=1)
    assert lifecycle.cancel(workshop.sessions, workshop.account_id, job_id) == "running"
    wait_until(lambda: workshop.job(job_id).status == "cancelled", "the cancel", timeout_seconds=2.0)
    thread.join(timeout=10)
    assert children(job_id) == []
    assert [stage.status for stage in workshop.stages(job_id)] == ["succeeded", "skipped"]
    assert not list((workshop.directory / "work").iterdir())


def test_a_job_past_its_time_limit_fails_and_says_so(workshop: Workshop) -> None:
    job_id = workshop.submit(timeout_seconds=0.5)
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert (reason["code"], reason["fault"]) == ("timeout", "user")


def test_a_silent_child_is_taken_for_dead(workshop: Workshop) -> None:
    job_id = workshop.submit()
    settings = workshop.settings.model_copy(update={"stall_seconds": 0.2})
    workshop.tools = replace(workshop.tools, settings=settings)
    assert workshop.work() == "queued"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert "gave no sign of life" in reason["message"]


def test_a_worker_that_is_told_to_stop_gives_the_job_back_without_burning_an_attempt(workshop: Workshop) -> None:
    job_id = workshop.submit(**workshop.brief())
    _, thread = workshop.start()
    workshop.wait_for_event(job_id, "stage_started", stage=0)
    workshop.draining.set()
    thread.join(timeout=60)
    job = workshop.job(job_id)
    assert (job.status, job.attempt, job.max_attempts, job.crashes) == ("queued", 1, 4, 0)
    assert workshop.stages(job_id)[0].status == "succeeded"
    workshop.draining.clear()
    assert workshop.work() == "succeeded"


def test_a_draining_worker_does_not_wait_for_a_long_stage(workshop: Workshop) -> None:
    job_id = workshop.submit()
    settings = workshop.settings.model_copy(update={"drain_seconds": 0.1})
    workshop.tools = replace(workshop.tools, settings=settings)
    workshop.draining.set()
    assert workshop.work() == "queued"
    assert [stage.status for stage in workshop.stages(job_id)] == ["pending"] * 3


def test_a_worker_that_lost_its_lease_stops_its_child_and_writes_nothing(workshop: Workshop) -> None:
    job_id = workshop.submit(**workshop.brief())
    claim, thread = workshop.start()
    workshop.wait_for_event(job_id, "stage_started", stage=0)
    reason = Reason("worker_lost", "taken over")
    lifecycle.requeue(workshop.sessions, claim.lease, reason, cause="lost")
    thread.join(timeout=30)
    assert children(job_id) == []
    job = workshop.job(job_id)
    assert (job.status, job.last_sequence) == ("queued", len(workshop.events(job_id)))
    assert workshop.events(job_id)[-1].kind == "requeued"
    assert workshop.artifacts(job_id) == [] or workshop.artifacts(job_id)[-1].stage_position is not None


def test_a_worker_cut_off_from_the_database_stops_its_child_before_the_lease_lapses(workshop: Workshop) -> None:
    job_id = workshop.submit(**workshop.brief())
    settings = workshop.settings.model_copy(update={"lease_seconds": 4.0})
    workshop.tools = replace(workshop.tools, settings=settings)
    _, thread = workshop.start()
    workshop.wait_for_event(job_id, "stage_started", stage=0)
    with transaction(workshop.sessions) as session:
        # Whoever holds the row keeps every heartbeat waiting, as a database that does not answer would.
        session.execute(update(Job).where(Job.id == job_id).values(priority=1))
        thread_children = children(job_id)
        wait_until(lambda: not children(job_id), "the child's end", timeout_seconds=4.0)
    thread.join(timeout=30)
    assert thread_children
    assert workshop.job(job_id).status == "running"  # the sweeper's to requeue, once the lease has lapsed


def test_a_cancelled_attempt_that_can_write_nothing_is_given_up_with_its_lease(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workshop.submit(**workshop.brief())
    settings = workshop.settings.model_copy(update={"lease_seconds": 4.0, "lock_seconds": 0.2})
    impatient = make_sessions(settings)
    workshop.tools = replace(workshop.tools, settings=settings, sessions=impatient, pulse=impatient)
    at_its_end, writes = threading.Event(), threading.Event()

    def reach(point: str) -> None:
        if point == "ending.stored":
            at_its_end.set()
            assert writes.wait(30)

    monkeypatch.setattr("worker.supervisor.reach", reach)
    _, thread = workshop.start()
    workshop.wait_for_event(job_id, "stage_started", stage=0)
    lifecycle.cancel(workshop.sessions, workshop.account_id, job_id)
    assert at_its_end.wait(30)
    with transaction(workshop.sessions) as session:
        session.execute(update(Job).where(Job.id == job_id).values(priority=1))
        writes.set()
        thread.join(timeout=30)
        assert not thread.is_alive()
    impatient.kw["bind"].dispose()
    assert workshop.job(job_id).status == "running"
    sweep(workshop)
    assert workshop.job(job_id).status == "cancelled"


def test_a_worker_that_may_start_no_more_threads_leaves_its_job_to_the_next(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workshop.submit(**workshop.brief())
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "_guard":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            workshop.work()
    assert not {"_run", "_tell"} & {thread.name for thread in threading.enumerate()}, "or the lease would never lapse"
    sweep(workshop)
    assert workshop.job(job_id).status == "queued"
    assert workshop.work() == "succeeded"


def sweep(workshop: Workshop) -> None:
    """As if the lease of the one job that runs had lapsed by now."""
    with transaction(workshop.sessions) as session:
        session.execute(update(Job).values(lease_expires_at=func.now() - timedelta(seconds=1)))
    assert lifecycle.sweep_leases(workshop.sessions) == 1


SUPERVISE = """
import threading
from dataclasses import replace
from shared import lifecycle
from shared.db import make_sessions
from shared.ledger import Capacity
from shared.settings import get_settings
from shared.storage import Storage
from worker.environment import capabilities
from worker.supervisor import Tools, supervise

settings = get_settings()
sessions = make_sessions(settings)
claim = lifecycle.claim(sessions, Capacity("w", ["default"], capabilities(), 2**40), settings.lease_seconds)
supervise(claim, Tools(settings, sessions, sessions, Storage(settings), 1, 8 * 2**30), threading.Event())
"""


def test_a_child_does_not_outlive_its_killed_supervisor(workshop: Workshop) -> None:
    job_id = workshop.submit(**workshop.brief())
    environment = {**os.environ, **environment_of(workshop.settings), "PYTHONPATH": str(Path.cwd())}
    environment["BURNISH_WORK_DIRECTORY"] = str(workshop.directory / "work")
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISE], env=environment)
    workshop.wait_for_event(job_id, "stage_started", stage=0)
    assert children(job_id)
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.wait()
    wait_until(lambda: not children(job_id), "the child's end", timeout_seconds=2.0)


def test_the_child_has_no_credentials_and_no_network(workshop: Workshop) -> None:
    job_id = workshop.submit(**workshop.brief())
    _, thread = workshop.start()
    child = wait_until(lambda: next(iter(children(job_id)), None), "the child")
    environment = wait_until(child.environ, "the child's environment")
    workshop.wait_for_event(job_id, "stage_started", stage=0)
    interfaces = Path(f"/proc/{child.pid}/net/dev").read_text(encoding="utf-8")
    routes = Path(f"/proc/{child.pid}/net/route").read_text(encoding="utf-8").splitlines()[1:]
    lifecycle.cancel(workshop.sessions, workshop.account_id, job_id)
    thread.join(timeout=30)
    assert not [name for name in environment if "SECRET" in name or "URL" in name or "KEY" in name]
    assert "eth" not in interfaces
    assert routes == []


def test_the_child_cannot_look_into_another_process_of_its_user() -> None:
    script = (
        "import os; from pathlib import Path; from worker.child import leave_network; "
        "assert Path(f'/proc/{os.getppid()}/environ').read_bytes(); assert leave_network(); "
        "Path(f'/proc/{os.getppid()}/environ').read_bytes()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- a child that lies


def test_a_file_outside_of_the_jobs_directory_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    workshop.submit()
    custody = Custody(workshop.claim(), workshop.storage, workshop.sessions, tmp_path / "job")
    (tmp_path / "job").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "job" / "link").symlink_to(tmp_path / "secret")
    for path in (Path("../secret"), Path("link"), tmp_path / "secret", Path("nothing")):
        with pytest.raises(Forged, match="not a plain file of the job's directory"):
            custody.store(finished_stage(path))


def test_a_forged_report_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = workshop.submit(**workshop.brief(stages=BRIEF[:1]))
    parse = wire.parse

    def forge(line: bytes) -> wire.Said:
        said = parse(line)
        if isinstance(said, wire.Finished):
            return wire.Finished(report=said.report.model_copy(update={"stages": []}))
        return said

    monkeypatch.setattr(wire, "parse", forge)
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert (reason["code"], reason["fault"]) == ("protocol_broken", "platform")
    assert workshop.job(job_id).report is None


@pytest.mark.parametrize("line", [b"garbage", b"{}", b'{"kind":"finished"}', b'{"kind":"progressed","fraction":7}'])
def test_a_line_that_is_none_of_the_protocol_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="validation error"):
        wire.parse(line)


def test_a_report_that_does_not_judge_by_its_own_figures_is_refused(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    goals = [{"metric": "dice", "kind": "threshold", "value": 1.0}]
    stages = [{**BRIEF[0], "on_miss": "continue"}]
    job_id = workshop.submit(**workshop.brief(stages=stages, goals=goals))
    parse = wire.parse

    def flatter(line: bytes) -> wire.Said:
        said = parse(line)
        if isinstance(said, wire.Finished):
            return wire.Finished(report=said.report.model_copy(update={"verdict": "met"}))
        return said

    monkeypatch.setattr(wire, "parse", flatter)
    assert workshop.work() == "failed"
    reason = workshop.job(job_id).state_reason
    assert reason is not None
    assert reason["message"].endswith("its report does not judge by its own figures")


def test_files_under_names_of_another_stage_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    workshop.submit()
    custody = Custody(workshop.claim(), workshop.storage, workshop.sessions, tmp_path)
    (tmp_path / "model.onnx").write_text("model")
    said = finished_stage(Path("model.onnx"))
    stolen = said.files[0].model_copy(update={"name": "1-quantize.onnx"})
    for files in ([stolen], [said.files[0], said.files[0]]):
        with pytest.raises(Forged, match="not names of stage 0's own files"):
            custody.store(said.model_copy(update={"files": files}))


def finished_stage(path: Path) -> wire.StageFinished:
    report = StageReport(position=0, kind="export_onnx", status="succeeded", seconds=0)
    file = wire.File(role="model", name="0-export_onnx.onnx", format="onnx", path=path)
    return wire.StageFinished(report=report, files=[file])


def test_two_workers_run_two_jobs_at_the_same_time(workshop: Workshop) -> None:
    jobs = [workshop.submit(**workshop.brief(stages=BRIEF[:1])) for _ in range(2)]
    threads = [workshop.start()[1] for _ in jobs]
    for thread in threads:
        thread.join(timeout=120)
    assert [workshop.job(job_id).status for job_id in jobs] == ["succeeded"] * 2


def test_a_stale_worker_hears_that_it_was_replaced(workshop: Workshop) -> None:
    workshop.submit()
    claim = workshop.claim()
    lifecycle.requeue(workshop.sessions, claim.lease, Reason("worker_lost", "taken over"), cause="lost")
    with pytest.raises(LeaseLost):
        lifecycle.start_stage(workshop.sessions, claim.lease, 0)
    assert threading.active_count() >= 1
