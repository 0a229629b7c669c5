"""The commands that take what a job has made, against a real service."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.burnish.conftest import Command
from tests.burnish.workbench import ENGINE, Workbench

BURNISH = [sys.executable, "-m", "burnish"]


def test_the_report_is_a_table_for_a_reader(bench: Workbench, burnish: Command, job: Any) -> None:
    bench.succeed(bench.claim())

    told = burnish("report", str(job.id))

    assert told.status == 0
    assert job.url in told.out
    assert "2 build_engine" in told.out
    assert "succeeded (delivered)" in told.out
    assert "4.00" in told.out, "the speedup"
    assert "3.90 to 4.10" in told.out, "its interval"
    assert "p99" not in told.out, "nothing was run often enough"
    assert "unet: met. The headline of met." in told.out
    assert "max_drop of dice, at most 1 point: 0.4 points (95 % bound: 0.8 points), met" in told.out
    assert "warning: Stage 1 (quantize): a warning." in told.out


def test_a_goal_that_is_not_shown_says_what_would_settle_it(bench: Workbench, burnish: Command, job: Any) -> None:
    bench.succeed(bench.claim(), "not_shown")
    assert (
        "max_drop of dice, at most 1 point: 0.4 points (95 % bound: 2 points), not shown, about 1,234 evaluation "
        "samples would settle it"
    ) in burnish("report", str(job.id)).out


def test_the_report_is_text_in_each_format(bench: Workbench, burnish: Command, job: Any) -> None:
    bench.succeed(bench.claim())

    assert burnish("report", str(job.id), "--format", "md").out.startswith("# unet: met")
    assert burnish("report", str(job.id), "--format", "csv").out.startswith("stage,status,engine")
    assert burnish("report", str(job.id), "--format", "json").document()["job"] == str(job.id)
    assert burnish("report", str(job.id), "--json").document()["verdict"] == "met"
    assert burnish("report", str(job.id), "--json", "--format", "csv").status == 2


def test_a_report_that_is_not_there_yet_ends_with_2(burnish: Command, job: Any) -> None:
    told = burnish("report", str(job.id))
    assert told.status == 2
    assert "the job is queued" in told.err


def test_download_takes_the_engine_and_tells_its_digest(
    bench: Workbench, burnish: Command, job: Any, tmp_path: Path
) -> None:
    bench.succeed(bench.claim())

    told = burnish("download", str(job.id), "--output", tmp_path / "out")

    assert told.status == 0
    assert (tmp_path / "out" / "engine.zip").read_bytes() == ENGINE
    assert str(tmp_path / "out" / "engine.zip") in told.out
    assert job.url in told.out
    document = burnish("download", str(job.id), "--name", "attempt-1.log", "--json").document()
    assert Path(document["path"]).read_text().startswith("line of stage 0")


def test_a_corrupted_download_ends_with_3_and_leaves_nothing(
    bench: Workbench, burnish: Command, job: Any, tmp_path: Path
) -> None:
    bench.succeed(bench.claim())
    for damaged, code in ((ENGINE[:-1], "artifact_damaged"), (ENGINE[:-1] + b"?", "broken_download")):
        bench.damage("engine.zip", damaged)
        told = burnish("download", str(job.id), "--output", tmp_path / "out", "--json")
        assert told.status == 3
        assert told.document()["error"]["code"] == code
    assert list((tmp_path / "out").iterdir()) == []


def test_predict_without_the_engines_says_how_to_install_them(
    burnish: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name))

    told = burnish("predict", "engine.zip", "image.png", "--json")

    assert told.status == 2
    assert "openvino is missing" in told.document()["error"]["detail"]
    assert "burnish[worker]" in told.document()["error"]["hint"]


def test_predict_tells_which_file_is_not_there(burnish: Command) -> None:
    told = burnish("predict", "engine.zip", "image.png")
    assert told.status == 2
    assert "engine.zip is not there" in told.err


def test_predict_of_what_is_no_engine_ends_with_2(burnish: Command, tmp_path: Path) -> None:
    for name in ("engine.zip", "image.png"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    told = burnish("predict", tmp_path / "engine.zip", tmp_path / "image.png", "--output", "mask.png", "--json")
    assert told.status == 2
    assert told.document()["error"]["code"] == "bad_input"
    assert "Traceback" not in told.err
