"""The picture of one preprocessed sample shows what the network sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from shared.recipe import Preprocessing
from worker.data import Samples
from worker.evaluation.preview import MAX_SIDE, MIN_SIDE, write_preview


def of(image: npt.NDArray[np.float32]) -> Samples:
    return Samples("evaluation", 1, lambda index: image, None)


def ramp(*shape: int) -> npt.NDArray[np.float32]:
    """Dark on the left, bright on the right."""
    return np.broadcast_to(np.linspace(-3, 5, shape[-1], dtype=np.float32), shape).copy()


@pytest.mark.parametrize(
    ("image", "layout", "mode"),
    [
        (ramp(1, 20, 30), "NCHW", "L"),
        (ramp(3, 20, 30), "NCHW", "RGB"),
        (np.moveaxis(ramp(1, 20, 30), 0, -1), "NHWC", "L"),
        (ramp(1, 7, 20, 30), "NCHW", "L"),
        (ramp(2, 20, 30), "NCHW", "L"),
        (ramp(1, 1000, 1500), "NCHW", "L"),
    ],
    ids=["grey", "colours", "channels last", "volume", "two channels", "large"],
)
def test_dark_stays_dark_and_the_shape_is_kept(
    image: npt.NDArray[np.float32], layout: str, mode: str, tmp_path: Path
) -> None:
    write_preview(of(image), Preprocessing.model_validate({"layout": layout}), tmp_path / "seen.png")
    with Image.open(tmp_path / "seen.png") as picture:
        assert picture.mode == mode
        assert picture.width / picture.height == pytest.approx(1.5, rel=0.01)
        assert MIN_SIDE <= picture.width <= MAX_SIDE
        grey = np.asarray(picture.convert("L"), dtype=float)
    assert grey[:, 0].mean() < 10
    assert grey[:, -1].mean() > 245


def test_a_sample_of_one_value_is_a_picture_too(tmp_path: Path) -> None:
    write_preview(of(np.zeros((1, 8, 8), dtype=np.float32)), Preprocessing(), tmp_path / "seen.png")
    with Image.open(tmp_path / "seen.png") as picture:
        assert np.asarray(picture).max() == 0
