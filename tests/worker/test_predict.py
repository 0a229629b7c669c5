"""A delivered engine runs on one image, and a tampered one runs on none."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.errors import DigestMismatch, InvalidFile
from shared.recipe import ModelFormat, Preprocessing, Task
from tests.worker.workbench import Workbench, small_onnx
from worker import predict
from worker.context import Model
from worker.data import open_samples
from worker.engines import archive
from worker.predict import draw_overlay, load_engine, read_image


def packed(directory: Path, task: Task, **onnx_changes: int) -> Path:
    """A small engine for ONNX Runtime."""
    small_onnx(directory / "model.onnx", **onnx_changes)  # type: ignore[arg-type]
    manifest = archive.Manifest(
        engine="onnxruntime",
        target="onnxruntime",
        precision="fp32",
        entry="model.onnx",
        portable="model.onnx",
        inputs=[archive.Port(name="input", shape=[None, 1, 32, 32])],
        outputs=[archive.Port(name="output", shape=[None, 4, 32, 32])],
        preprocessing=Preprocessing(size=(32, 32), scale=1 / 255),
        task=task,
        versions={},
        files=[archive.note("model.onnx", directory / "model.onnx", "engine")],
    )
    archive.write(directory / "engine.zip", manifest, {"model.onnx": directory / "model.onnx"})
    return directory / "engine.zip"


def repacked(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(path) as source:
        files = {name: source.read(name) for name in source.namelist()}
    change(files)
    target = path.with_name("changed.zip")
    with zipfile.ZipFile(target, "w") as out:
        for name, content in files.items():
            out.writestr(name, content)
    return target


def array(bench: Workbench, tmp_path: Path) -> Path:
    """The first evaluation image as it is stored."""
    raw = open_samples(
        bench.directory / "data.safetensors",
        "safetensors",
        "evaluation",
        bench.recipe.data.model_copy(update={"preprocessing": Preprocessing()}),
        bench.recipe.task,
    )
    np.save(tmp_path / "slice.npy", raw.inputs(0, 1)[0, 0])
    return tmp_path / "slice.npy"


# ---------------------------------------------------------------- loading


def test_an_engine_and_its_files_come_and_go_together(engine: Path) -> None:
    loaded = load_engine(engine)
    assert loaded.precision == loaded.manifest.precision
    assert "int8" in loaded.precision
    assert loaded.engine == loaded.manifest.engine
    assert loaded.run(np.zeros((2, 1, 32, 32), dtype=np.float32)).shape == (2, 4, 32, 32)


def test_an_engine_that_names_no_instruction_sets_still_opens(tmp_path: Path) -> None:
    """As those that were packed before the manifest had them."""

    def forget(files: dict[str, bytes]) -> None:
        manifest = json.loads(files["manifest.json"])
        del manifest["instruction_sets"]
        files["manifest.json"] = json.dumps(manifest).encode()

    loaded = load_engine(repacked(packed(tmp_path, Task(kind="raw")), forget))
    assert loaded.manifest.instruction_sets == []
    assert loaded.run(np.zeros((1, 1, 32, 32), dtype=np.float32)).shape == (1, 4, 32, 32)


def test_a_changed_file_is_refused_by_its_digest(engine: Path, tmp_path: Path) -> None:
    local = tmp_path / "engine.zip"
    local.write_bytes(engine.read_bytes())

    def flip(files: dict[str, bytes]) -> None:
        files["model.onnx"] = files["model.onnx"][:-1] + b"\0"

    with pytest.raises(DigestMismatch, match=r"model\.onnx"):
        load_engine(repacked(local, flip))


def test_a_longer_file_is_refused_before_it_is_written(engine: Path, tmp_path: Path) -> None:
    local = tmp_path / "engine.zip"
    local.write_bytes(engine.read_bytes())

    def grow(files: dict[str, bytes]) -> None:
        files["model.onnx"] += bytes(10 * 2**20)

    with pytest.raises(DigestMismatch):
        load_engine(repacked(local, grow))


def test_files_beside_the_manifests_are_refused(engine: Path, tmp_path: Path) -> None:
    local = tmp_path / "engine.zip"
    local.write_bytes(engine.read_bytes())
    with pytest.raises(InvalidFile, match="exactly the files"):
        load_engine(repacked(local, lambda files: files.update({"more.so": b"x"})))


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", "a\\b"])
def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = packed(tmp_path, Task(kind="segmentation", classes=list("abcd")))

    def rename(files: dict[str, bytes]) -> None:
        manifest = json.loads(files["manifest.json"])
        sha256 = hashlib.sha256(b"x").hexdigest()
        manifest["files"].append({"name": name, "role": "engine", "size_bytes": 1, "sha256": sha256})
        files["manifest.json"] = json.dumps(manifest).encode()
        files[name] = b"x"

    with pytest.raises(InvalidFile, match="outside its folder"):
        load_engine(repacked(path, rename))
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize("content", [b"no zip", b"PK\x03\x04" + bytes(50)])
def test_what_is_no_engine_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "engine.zip").write_bytes(content)
    with pytest.raises(InvalidFile, match="not an engine"):
        load_engine(tmp_path / "engine.zip")


def test_a_manifest_that_is_not_valid_is_refused(engine: Path, tmp_path: Path) -> None:
    local = tmp_path / "engine.zip"
    local.write_bytes(engine.read_bytes())
    with pytest.raises(InvalidFile, match="manifest is not valid"):
        load_engine(repacked(local, lambda files: files.update({"manifest.json": b"{}"})))
    with pytest.raises(InvalidFile, match="not an engine"):
        load_engine(repacked(local, lambda files: files.pop("manifest.json") and None))


# ---------------------------------------------------------------- images


def test_a_picture_and_an_array_become_the_same_input(tmp_path: Path) -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", pixels)
    preprocessing = Preprocessing(scale=0.5, mean=[1.0])
    picture, stored = (read_image(tmp_path / name, preprocessing) for name in ("a.png", "a.npy"))
    assert picture.shape == (1, 6, 8)
    np.testing.assert_array_equal(picture, stored)
    assert read_image(tmp_path / "a.npy", Preprocessing(layout="NHWC")).shape == (6, 8, 1)


def test_an_array_of_objects_is_refused(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert predict.main([str(engine), str(tmp_path / "a.npy")]) == 1
    assert "allow_pickle" in capsys.readouterr().err


def test_the_overlay_colours_classes_and_leaves_the_background() -> None:
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    drawn = np.asarray(draw_overlay(image, np.array([[0, 1], [2, 0]]), background=0))
    np.testing.assert_array_equal(drawn[0, 0], [100, 100, 100])
    assert len({tuple(pixel) for pixel in drawn.reshape(-1, 3)}) == 3


# ---------------------------------------------------------------- the command


def test_a_segmentation_writes_its_mask_and_an_overlay(
    bench: Workbench, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mask.png"
    assert predict.main([str(engine), str(array(bench, tmp_path)), "--output", str(output), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    with Image.open(output) as mask_image, Image.open(result["overlay"]) as overlay:
        mask = np.asarray(mask_image)
        assert overlay.size == (32, 32)
    decided = load_engine(engine).run(bench.samples("evaluation").inputs(0, 1))[0].argmax(axis=0)
    np.testing.assert_array_equal(mask, decided)
    assert result["size"] == [32, 32]
    assert sum(result["shares"].values()) == pytest.approx(1, abs=1e-4)


def test_a_classification_prints_its_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(tmp_path, Task(kind="classification", classes=list("abcd")))
    engine = load_engine(path)
    found = predict._classified(engine, np.array([0.1, 0.2, 0.6, 0.1], dtype=np.float32))
    assert found["class"] == "c"
    assert predict._as_text(found).splitlines()[0].split() == ["60.00%", "c"]


def test_the_command_runs_by_itself_and_fails_with_a_sentence(engine: Path, bench: Workbench, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worker.predict", str(engine)]
    done = subprocess.run([*command, str(array(bench, tmp_path))], capture_output=True, text=True, check=True)
    assert "white" in done.stdout
    (tmp_path / "a.png").write_bytes(b"no image")
    failed = subprocess.run([*command, str(tmp_path / "a.png")], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "not a PNG" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    path = packed(tmp_path, Task(kind="segmentation", classes=list("abcd")))
    (tmp_path / "out").mkdir()
    manifest = archive.read(path, tmp_path / "out")
    assert (tmp_path / "out/model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert manifest.files[0].size_bytes == (tmp_path / "model.onnx").stat().st_size
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as found:
        assert found.testzip() is None
    assert Model(ModelFormat.ENGINE, path).precision == "fp32"
