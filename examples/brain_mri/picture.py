"""Four panels side by side: a slice, its true mask, the source U-Net's mask, and the engine's."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import yaml
from monai.networks.nets import BasicUNet
from PIL import Image, ImageDraw
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
COLOURS = np.array([[0, 0, 0], [70, 110, 160], [235, 170, 60], [240, 240, 240]], dtype=np.uint8)  # (classes, rgb)
SCALE, MARGIN, HEADER = 3, 8, 22


def main() -> None:
    """Write the picture to --out."""
    arguments = parse_arguments()
    image = np.load(arguments.slice)  # (1, H, W), 0..255
    truth = np.array(Image.open(arguments.slice.with_name(arguments.slice.stem + "_mask.png")))
    engine = np.array(Image.open(arguments.engine_mask))
    baseline = segment(image)
    agreement = (baseline == engine).mean()
    panels = {
        "slice": np.repeat(image.reshape(*image.shape[-2:], 1), 3, axis=2).astype(np.uint8),
        "truth": COLOURS[truth],
        "source U-Net": COLOURS[baseline],
        f"engine ({100 * agreement:.1f}% same)": COLOURS[engine],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(panels).save(arguments.out)
    print(f"{arguments.out}: the engine decides as the source U-Net in {100 * agreement:.2f}% of the pixels")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slice", type=Path, default=HERE / "build/slices/evaluation_09.npy")
    parser.add_argument("--engine-mask", type=Path, required=True, help="What `burnish predict` wrote.")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def segment(image: np.ndarray) -> np.ndarray:
    """Classes (H, W) that the trained U-Net gives one stored slice, built and fed as job.yaml says."""
    recipe = yaml.safe_load((HERE / "job.yaml").read_text(encoding="utf-8"))["recipe"]
    network = BasicUNet(**recipe["source"]["architecture"]["arguments"])
    network.load_state_dict(load_file(HERE / recipe["source"]["weights"]))
    preprocessing = recipe["data"]["preprocessing"]
    inputs = (image.astype(np.float32) - preprocessing["mean"][0]) / preprocessing["std"][0]
    with torch.inference_mode():
        logits = network.eval()(torch.from_numpy(inputs).reshape(1, 1, *image.shape[-2:]))  # (1, classes, H, W)
    return logits.argmax(dim=1)[0].numpy()


def draw(panels: dict[str, np.ndarray]) -> Image.Image:
    """The panels (H, W, 3) in a row, each under its title."""
    height, width = (SCALE * size for size in next(iter(panels.values())).shape[:2])
    canvas = Image.new("RGB", (MARGIN + len(panels) * (width + MARGIN), HEADER + height + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (title, panel) in enumerate(panels.items()):
        left = MARGIN + column * (width + MARGIN)
        pen.text((left, 5), title, fill="black")
        canvas.paste(Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST), (left, HEADER))
    return canvas


if __name__ == "__main__":
    main()
