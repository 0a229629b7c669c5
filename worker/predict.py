"""One engine on one image: `python -m worker.predict ENGINE IMAGE [--output mask.png] [--json]`."""

from __future__ import annotations

import argparse
import colorsys
import json
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shared.errors import DataMismatch, ServiceError
from shared.recipe import ModelFormat, Preprocessing
from worker import engines
from worker.context import Model
from worker.data import decode, normalize, pixels
from worker.engines import Runner, archive
from worker.evaluation.outputs import class_scores, probabilities
from worker.feed import Floats

OVERLAY_OPACITY = 0.5
TOP_CLASSES = 5


class Engine:
    """A packed engine, ready to run: a Runner with its manifest."""

    def __init__(self, manifest: archive.Manifest, runner: Runner) -> None:
        self.manifest = manifest
        self.runner = runner
        self.engine, self.precision = runner.engine, runner.precision
        self.threads, self.versions = runner.threads, runner.versions

    def run(self, inputs: Floats) -> Floats:
        """Raw outputs of one preprocessed batch."""
        return self.runner.run(inputs)


def load_engine(path: Path, threads: int = 1) -> Engine:
    """Unpack an engine, verify every digest and load it; its files are removed together with it.

    Raises InvalidFile, DigestMismatch, StageFailed.
    """
    directory = Path(tempfile.mkdtemp(prefix="burnish-engine-"))
    try:
        manifest = archive.read(path, directory)
        model = Model(ModelFormat.ENGINE, directory / manifest.entry, precision=manifest.precision)
        engine = Engine(manifest, engines.load(manifest.engine).open(model, threads))
    except BaseException:
        shutil.rmtree(directory)
        raise
    weakref.finalize(engine, shutil.rmtree, directory, ignore_errors=True)
    return engine


def predict(engine: Engine, image: Path) -> Floats:
    """Probabilities of the classes: (classes,) for a classification, (classes, H, W) for a segmentation.

    Raises DataMismatch where the engine takes more than an image, or was made without a task.
    """
    manifest = engine.manifest
    if len(manifest.inputs) > 1:
        names = ", ".join(port.name for port in manifest.inputs[1:])
        raise DataMismatch(f"The engine takes {names} beside the image; run it from Python, through worker.engines.")
    if manifest.task.kind == "raw":
        raise DataMismatch("The engine was made without a task, so what its outputs mean is not known.")
    inputs = read_image(image, manifest.preprocessing)
    sizes = inputs.shape[1:] if manifest.preprocessing.layout == "NCHW" else inputs.shape[:-1]
    targets = (1, *sizes) if manifest.task.kind == "segmentation" else (1,)
    found: Floats = probabilities(class_scores(engine.run(inputs[None]), manifest.task, targets))[0]
    return found


def read_image(path: Path, preprocessing: Preprocessing) -> Floats:
    """One image as network input (C, H, W) or (H, W, C): a picture, or an .npy of stored values.

    An array may leave out its channel. Raises DataMismatch, StageFailed.
    """
    if path.suffix.lower() == ".npy":
        stored = np.load(path, allow_pickle=False)
        if stored.ndim == 2:
            stored = stored[None] if preprocessing.layout == "NCHW" else stored[:, :, None]
        if stored.ndim != 3:
            raise DataMismatch(f"{path.name} has {stored.ndim} dimensions; one image has 2 or 3.")
        return normalize(stored, preprocessing)
    return normalize(pixels(decode(path.read_bytes(), path.name), preprocessing), preprocessing)


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 1 with a sentence on stderr."""
    parser = argparse.ArgumentParser(prog="predict", description="Run one engine on one image.")
    parser.add_argument("engine", type=Path, help="an engine's zip, as a job delivers it")
    parser.add_argument("image", type=Path, help="a .png, .jpg, .bmp, .tif, or an .npy of stored values")
    parser.add_argument("--output", type=Path, help="the mask of class indices as .png; an overlay beside it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args(arguments)
    try:
        engine = load_engine(asked.engine, asked.threads)
        found = predict(engine, asked.image)
        result = _classified(engine, found) if found.ndim == 1 else _segmented(engine, found, asked.image, asked.output)
    except (ServiceError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(result) if asked.json else _as_text(result))
    return 0


def _classified(engine: Engine, found: Floats) -> dict[str, Any]:
    classes = engine.manifest.task.classes
    return {
        "class": classes[int(found.argmax())],
        "probabilities": {name: round(float(value), 6) for name, value in zip(classes, found, strict=True)},
    }


def _segmented(engine: Engine, found: Floats, image: Path, output: Path | None) -> dict[str, Any]:
    """Shares of the classes; with `output`, the mask (class indices) and, beside it, the overlay in colours."""
    classes = engine.manifest.task.classes
    mask = found.argmax(axis=0).astype(np.uint16 if len(classes) > 256 else np.uint8)  # (H, W)
    counts = np.bincount(mask.ravel(), minlength=len(classes))
    result: dict[str, Any] = {
        "size": list(mask.shape),
        "shares": {name: round(float(count) / mask.size, 6) for name, count in zip(classes, counts, strict=True)},
    }
    if output is not None:
        overlay = output.with_name(f"{output.stem}-overlay.png")
        Image.fromarray(mask).save(output, format="PNG")
        draw_overlay(_shown(image, mask.shape), mask, engine.manifest.task.background).save(overlay, format="PNG")
        result |= {"mask": str(output), "overlay": str(overlay)}
    return result


def _shown(path: Path, size: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The image as it is looked at: grey or colour, stretched to 0..255, of the mask's size (H, W, 3)."""
    if path.suffix.lower() == ".npy":
        stored = np.load(path, allow_pickle=False).astype(np.float32)
        stored = stored.reshape(-1, *size)[0] if stored.size % int(np.prod(size)) == 0 else np.zeros(size, np.float32)
    else:
        picture = decode(path.read_bytes(), path.name).convert("F").resize((size[1], size[0]))
        stored = np.asarray(picture, dtype=np.float32)
    low, high = float(stored.min()), float(stored.max())
    grey = ((stored - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def draw_overlay(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.integer[Any]], background: int | None
) -> Image.Image:
    """The image (H, W, 3) with each class of the mask (H, W) in its colour; the background is left as it is."""
    count = int(mask.max()) + 1
    colours = np.array([colorsys.hsv_to_rgb(index * 0.618 % 1, 0.8, 1) for index in range(count)]) * 255  # golden ratio
    mixed = (1 - OVERLAY_OPACITY) * image + OVERLAY_OPACITY * colours[mask]
    if background is not None:
        mixed[mask == background] = image[mask == background]
    return Image.fromarray(mixed.astype(np.uint8))


def _as_text(result: dict[str, Any]) -> str:
    if "probabilities" in result:
        ordered = sorted(result["probabilities"].items(), key=lambda entry: -entry[1])[:TOP_CLASSES]
        return "\n".join(f"{value:7.2%}  {name}" for name, value in ordered)
    lines = [f"{share:7.2%}  {name}" for name, share in result["shares"].items()]
    return "\n".join(lines + [f"{key}: {result[key]}" for key in ("mask", "overlay") if key in result])


if __name__ == "__main__":
    sys.exit(main())
