"""Trains the network that the job makes small and fast: a 2D U-Net for tissue on brain MRI slices.

It reads the data set that prepare.py wrote and leaves the weights as safetensors. The evaluation slices are looked at
once, after the last epoch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

HERE = Path(__file__).parent
CLASSES = ("background", "other", "grey matter", "white matter")
FEATURES = (24, 24, 48, 96, 192, 24)
MEAN, STD = 41.2, 74.2  # of the training images, 0..255; job.yaml says the same
PROGRESS_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE / "build" / "data.safetensors")
    parser.add_argument("--out", type=Path, default=HERE / "build" / "unet.safetensors")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--features", type=int, nargs=6, default=FEATURES, help="channels, as job.yaml has them")
    parser.add_argument("--slices", type=int, help="train on the first few slices only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more are faster, but only on idle cores")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    data = load_file(options.data)
    images, masks = normalized(data["train.images"])[: options.slices], data["train.masks"].long()[: options.slices]
    network = build(options.features)
    print(f"U-Net with {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {len(images)} slices")

    network = train(network, images, masks, options.epochs)
    scores = dice(network, normalized(data["evaluation.images"]), data["evaluation.masks"].long())
    named = ", ".join(f"{name} {score:.3f}" for name, score in zip(CLASSES[1:], scores.tolist(), strict=True))
    print(f"Dice on {len(data['evaluation.images'])} evaluation slices: {scores.mean():.3f} ({named})")

    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, options.out)
    print(f"wrote {options.out}")


def build(features: Sequence[int] = FEATURES) -> nn.Module:
    """The network; job.yaml names the same class and arguments.

    Batch normalization rather than MONAI's default, instance normalization: it folds into the convolutions, so int8
    engines spend no time on it.
    """
    network: nn.Module = BasicUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=len(CLASSES),
        features=features,
        norm="batch",
        act="relu",
    )
    return network


def normalized(images: Tensor) -> Tensor:
    """Stored values (N, 1, H, W), 0..255, to network input."""
    return (images.float() - MEAN) / STD


def train(network: nn.Module, images: Tensor, masks: Tensor, epochs: int, batch: int = 8) -> nn.Module:
    """Fit the network to images (N, 1, H, W) and masks (N, H, W); returns it with its last weights averaged.

    A few dozen slices make single steps noisy: the average is steadier, and better.
    """
    network = network.train().to(memory_format=torch.channels_last)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4)
    batches = max(1, len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * batches)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)

    began = told = time.monotonic()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for chosen in torch.randperm(len(images))[: batches * batch].chunk(batches):
            shown, truth = augmented(images[chosen], masks[chosen])
            loss = loss_of(network(shown.to(memory_format=torch.channels_last)), truth[:, None])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(network)
            total += loss.item()
        now = time.monotonic()
        if epoch in (1, epochs) or now - told >= PROGRESS_SECONDS:
            told = now
            print(f"epoch {epoch:>3}/{epochs}  loss {total / batches:.3f}  {now - began:5.1f} s", flush=True)
    average: nn.Module = averaged.module
    return average


def augmented(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """A random view of each slice: mirrored, moved by whole pixels, with other brightness and contrast."""
    count, _, height, width = images.shape
    seen, truth = images.clone(), masks.clone()
    for position in range(count):
        down, right = (int(torch.randint(-length // 20, length // 20 + 1, ())) for length in (height, width))
        mirror = [-1] if torch.rand(()) < 0.5 else []
        # what leaves on one side comes back on the other: the rim is empty
        seen[position] = images[position].flip(mirror).roll((down, right), (-2, -1))
        truth[position] = masks[position].flip(mirror).roll((down, right), (-2, -1))
    gain, offset = 1 + 0.1 * (2 * torch.rand(count, 1, 1, 1) - 1), 0.1 * (2 * torch.rand(count, 1, 1, 1) - 1)
    return seen * gain + offset, truth


@torch.inference_mode()
def dice(network: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """Dice of every class but the background over all slices together, (classes - 1,)."""
    network.eval()
    found = torch.cat([network(some).argmax(1) for some in images.split(8)])  # (N, H, W)
    one_hot = [functional.one_hot(classes, len(CLASSES)).flatten(0, 2)[:, 1:].double() for classes in (found, masks)]
    return 2 * (one_hot[0] * one_hot[1]).sum(0) / (one_hot[0] + one_hot[1]).sum(0)


if __name__ == "__main__":
    main()
