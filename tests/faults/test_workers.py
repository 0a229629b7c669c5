"""A worker is killed, stopped, asked to stop or left behind: its jobs go on elsewhere, and it harms none of them."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import psutil
import pytest

from burnish.local.apps import environment_of
from shared.models import Job
from tests.faults.ground import HERE, Ground, child_of, children, reached, suspended, wait_until

ROOT = HERE.parents[1]


@pytest.mark.fault(2, "kill -9 the supervisor")
def test_a_killed_supervisors_child_dies_and_its_job_goes_on(ground: Ground, tmp_path: Path) -> None:
    expected = ground.faultless_result()
    gate = tmp_path / "gate"
    job_id = ground.submit(f"wait 1 {gate}")
    worker = ground.start_worker()
    reached(gate)
    worker.kill()
    worker.wait()
    wait_until(lambda: not children(job_id), "the child's end", timeout_seconds=2.0)
    gate.unlink()
    assert ground.sweep() == 0
    lease_seconds = ground.settings.lease_seconds
    ground.execute("UPDATE jobs SET lease_expires_at = lease_expires_at - make_interval(secs => :s)", s=lease_seconds)
    assert ground.sweep() == 1
    assert ground.job(job_id).status == "queued"
    assert ground.reason(job_id)["code"] == "worker_lost"
    again = ground.start_work()
    reached(gate).unlink()
    again.join()
    assert ground.job(job_id).status == "succeeded"
    assert ground.result(job_id) == expected


@pytest.mark.fault(3, "kill -9 the whole worker tree")
def test_a_killed_tree_leaves_a_job_that_needs_nothing_of_the_broker(ground: Ground, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job_id = ground.submit(f"wait 1 {gate}")
    worker = ground.start_worker()
    reached(gate)
    tree = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]
    assert len(tree) == 2
    for process in tree:
        process.kill()
    worker.wait()
    gate.unlink()
    # The next one has another broker, in which nothing unacknowledged lies.
    elsewhere = ground.settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    ground.start_worker(settings=elsewhere)
    take_back(ground, job_id)
    reached(gate).unlink()
    assert ground.wait_for(job_id).status == "succeeded"


@contextmanager
def attempts(ground: Ground, within: Sequence[str] = ()) -> Iterator[Callable[[str], int]]:
    """Carries out one attempt after the other, each in a process of its own with these fault points armed.

    `within` is a command that runs another one.
    """
    given = {**os.environ, **environment_of(ground.settings)}
    command = [*within, sys.executable, str(HERE / "tiny_attempts.py")]
    with (
        (ground.directory / "processes.log").open("ab") as log,
        subprocess.Popen(
            command, env=given, cwd=ground.directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def carry_out(faults: str) -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(faults.encode() + b"\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            ground.has_killed |= code == -signal.SIGKILL
            return code

        yield carry_out
        process.stdin.close()


def take_back(ground: Ground, job_id: UUID) -> None:
    """Have the dead worker's job be due again, as its lease's end and the sweeper would have it a little later."""
    wait_until(lambda: not children(job_id), "the child's end")
    ground.execute("UPDATE jobs SET lease_expires_at = now() WHERE status = 'running'")
    ground.sweep()
    ground.execute("UPDATE jobs SET available_at = now() WHERE status = 'queued'")


@pytest.mark.fault(5, "SIGSTOP the supervisor past its lease, then SIGCONT")
def test_a_worker_that_wakes_after_its_lease_changes_nothing(ground: Ground, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job_id = ground.submit(f"wait 1 {gate}")
    worker = ground.start_worker(f"stage.stored=wait:{tmp_path / 'stored'}")
    stored = reached(tmp_path / "stored")  # the files of stage 0 are in storage, its end is not told
    with suspended(psutil.Process(worker.pid)):
        stored.unlink()
        ground.execute("UPDATE jobs SET lease_expires_at = now()")
        wait_until(lambda: ground.sweep() == 1, "the lease to lapse")
        again = ground.start_work(ground.tools(lease_seconds=60.0))
        reached(gate)
        before = ground.job(job_id).last_sequence
    wait_until(lambda: len(children(job_id)) == 1, "the sleeper to end its child")
    wait_until(lambda: "attempt_ended" in ground.log(), "the sleeper to give up")
    told = [event for event in ground.events(job_id) if event.sequence > before]
    assert {event.attempt for event in told} <= {2}
    gate.unlink()
    again.join()
    assert ground.job(job_id).status == "succeeded"
    finished = [(event.attempt, event.data["stage"]) for event in ground.events(job_id, "stage_finished")]
    assert finished == [(2, 0), (2, 1)]


@pytest.mark.fault(11, "SIGTERM with 1 running and 3 queued")
def test_a_stopping_worker_claims_nothing_and_gives_back_what_it_runs(ground: Ground, tmp_path: Path) -> None:
    expected = ground.faultless_result()
    gate = tmp_path / "gate"
    running = ground.submit(f"wait 0 {gate}", priority=1)
    queued = [ground.submit() for _ in range(3)]
    worker = ground.start_worker()
    reached(gate)
    worker.terminate()
    wait_until(lambda: '"told_to_stop"' in ground.log(), "the worker to hear it")
    gate.unlink()
    assert worker.wait(timeout=60) == 0
    job = ground.job(running)
    assert (job.status, job.attempt, job.max_attempts, job.crashes) == ("queued", 1, 4, 0)
    assert [stage.status for stage in ground.stages(running)] == ["succeeded", "pending"]
    assert [ground.job(job_id).attempt for job_id in queued] == [0, 0, 0]
    assert ground.workers() == []

    ground.start_worker()
    for job_id in (running, *queued):
        assert ground.wait_for(job_id).status == "succeeded"
        assert ground.result(job_id) == expected
    assert [event.data["stage"] for event in ground.events(running, "stage_started")] == [0, 1]


@pytest.mark.fault(11, "SIGTERM with 1 running and 3 queued")
def test_a_rolling_restart_under_load_loses_no_finished_epoch(ground: Ground, tmp_path: Path) -> None:
    tallies = {}
    for number in range(6):
        tally = tmp_path / f"tally-{number}"
        script = f"epochs 0 30 0.05; tally 0 {tally}; epochs 1 2; tally 1 {tally}"
        tallies[ground.submit(script)] = tally

    def training(worker_id: str) -> Job | None:
        """The job of that worker, if it has epochs that could be lost and most are still to come."""
        begun = (job_id for job_id, tally in tallies.items() if tally.exists() and num_lines(tally) <= 5)
        return next((job for job in map(ground.job, begun) if job.worker_id == worker_id), None)

    workers = [ground.start_worker(BURNISH_DRAIN_SECONDS="60") for _ in range(2)]
    for worker in workers:
        worker_id = f"{platform.node()}:{worker.pid}"
        job = wait_until(lambda: training(worker_id), f"{worker_id} to train")  # noqa: B023
        worker.terminate()
        assert worker.wait(timeout=60) == 0
        told = [event for event in ground.events(job.id) if event.attempt == job.attempt]
        assert [event.data["cause"] for event in told if event.kind == "requeued"] == ["given_back"]
        assert "stage_finished" not in {event.kind for event in told}  # a checkpoint is enough
        ground.start_worker(BURNISH_DRAIN_SECONDS="60")
    for job_id, tally in tallies.items():
        assert ground.wait_for(job_id).status == "succeeded"
        assert ground.job(job_id).crashes == 0
        assert {event.data["cause"] for event in ground.events(job_id, "requeued")} <= {"given_back"}
        each_once = [*(f"0 {epoch}" for epoch in range(1, 31)), "1 1", "1 2"]
        assert tally.read_text(encoding="utf-8").splitlines() == each_once


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


@pytest.mark.fault(12, "SIGTERM twice, SIGQUIT, SIGINT during settle")
@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGQUIT,), (signal.SIGINT,)],
    ids=lambda numbers: "-".join(number.name for number in numbers),
)
def test_a_worker_told_to_stop_while_it_settles_settles_once(
    ground: Ground, tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    job_id = ground.submit()
    worker = ground.start_worker(f"ending.stored=wait:{tmp_path / 'ending'}")
    ending = reached(tmp_path / "ending")
    for times, number in enumerate(numbers, start=1):
        worker.send_signal(number)
        wait_until(lambda: ground.log().count('"told_to_stop"') == times, "the worker to hear it")  # noqa: B023
    ending.unlink()
    assert worker.wait(timeout=60) == 0
    assert ground.job(job_id).status == "succeeded"
    assert ground.workers() == []


@pytest.mark.fault(12, "SIGTERM twice, SIGQUIT, SIGINT during settle")
def test_a_worker_told_twice_does_not_wait_for_the_stage(ground: Ground, tmp_path: Path) -> None:
    job_id = ground.submit(f"wait 1 {tmp_path / 'gate'}")
    worker = ground.start_worker(BURNISH_DRAIN_SECONDS="600")
    gate = reached(tmp_path / "gate")
    for number in (signal.SIGTERM, signal.SIGINT):
        worker.send_signal(number)
    assert worker.wait(timeout=60) == 0
    gate.unlink()
    job = ground.job(job_id)
    assert (job.status, job.attempt, job.max_attempts) == ("queued", 1, 4)
    assert children(job_id) == []
    again = ground.start_work()
    reached(gate).unlink()
    again.join()
    assert ground.job(job_id).status == "succeeded"


@pytest.mark.fault(13, "an old worker meets a stage kind it does not know")
def test_a_job_that_no_worker_knows_waits_and_says_why(ground: Ground) -> None:
    job_id = ground.submit()
    ground.execute("UPDATE jobs SET requires = requires || ARRAY['stage:anneal'] WHERE id = :id", id=job_id)
    ground.start_worker()
    known = ground.submit()
    assert ground.wait_for(known).status == "succeeded"
    ground.sweep()
    job = ground.job(job_id)
    assert (job.status, job.attempt) == ("queued", 0)
    assert ground.reason(job_id)["code"] == "no_capable_worker"
    assert "lacks stage:anneal" in ground.reason(job_id)["message"]


@pytest.mark.fault(14, "worker's clock ±10 min")
@pytest.mark.parametrize("shift_seconds", [-600, 600])
def test_a_worker_with_a_wrong_clock_works_as_any_other(ground: Ground, tmp_path: Path, shift_seconds: int) -> None:
    shift = tmp_path / "sitecustomize.py"
    shift.write_text(SHIFTED_CLOCK.format(shift_seconds=shift_seconds), encoding="utf-8")
    gate = tmp_path / "gate"
    job_id = ground.submit(f"wait 1 {gate}")
    ground.start_worker(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    reached(gate)
    beats = ground.job(job_id).lease_expires_at
    assert beats is not None
    wait_until(lambda: (ground.job(job_id).lease_expires_at or beats) > beats, "a heartbeat")
    assert ground.sweep() == 0
    gate.unlink()
    assert ground.wait_for(job_id).status == "succeeded"
    [attempt] = ground.events(job_id, "claimed")
    assert abs((attempt.at - ground.job(job_id).created_at).total_seconds()) < 60
    assert "clock is shifted" in ground.log()


# What every process of Python runs first: `time` and `datetime` as on a machine whose clock is wrong.
SHIFTED_CLOCK = '''
import datetime, sys, time

right = time.time
time.time = lambda: right() + {shift_seconds}
time.time_ns = lambda: int(time.time() * 1e9)


class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls):
        return cls.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)


datetime.datetime = Shifted
print("clock is shifted by", round(time.time() - right()), file=sys.stderr, flush=True)
'''


def test_the_child_of_a_killed_worker_is_not_left_as_a_directory(ground: Ground, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job_id = ground.submit(f"wait 0 {gate}")
    worker = ground.start_worker()
    reached(gate)
    assert child_of(job_id)
    worker.kill()
    worker.wait()
    wait_until(lambda: not children(job_id), "the child's end")
    assert list((tmp_path / "work").iterdir())
    ground.execute("UPDATE jobs SET available_at = now() + interval '1 hour'")
    ground.start_worker()
    wait_until(lambda: not list((tmp_path / "work").iterdir()), "the next worker to clear up")
    ground.execute("UPDATE jobs SET lease_expires_at = now(), available_at = now()")
    gate.unlink()
