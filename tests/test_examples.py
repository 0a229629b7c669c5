"""The examples as a newcomer runs them: real data, parts that do not touch, and jobs that fit what was trained."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

from shared.recipe import ModelFormat, Preprocessing, Recipe, TorchSource
from shared.schemas import JobRequest
from worker.context import Model
from worker.data import Samples, open_samples
from worker.loading import load_module

Arrays = dict[str, npt.NDArray[Any]]

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("brain_mri", "digits")
DATA = {"brain_mri": "data.safetensors", "digits": "data.zip"}
WEIGHTS = {"brain_mri": "unet.safetensors", "digits": "resnet.safetensors"}
FEW = {"brain_mri": ["--slices", "8"], "digits": ["--images", "128"]}


@dataclass(frozen=True)
class Built:
    """What one example's scripts left, and what they printed."""

    name: str
    folder: Path
    told: str

    @property
    def data(self) -> Path:
        return self.folder / DATA[self.name]

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS[self.name]

    @property
    def recipe(self) -> Recipe:
        return job_request(self.name).recipe


def run(script: Path, *options: str | Path) -> str:
    """Run one script as its own process, warnings being errors, and give back what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-W", "error", script, *options], capture_output=True, text=True, env=environment, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def brain_mri(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build("brain_mri", tmp_path_factory.mktemp("brain_mri"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build("digits", tmp_path_factory.mktemp("digits"))


@pytest.fixture(params=NAMES)
def built(request: pytest.FixtureRequest) -> Built:
    """Either example."""
    found: Built = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def slices(brain_mri: Built) -> Arrays:
    """The brain example's arrays by name."""
    found: Arrays = load_file(brain_mri.data)
    return found


def build(name: str, folder: Path) -> Built:
    """The example prepared, and trained for one epoch on a few samples."""
    told = run(EXAMPLES / name / "prepare.py", "--out", folder)
    found = Built(name, folder, told)
    return replace(found, told=told + train(found, found.weights))


def train(built: Built, out: Path) -> str:
    few = [*FEW[built.name], "--epochs", "1"]
    return run(EXAMPLES / built.name / "train.py", "--data", built.data, "--out", out, *few)


def document(name: str) -> dict[str, Any]:
    """The example's job.yaml as it is written."""
    read: dict[str, Any] = yaml.safe_load((EXAMPLES / name / "job.yaml").read_text(encoding="utf-8"))
    return read


def job_request(name: str) -> JobRequest:
    """The example's job once its files are artifacts."""
    job = document(name)
    job["recipe"]["source"]["weights"] = str(UUID(int=1))
    job["recipe"]["data"]["artifact"] = str(UUID(int=2))
    return JobRequest.model_validate(job)


def part(built: Built, name: str) -> Samples:
    format = built.data.suffix.removeprefix(".")
    return open_samples(built.data, format, name, built.recipe.data, built.recipe.task)


# ---------------------------------------------------------------- both examples


@pytest.mark.parametrize("name", NAMES)
def test_the_job_names_the_files_that_the_scripts_write(name: str) -> None:
    recipe = document(name)["recipe"]
    assert recipe["source"]["weights"] == f"build/{WEIGHTS[name]}"
    assert recipe["data"]["artifact"] == f"build/{DATA[name]}"


@pytest.mark.parametrize("name", NAMES)
def test_the_job_is_a_request_once_its_files_are_artifacts(name: str) -> None:
    job = job_request(name)
    assert [stage.kind for stage in job.recipe.stages] == ["export_onnx", "quantize", "build_engine"]
    assert job.recipe.parts() == {"calibration", "evaluation"}
    assert job.recipe.benchmark.batches[0] == job.recipe.benchmark.threads == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_job_allows_a_loss_that_its_evaluation_part_can_show(name: str) -> None:
    recipe = job_request(name).recipe
    leading = recipe.task.metrics[0]
    allowed = {"dice": 0.021, "top1": 0.01}[leading]
    assert [goal.value for goal in recipe.goals if goal.metric == leading and goal.kind == "max_drop"] == [allowed]
    assert {goal.metric for goal in recipe.goals} == {leading, "latency", "size"}


def test_the_weights_fit_the_network_that_the_job_names(built: Built) -> None:
    source = built.recipe.source
    assert isinstance(source, TorchSource)
    network = load_module(Model(ModelFormat.TORCH, built.weights, source.architecture))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 0.5e6 <= parameters <= 2e6, "large enough that a benchmark measures computing and not calling"


def test_the_job_preprocesses_as_the_training_did(built: Built) -> None:
    """Network input is centred and scaled by what the job says; the training script has the same figures."""
    preprocessing: Preprocessing = built.recipe.data.preprocessing
    script = (EXAMPLES / built.name / "train.py").read_text(encoding="utf-8")
    assert f"MEAN, STD = {preprocessing.mean[0]}, {preprocessing.std[0]} " in script
    inputs = part(built, "train").inputs(0, 10_000)
    assert inputs.mean() == pytest.approx(0, abs=0.05)
    assert inputs.std() == pytest.approx(1, abs=0.05)


def test_a_worker_reads_every_part_that_the_job_needs(built: Built) -> None:
    for name in sorted(built.recipe.parts() | {"train"}):
        samples = part(built, name)
        inputs, targets = samples.inputs(0, 2), samples.targets(0, 2)
        assert inputs.dtype == np.float32
        assert inputs.shape[:2] == (2, 1)
        assert targets is not None or name == "calibration"


def test_the_quantizer_is_asked_for_no_more_samples_than_there_are(built: Built) -> None:
    [quantize] = [stage for stage in built.recipe.stages if stage.kind == "quantize"]
    assert quantize.calibration_samples <= len(part(built, "calibration"))


def test_the_same_data_set_is_written_again(built: Built, tmp_path: Path) -> None:
    """Byte for byte, so that it is uploaded once."""
    run(EXAMPLES / built.name / "prepare.py", "--out", tmp_path)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (built.data, tmp_path / built.data.name)]
    assert digests[0] == digests[1]


def test_the_same_seed_trains_the_same_weights(brain_mri: Built, tmp_path: Path) -> None:
    train(brain_mri, tmp_path / "again.safetensors")
    first, second = load_file(brain_mri.weights), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_training_tells_how_far_it_is_and_how_good_it_became(built: Built) -> None:
    assert "epoch" in built.told
    assert "evaluation" in built.told.splitlines()[-2]
    assert built.told.endswith(f"wrote {built.weights}\n")


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_scripts_that_a_user_could_have_written(name: str) -> None:
    """They import none of ours."""
    for script in ("prepare.py", "train.py"):
        tree = ast.parse((EXAMPLES / name / script).read_text(encoding="utf-8"))
        imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {"api", "worker", "shared", "burnish"} & {module.split(".")[0] for module in imported}


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_says_that_the_data_is_not_clinical(name: str) -> None:
    assert "What this is not." in (EXAMPLES / name / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- brain_mri


def test_slices_are_two_millimetre_pictures_with_one_mask_each(slices: Arrays) -> None:
    for name in ("train", "evaluation"):
        images, masks = slices[f"{name}.images"], slices[f"{name}.masks"]
        assert images.shape == (len(masks), 1, 112, 96)
        assert masks.shape == (len(images), 112, 96)
        assert images.dtype == masks.dtype == np.uint8
    assert set(slices) == {
        "train.images", "train.masks", "calibration.images", "evaluation.images", "evaluation.masks",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["train", "evaluation"])
def test_every_class_is_in_every_labelled_part(slices: Arrays, name: str) -> None:
    classes, counts = np.unique(slices[f"{name}.masks"], return_counts=True)
    assert classes.tolist() == list(range(len(job_request("brain_mri").recipe.task.classes)))
    assert counts.min() > 0.01 * counts.sum()


def test_tissues_are_as_bright_as_t1_shows_them(slices: Arrays) -> None:
    """White matter is brightest, fluid darkest, and the background is black."""
    images, masks = slices["evaluation.images"][:, 0], slices["evaluation.masks"]
    background, other, grey, white = (float(np.median(images[masks == index])) for index in range(4))
    assert background == 0 < other < grey < white


def test_slices_are_upright(slices: Arrays) -> None:
    """A head from above, forehead up: longer than wide, widest at the back, and alike left and right only."""
    masks = slices["evaluation.masks"]
    head = masks.max(axis=0) > 0  # (H, W)
    rows, columns = np.flatnonzero(head.max(axis=1)), np.flatnonzero(head.max(axis=0))
    assert len(rows) > len(columns)
    assert head.sum(axis=1).argmax() > rows.mean()
    head_only = masks[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (head_only[:, :, ::-1] == head_only).mean() > 0.9 > (head_only[:, ::-1] == head_only).mean()


def test_no_slice_is_in_both_training_and_evaluation(slices: Arrays) -> None:
    seen = {image.tobytes() for name in ("train", "calibration") for image in slices[f"{name}.images"]}
    assert not seen & {image.tobytes() for image in slices["evaluation.images"]}


def test_calibration_is_drawn_from_training(slices: Arrays) -> None:
    trained = {image.tobytes() for image in slices["train.images"]}
    assert {image.tobytes() for image in slices["calibration.images"]} < trained


def test_a_gap_lies_between_the_slabs(slabs: dict[str, list[float]]) -> None:
    """The nearest training slice is more than 8 mm of unused brain away from the evaluation slab."""
    evaluation, train = slabs["evaluation"], slabs["train"]
    assert np.allclose(np.diff(evaluation), 2), "one slab, without holes"
    assert max(np.diff(train)) > max(evaluation) - min(evaluation) + 16, "evaluation is within the one hole in train"
    assert min(abs(a - b) for a in evaluation for b in train) >= 8 + 2
    assert set(slabs["calibration"]) < set(train)


@pytest.fixture(scope="module")
def slabs() -> dict[str, list[float]]:
    """Where the slices of each part lie, in mm, as the script's own functions say."""
    code = (
        "import json, runpy, sys; here = runpy.run_path(sys.argv[1]); slices = here['read_slices'](2); "
        "parts = here['split'](slices.centres_mm, 2); "
        "print(json.dumps({part: slices.centres_mm[chosen].tolist() for part, chosen in parts.items()}))"
    )
    script = EXAMPLES / "brain_mri" / "prepare.py"
    finished = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = yaml.safe_load(finished.stdout)
    return found


def test_shown_slices_are_slices_of_the_evaluation_part(brain_mri: Built, slices: Arrays) -> None:
    shown = sorted((brain_mri.folder / "slices").glob("*.npy"))
    assert len(shown) == 4
    for path in shown:
        index = int(path.stem.removeprefix("evaluation_"))
        stored = np.load(path)
        assert np.array_equal(stored, slices["evaluation.images"][index])
        assert np.array_equal(np.asarray(Image.open(path.with_suffix(".png"))), stored[0])
        mask = np.asarray(Image.open(path.with_name(f"{path.stem}_mask.png")))
        assert np.array_equal(mask, slices["evaluation.masks"][index])


@pytest.mark.parametrize(("spacing", "height", "width"), [(3, 64, 64), (4, 48, 48)])
def test_other_spacings_give_sides_that_a_unet_can_halve_four_times(
    tmp_path: Path, spacing: int, height: int, width: int
) -> None:
    run(EXAMPLES / "brain_mri" / "prepare.py", "--spacing", str(spacing), "--out", tmp_path)
    arrays = load_file(tmp_path / "data.safetensors")
    assert arrays["evaluation.images"].shape[1:] == (1, height, width)
    assert (arrays["evaluation.masks"][:, [0, -1]] == 0).all(), "the whole head is in the picture"
    assert (arrays["evaluation.masks"][:, :, [0, -1]] == 0).all()


# ---------------------------------------------------------------- digits


def entries(digits: Built, name: str) -> list[tuple[str, str, bytes]]:
    """(class, file, bytes) of every image of one part."""
    with zipfile.ZipFile(digits.data) as archive:
        names = [entry for entry in archive.namelist() if entry.startswith(f"{name}/")]
        return [(entry.split("/")[1], entry.split("/")[2], archive.read(entry)) for entry in names]


@pytest.mark.parametrize(("name", "of_each"), [("train", 400), ("calibration", 40), ("evaluation", 100)])
def test_every_digit_is_there_equally_often(digits: Built, name: str, of_each: int) -> None:
    counts = Counter(folder for folder, _, _ in entries(digits, name))
    assert counts == dict.fromkeys(job_request("digits").recipe.task.classes, of_each)


def test_no_digit_is_in_both_training_and_evaluation(digits: Built) -> None:
    files = {name: {file for _, file, _ in entries(digits, name)} for name in ("train", "calibration", "evaluation")}
    assert not files["train"] & files["evaluation"]
    assert files["calibration"] < files["train"]


def test_digits_are_grey_pictures_of_28_by_28(digits: Built) -> None:
    for _, _, content in entries(digits, "calibration")[::40]:
        image = Image.open(BytesIO(content))
        assert (image.mode, image.size) == ("L", (28, 28))
        assert np.asarray(image).max() > 128


def test_shown_digits_are_images_of_the_evaluation_part(digits: Built) -> None:
    stored = {content: folder for folder, _, content in entries(digits, "evaluation")}
    shown = sorted((digits.folder / "images").glob("*.png"))
    assert len(shown) == 4
    assert [stored[path.read_bytes()] for path in shown] == [path.stem[-1] for path in shown]
