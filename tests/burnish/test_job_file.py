"""A job file: what is read from it, and the sentence for everything that can be wrong with it."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import yaml

from burnish.errors import BadInput
from burnish.job_file import draft, format_of, read_job_file
from tests.api.desk import data, weights
from tests.burnish.workbench import RECIPE, write_job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path)


def refused(path: Path) -> BadInput:
    with pytest.raises(BadInput) as told:
        read_job_file(path)
    return told.value


def places(error: BadInput) -> list[tuple[str, str]]:
    return [(found.location, found.message) for found in error.errors]


def rewrite(job: Path, old: str, new: str) -> Path:
    text = job.read_text()
    assert old in text
    job.write_text(text.replace(old, new, 1))
    return job


# ---------------------------------------------------------------- what is read


def test_local_files_are_found_beside_the_job_file(job: Path, tmp_path: Path) -> None:
    found = read_job_file(job)

    assert [(file.path, file.format) for file in found.files] == [
        (tmp_path / "weights.safetensors", "safetensors"),
        (tmp_path / "data.safetensors", "safetensors"),
    ]


def test_the_request_names_the_artifacts_that_the_files_became(job: Path) -> None:
    found = read_job_file(job)
    artifacts = {file.path: uuid4() for file in found.files}

    request = found.request(artifacts)

    assert request.recipe.source.artifact_id == artifacts[job.parent / "weights.safetensors"]
    assert request.recipe.data.artifact == artifacts[job.parent / "data.safetensors"]
    assert request.name == "unet"


def test_artifact_ids_stay_as_they_are(tmp_path: Path) -> None:
    source, images = uuid4(), uuid4()
    path = write_job(
        tmp_path, source={"onnx": str(source)}, data={"artifact": str(images)}, stages=[{"kind": "build_engine"}]
    )

    found = read_job_file(path)

    assert found.files == ()
    assert found.request({}).recipe.source.artifact_id == source


def test_weights_in_the_place_of_a_data_set_are_looked_into_as_one(job: Path) -> None:
    rewrite(job, "artifact: data.safetensors", "artifact: ./weights.safetensors")
    assert "lacks the tensor calibration.images" in places(refused(job))[0][1]


def test_a_mapping_takes_paths_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    document = {"name": "unet", "recipe": RECIPE}

    found = draft(document)

    assert [file.path.name for file in found.files] == ["weights.safetensors", "data.safetensors"]
    assert document["recipe"] == RECIPE, "the caller's mapping is left alone"


def test_a_path_object_is_taken_as_well_as_a_string(tmp_path: Path) -> None:
    write_job(tmp_path)
    recipe = {**RECIPE, "data": {"artifact": tmp_path / "data.safetensors"}}

    found = draft({"name": "unet", "recipe": recipe}, tmp_path)

    assert found.files[1].path == tmp_path / "data.safetensors"


def test_an_absolute_path_and_a_home_directory_are_taken(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(job.parent))
    rewrite(job, "artifact: data.safetensors", "artifact: ~/data.safetensors")
    rewrite(job, "weights: weights.safetensors", f"weights: {job.parent / 'weights.safetensors'}")

    assert [file.path.parent for file in read_job_file(job).files] == [job.parent, job.parent]


def test_numbers_in_exponent_form_are_numbers(job: Path) -> None:
    rewrite(job, "value: 0.01", "value: 1e-2")
    found = read_job_file(job)
    request = found.request({file.path: UUID(int=1) for file in found.files})
    assert request.recipe.goals[0].value == 0.01


# ---------------------------------------------------------------- broken YAML


def test_a_missing_job_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert refused(path).detail == f"{path} cannot be read: No such file or directory."


def test_broken_yaml_is_told_with_its_line(job: Path) -> None:
    rewrite(job, "name: unet\n", "name: unet\n  tags: [\n")
    assert f"{job} line 2, column" in refused(job).detail


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n", "3\n"])
def test_yaml_that_is_no_mapping_is_told(job: Path, text: str) -> None:
    job.write_text(text)
    assert "must hold a mapping" in refused(job).detail


def test_a_name_that_occurs_twice_is_told(job: Path) -> None:
    job.write_text(job.read_text() + "name: another\n")
    assert "'name' occurs twice" in refused(job).detail


def test_a_binary_file_is_told(job: Path) -> None:
    job.write_bytes(b"\x80\x04\xff\xfe")
    assert "is not a text file" in refused(job).detail


@pytest.mark.parametrize(
    "text", ["name: !!python/object/apply:os.system ['true']\n", "name: \x07\n", "name: *nobody\n", "? [a, b]\n: c\n"]
)
def test_yaml_that_asks_for_more_than_data_is_refused(job: Path, text: str) -> None:
    job.write_text(text)
    assert str(job) in refused(job).detail


def test_yaml_nested_beyond_reason_is_refused(job: Path) -> None:
    job.write_text("[" * 5000)
    assert "not valid YAML" in refused(job).detail


# ---------------------------------------------------------------- a job that does not hold together


def test_an_unknown_field_is_told_with_its_place_and_line(job: Path) -> None:
    rewrite(job, "- kind: quantize\n", "- kind: quantize\n    bits: 4\n")
    line = job.read_text().splitlines().index("    bits: 4") + 1

    assert places(refused(job)) == [(f"recipe.stages.1.bits (line {line})", "is not a known field")]


def test_a_missing_field_is_told_with_the_line_of_what_lacks_it(job: Path) -> None:
    rewrite(job, "      name: BasicUNet\n", "")
    [(location, message)] = places(refused(job))
    assert location.startswith("recipe.source.architecture.name (line ")
    assert message == "is missing"


def test_a_stage_without_a_kind_is_told(job: Path) -> None:
    rewrite(job, "- kind: quantize\n", "- scheme: fp16\n")
    [(location, _message)] = places(refused(job))
    assert location.startswith("recipe.stages.1 (line ")


def test_a_wrong_value_is_told(job: Path) -> None:
    rewrite(job, "value: 0.01", "value: a lot")
    [(location, message)] = places(refused(job))
    assert location.startswith("recipe.goals.0.value")
    assert "number" in message


def test_a_recipe_that_does_not_chain_is_told(job: Path) -> None:
    rewrite(job, "  - kind: export_onnx\n", "")
    [(location, message)] = places(refused(job))
    assert location.startswith("recipe (line")
    assert "put an export_onnx stage before it" in message


def test_every_mistake_is_told_at_once(job: Path) -> None:
    rewrite(job, "name: unet", "nme: unet")
    rewrite(job, "value: 0.01", "value: -1")
    assert [location.split(" ")[0] for location, _ in places(refused(job))] == ["name", "recipe.goals.0.value", "nme"]


def test_a_recipe_that_is_no_mapping_is_told(job: Path) -> None:
    job.write_text("name: unet\nrecipe: weights.safetensors\n")
    assert places(refused(job))[0][0] == "recipe (line 2)"


# ---------------------------------------------------------------- files that cannot be used


def test_a_missing_file_is_told_with_the_line_that_names_it(job: Path) -> None:
    (job.parent / "data.safetensors").unlink()
    [(location, message)] = places(refused(job))
    assert location.startswith("recipe.data.artifact (line ")
    assert message == f"{job.parent / 'data.safetensors'} is not there."


def test_a_folder_is_told(job: Path) -> None:
    (job.parent / "images.zip").mkdir()
    rewrite(job, "artifact: data.safetensors", "artifact: images.zip")
    error = refused(job)
    assert "is a folder" in places(error)[0][1]
    assert error.hint == "Zip a folder of images."


@pytest.mark.parametrize("suffix", ["pt", "pth", "pkl", "pt2", "h5", "PT", "ckpt", "keras"])
def test_a_format_that_carries_code_is_told_what_to_send_instead(job: Path, suffix: str) -> None:
    (job.parent / f"model.{suffix}").write_bytes(b"anything")
    rewrite(job, "weights: weights.safetensors", f"weights: model.{suffix}")
    error = refused(job)
    [(location, message)] = places(error)
    assert location.startswith("recipe.source.weights (line ")
    assert f"model.{suffix}: a .{suffix.lower()} file can carry code" in message
    assert error.hint is not None
    assert "safetensors.torch.save_file" in error.hint
    assert "ONNX" in error.hint


@pytest.mark.parametrize("suffix", ["npy", "npz", "tar"])
def test_arrays_in_other_formats_are_told_what_to_send_instead(suffix: str) -> None:
    with pytest.raises(BadInput) as told:
        format_of(Path(f"data.{suffix}"))
    assert told.value.hint is not None
    assert "zip of folders" in told.value.hint


def test_an_unknown_suffix_is_told() -> None:
    with pytest.raises(BadInput, match="tells no format"):
        format_of(Path("README"))


def test_an_id_with_a_typing_error_is_told_where_it_stands(job: Path) -> None:
    rewrite(job, "artifact: data.safetensors", "artifact: 01990000-0000-7000-8000-00000000000")
    [(location, message)] = places(refused(job))
    assert location.startswith("recipe.data.artifact (line ")
    assert "tells no format" in message


def test_a_pickle_under_another_name_is_refused_before_anything_is_sent(job: Path) -> None:
    (job.parent / "weights.safetensors").write_bytes(pickle.dumps({"a": list(range(1000))}))
    error = refused(job)
    assert "pickle" in places(error)[0][1]
    assert error.hint is not None
    assert "safetensors" in error.hint


def test_a_torchscript_archive_under_another_name_is_refused(job: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("model/constants.pkl", b"")
        file.writestr("model/code/__torch__.py", b"")
    (job.parent / "data.zip").write_bytes(archive.getvalue())
    rewrite(job, "artifact: data.safetensors", "artifact: data.zip")
    assert "TorchScript" in places(refused(job))[0][1]


@pytest.mark.parametrize("content", [b"", b"abc", weights()[:-5]])
def test_a_truncated_file_is_told(job: Path, content: bytes) -> None:
    (job.parent / "weights.safetensors").write_bytes(content)
    assert places(refused(job))[0][0].startswith("recipe.source.weights (line ")


def test_a_file_in_the_wrong_place_is_told(job: Path) -> None:
    (job.parent / "weights.onnx").write_bytes(b"x")
    rewrite(job, "weights: weights.safetensors", "weights: weights.onnx")
    assert "a file in .safetensors belongs here" in places(refused(job))[0][1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (data(parts=("calibration",)), "no evaluation samples"),
        (data(parts=("evaluation",)), "needs calibration data"),
        (data(num_masks=3), "has 4 samples, but evaluation.masks has 3"),
    ],
)
def test_data_that_do_not_fit_are_told_before_anything_is_sent(job: Path, content: bytes, told: str) -> None:
    (job.parent / "data.safetensors").write_bytes(content)
    [(location, message)] = places(refused(job))
    assert location.startswith("recipe.data.artifact (line ")
    assert told in message or "calibration.masks has 3" in message


def test_what_yaml_makes_of_a_word_is_told_where_it_stands(job: Path) -> None:
    document: dict[str, Any] = yaml.safe_load(job.read_text())
    document["recipe"]["task"]["classes"] = [False, True]
    job.write_text(yaml.safe_dump(document))
    assert [location.split(" ")[0] for location, _ in places(refused(job))] == [
        "recipe.task.classes.0",
        "recipe.task.classes.1",
    ]
