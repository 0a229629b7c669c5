"""Where attempts work: what a living one occupies is left alone, what a dead one left is removed."""

from __future__ import annotations

import shutil
from pathlib import Path
from uuid import uuid4

import pytest

from worker import premises
from worker.premises import Workplace


def test_a_workplace_is_empty_private_and_gone_afterwards(tmp_path: Path) -> None:
    directory = tmp_path / "work" / f"{uuid4()}-1"
    directory.mkdir(parents=True)
    (directory / "leftover").write_text("of an earlier life")
    workplace = Workplace(directory)
    workplace.occupy()
    assert [path.name for path in directory.iterdir()] == ["tmp"]
    assert directory.stat().st_mode & 0o777 == 0o700
    (directory / "tmp" / "file").write_text("x")
    workplace.vacate()
    workplace.vacate()
    assert not directory.exists()


def test_only_what_nobody_occupies_is_cleared(tmp_path: Path) -> None:
    held, deserted, other = (tmp_path / name for name in (f"{uuid4()}-1", f"{uuid4()}-12", "notes"))
    workplace = Workplace(held)
    workplace.occupy()
    for path in (deserted, other):
        path.mkdir()
    (deserted / "model.onnx").write_bytes(b"half of it")
    assert premises.clear(tmp_path) == 1
    assert sorted(tmp_path.iterdir()) == sorted([held, other])
    workplace.vacate()
    assert premises.clear(tmp_path) == 0


def test_what_is_being_cleared_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor cleared by two; and whoever is killed over it leaves what the next one clears."""
    directory = tmp_path / f"{uuid4()}-1"
    directory.mkdir()
    (directory / "model.onnx").write_bytes(b"half of it")
    same = Workplace(directory)
    leaving = []

    def remove(path: Path, *, ignore_errors: bool) -> None:
        """Takes its time, and comes to nothing."""
        if path != directory:
            leaving.append(path)
            same.occupy()  # as after a ledger that was set back
            assert premises.clear(tmp_path) == 0

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", remove)
        assert premises.clear(tmp_path) == 1
    assert [path.name for path in leaving[0].iterdir()] == ["model.onnx"]
    assert premises.clear(tmp_path) == 1
    assert list(tmp_path.iterdir()) == [directory]
    same.vacate()


def test_what_cannot_be_removed_is_tried_again_however_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{uuid4()}-1").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, *, ignore_errors: None)
        assert [premises.clear(tmp_path) for _ in range(20)] == [1] * 20
    assert premises.clear(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_there_is_nothing_to_clear_where_nobody_worked(tmp_path: Path) -> None:
    assert premises.clear(tmp_path / "nowhere") == 0


def test_a_disk_that_takes_no_directory_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    workplace = Workplace(tmp_path / "file" / f"{uuid4()}-1")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        workplace.occupy()
    workplace.vacate()
