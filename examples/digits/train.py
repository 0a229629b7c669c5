"""Trains the network that the job makes small and fast: a little residual network that reads handwritten digits.

It reads the zip that prepare.py wrote and leaves the weights as safetensors. The evaluation images are looked at once,
after the last epoch.
"""

from __future__ import annotations

import argparse
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import ResNet
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
CLASSES = tuple("0123456789")
MEAN, STD = 0.13, 0.31  # of the training images, scaled to 0..1; job.yaml says the same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "build" / "data.zip")
    parser.add_argument("--out", type=Path, default=HERE / "build" / "resnet.safetensors")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, help="train on the first few images only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more are faster, but only on idle cores")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    images, labels = read(options.data, "train")
    images, labels = images[: options.images], labels[: options.images]
    network = build()
    print(f"ResNet with {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {len(images)} images")

    train(network, images, labels, options.epochs)
    images, labels = read(options.data, "evaluation")
    print(f"{top1(network, images, labels):.2%} of {len(images)} evaluation images right")

    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, options.out)
    print(f"wrote {options.out}")


def read(path: Path, part: str) -> tuple[Tensor, Tensor]:
    """Network input (N, 1, 28, 28) and labels (N,) of one part of the zip, in the order of the files' names."""
    images, labels = [], []
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{part}/")]
        for name in sorted(names, key=lambda name: name.rsplit("/", 1)[1]):
            with archive.open(name) as file:
                images.append(np.asarray(Image.open(file)))
            labels.append(CLASSES.index(name.split("/")[1]))
    stored = torch.from_numpy(np.stack(images))[:, None]
    return (stored / 255 - MEAN) / STD, torch.tensor(labels)


def build() -> nn.Module:
    """The network; job.yaml names the same class and arguments."""
    network: nn.Module = ResNet(
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=[32, 64, 128, 256],
        spatial_dims=2,
        n_input_channels=1,
        conv1_t_size=3,
        num_classes=len(CLASSES),
    )
    return network


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 64) -> None:
    """Fit the network to images (N, 1, 28, 28) and labels (N,)."""
    network = network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    batches = max(1, len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * batches)

    began = time.monotonic()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for chosen in torch.randperm(len(images))[: batches * batch].chunk(batches):
            shown = augmented(images[chosen]).to(memory_format=torch.channels_last)
            loss = functional.cross_entropy(network(shown), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch:>2}/{epochs}  loss {total / batches:.3f}  {time.monotonic() - began:5.1f} s", flush=True)


def augmented(images: Tensor) -> Tensor:
    """A random view of each image: moved, turned and scaled a little, never mirrored."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.4  # radians
    scale = 1 + (torch.rand(count) - 0.5) * 0.3
    shift = (torch.rand(count, 2) - 0.5) * 0.3
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (N, H, W, 2)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def top1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose most likely class is the right one."""
    network.eval()
    found = torch.cat([network(some).argmax(1) for some in images.split(250)])
    return (found == labels).double().mean().item()


if __name__ == "__main__":
    main()
