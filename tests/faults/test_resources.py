"""A machine runs out of disk or of open files: its jobs are told why, go on elsewhere, and nothing half is read."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from functools import cache
from pathlib import Path
from uuid import UUID

import psutil
import pytest

from shared.models import JobEvent
from tests.faults.ground import TINY_WORKER, Ground, wait_until
from tests.faults.test_workers import attempts

MIB = 2**20
FULL = ("No space left on device", "File too large")
ON_SMALL_DISK = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'
IN_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_SMALL_DISK, "sh")
WITH_SMALL_FILES = ("sh", "-c", 'ulimit -f "$1" && shift && exec "$@"', "sh")


# ---------------------------------------------------------------- 40: no disk


@cache
def is_mountable() -> bool:
    """Whether anybody may have a mount namespace here."""
    tried = [*IN_NAMESPACE, "16m", "/mnt", "true"]
    return shutil.which("unshare") is not None and subprocess.run(tried, check=False).returncode == 0


def small_disk(size_bytes: int, directory: Path) -> list[str]:
    """Runs a command where `directory` is a disk of that size, or else where no file may be larger."""
    directory.mkdir(exist_ok=True)
    if is_mountable():
        return [*IN_NAMESPACE, str(size_bytes), str(directory)]
    return [*WITH_SMALL_FILES, str(size_bytes // 512)]


def due_again(ground: Ground, job_id: UUID) -> JobEvent:
    """How the job's attempt ended, which must be by a requeue; the next one need not wait."""
    ground.execute("UPDATE jobs SET available_at = now() WHERE status = 'queued'")
    assert ground.job(job_id).status == "queued", ground.reason(job_id)
    return ground.events(job_id, "requeued")[-1]


@pytest.mark.fault(40, f"work directory full ({'16 MB tmpfs' if is_mountable() else 'a limit of 16 MB a file'})")
def test_a_full_work_directory_is_told_and_no_half_checkpoint_is_read(ground: Ground) -> None:
    script = f"epochs 0 4; large 0 {6 * MIB}"  # so large is the first epoch's checkpoint, and twice that the second's
    undisturbed = ground.submit(script)
    assert ground.work() == "succeeded"
    job_id = ground.submit(script)

    with attempts(ground, small_disk(16 * MIB, ground.settings.work_directory)) as carry_out:
        assert carry_out("") == 0
    ended = due_again(ground, job_id)
    assert (ended.data["cause"], ended.data["stage"]) == ("disk_full", 0)
    assert any(words in ended.data["message"] for words in FULL), ended.data

    with attempts(ground, small_disk(8 * MIB, ground.settings.work_directory)) as carry_out:
        assert carry_out("") == 0
    ended = due_again(ground, job_id)  # the checkpoint found no room, so no process was begun
    assert (ended.data["cause"], ended.data["code"]) == ("disk_full", "worker_disk")
    assert any(words in ended.data["message"] for words in FULL), ended.data

    assert ground.work() == "succeeded", ground.reason(job_id)
    assert (ground.job(job_id).attempt, ground.job(job_id).crashes) == (3, 0)
    assert ground.logs(job_id).splitlines() == [f"epoch {number}" for number in (1, 2, 3, 3, 4)]
    assert ground.result(job_id) == ground.result(undisturbed)


# ---------------------------------------------------------------- 41: no open files

FEW = 32


@pytest.mark.fault(41, "RLIMIT_NOFILE=32")
def test_a_worker_that_may_open_too_few_files_says_so_and_takes_no_job(ground: Ground) -> None:
    job_id = ground.submit()
    process = ground.start(["sh", "-c", f'ulimit -n {FEW} && exec "$@"', "sh", *TINY_WORKER])
    assert process.wait(timeout=60) == os.EX_CONFIG, ground.log()
    assert f"A worker needs 256 open files, and this one may have {FEW}:" in ground.log()
    assert (ground.job(job_id).status, ground.job(job_id).attempt) == ("queued", 0)
    assert ground.work() == "succeeded"


@pytest.mark.fault(41, "RLIMIT_NOFILE=32")
def test_a_worker_takes_the_open_files_that_it_may_have(ground: Ground) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 1024:
        pytest.skip(f"no process may have more than {hard} open files here")
    process = ground.start(["sh", "-c", f'ulimit -S -n {FEW} && exec "$@"', "sh", *TINY_WORKER])
    job_id = ground.submit()
    assert ground.wait_for(job_id).status == "succeeded"
    assert psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE)[0] == min(hard, 4096)


@pytest.mark.fault(41, "RLIMIT_NOFILE=32")
def test_a_worker_that_runs_out_of_open_files_tells_it_of_the_job_and_goes_on(ground: Ground) -> None:
    expected = ground.faultless_result()
    process = ground.start_worker(BURNISH_LEASE_SECONDS="6")
    ground.wait_for(ground.submit())  # warm: what it keeps open is open
    worker = psutil.Process(process.pid)
    allowed = worker.rlimit(psutil.RLIMIT_NOFILE)
    causes = []

    def over(job_id: UUID) -> list[JobEvent]:
        return ground.events(job_id, "requeued", "succeeded")

    for spare in range(9):  # there is another file each time that cannot be opened any more
        worker.rlimit(psutil.RLIMIT_NOFILE, (worker.num_fds() + spare, allowed[1]))
        job_id = ground.submit(max_attempts=100)
        wait_until(lambda job_id=job_id: ground.sweep() or over(job_id), "the attempt's end")
        worker.rlimit(psutil.RLIMIT_NOFILE, allowed)
        assert ground.wait_for(job_id).status == "succeeded", ground.reason(job_id)
        assert ground.result(job_id) == expected
        assert ground.job(job_id).crashes == 0
        for event in ground.events(job_id, "requeued"):
            causes.append(event.data["cause"])
            if causes[-1] == "open_files":
                assert event.data["code"] == "worker_files"
                assert "Too many open files" in event.data["message"]
    # A connection is a file too: to storage, or the heartbeat's to the ledger.
    assert set(causes) <= {"open_files", "storage", "lost"}
    assert "open_files" in causes
    assert process.poll() is None
