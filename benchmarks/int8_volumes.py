"""Mixed precision on a volume: a 3D U-Net with BatchNorm and sigmoid heads whose plain int8 is wrong.

    python -m benchmarks.int8_volumes [--steps 250]

The network learns grey matter, white matter and CSF of MNI152 at 3 mm, as three labels, from one part of the brain. In
two of its layers a ReLU's channel is dead from the start, and the weights that read it are large: training moves
neither, the float network loses nothing by them, and in eight bits a filter's other weights vanish beside them. Every
form that the quantize stage makes is built, timed in turns beside the float ones, and scored on another part.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel
import nilearn.datasets
import numpy as np
import numpy.typing as npt
import torch
from monai.networks.nets import BasicUNet
from scipy import ndimage
from torch import nn

from benchmarks.no_memory import NoMemory
from shared.recipe import Benchmark, BuildEngine, Data, ModelFormat, OnnxSource, Quantize, Recipe, Task
from worker import engines, stages
from worker.benchmark import first, ratio, size_bytes, time_in_turns
from worker.candidates import forms
from worker.context import Model, StageContext
from worker.data import Samples
from worker.engines import Runner
from worker.evaluation.metrics import evaluate
from worker.evaluation.once import Evaluations
from worker.feed import Floats

TASK = Task(kind="multilabel", classes=["grey", "white", "csf"], per="voxel", scores="probabilities")
SIDE = 32
CUT = 42  # of the voxels from back to front: learnt from and calibrated on behind, evaluated before
WIDEST = 300.0  # the dead channels' weights, over the largest other one
DEAD = ("conv_0.conv_1", "upcat_1.convs.conv_1")  # each reads what conv_0 of its block puts out


@dataclass(frozen=True)
class Brain:
    """The image (D, H, W), normalized, and the three labels (3, D, H, W)."""

    image: Floats
    labels: npt.NDArray[np.int64]

    def crops(self, part: str, count: int, seed: int) -> Samples:
        rng = np.random.default_rng(seed)
        begin, end = (CUT, self.image.shape[1]) if part == "evaluation" else (0, CUT)
        places = []
        for _ in range(count):
            corner = [
                rng.integers(0, size - SIDE + 1) for size in (self.image.shape[0], end - begin, self.image.shape[2])
            ]
            corner[1] += begin
            places.append(tuple(slice(int(low), int(low) + SIDE) for low in corner))
        return Samples(
            part,
            count,
            lambda index: self.image[places[index]][None],
            lambda index: self.labels[(slice(None), *places[index])],
        )


def load_brain() -> Brain:
    directory = Path(nilearn.datasets.__file__).parent / "data"
    t1, grey, white = (_pooled(next(directory.glob(f"mni*{name}*.nii.gz"))) for name in ("t1", "gm", "wm"))
    is_grey, is_white = grey >= 0.5, white >= 0.5
    inside = ndimage.binary_fill_holes(ndimage.binary_closing(is_grey | is_white, iterations=3))
    labels = np.stack([is_grey, is_white, inside & ~is_grey & ~is_white]).astype(np.int64)
    tissue = t1[t1 > 0.05]
    return Brain(((t1 - tissue.mean()) / tissue.std()).astype(np.float32), labels)


def _pooled(path: Path, factor: int = 3) -> Floats:
    """Means over cubes of 3 mm, of values scaled to at most one."""
    volume = nibabel.load(path).get_fdata().astype(np.float32)
    d, h, w = (size // factor for size in volume.shape)
    cubes = volume[: d * factor, : h * factor, : w * factor].reshape(d, factor, h, factor, w, factor)
    found: Floats = cubes.mean(axis=(1, 3, 5)) / volume.max()
    return found


# ---------------------------------------------------------------- the network


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = BasicUNet(
            spatial_dims=3, in_channels=1, out_channels=3, features=(16, 16, 32, 64, 128, 16), norm="batch", act="relu"
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.unet(inputs))


def trained(brain: Brain, steps: int) -> Network:
    torch.manual_seed(0)
    network = Network()
    _deaden(network)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    crops, rng = brain.crops("train", 2 * steps, seed=0), np.random.default_rng(0)
    for step in range(steps):
        inputs = torch.from_numpy(crops.inputs(2 * step, 2 * step + 2))
        targets = torch.from_numpy(np.asarray(crops.targets(2 * step, 2 * step + 2), dtype=np.float32))
        if rng.random() < 0.5:
            inputs, targets = inputs.flip(2), targets.flip(2)
        logits = network.unet(inputs * (1 + 0.1 * torch.randn(1)) + 0.05 * torch.randn_like(inputs))
        found, axes = logits.sigmoid(), (2, 3, 4)
        dice = (2 * (found * targets).sum(axes) + 1) / (found.sum(axes) + targets.sum(axes) + 1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets) + 1 - dice.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def _deaden(network: Network) -> None:
    """Channel 0 before each of the layers is zero behind its ReLU, whatever comes; what reads it is large."""
    for name in DEAD:
        before = network.unet.get_submodule(name.removesuffix("conv_1") + "conv_0")
        norm = before.get_submodule("adn.N")
        norm.weight[0], norm.bias[0] = 0, -1
        weight = network.unet.get_submodule(name).conv.weight
        weight[:, 0] = WIDEST * weight.abs().max()


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Row:
    name: str
    runner: Runner
    size: int


def compare(network: Network, brain: Brain, directory: Path) -> None:
    source = Model(ModelFormat.ONNX, directory / "source.onnx")
    example = (torch.zeros(2, 1, SIDE, SIDE, SIDE),)
    torch.onnx.export(
        network,
        example,
        source.path,
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=[{0: torch.export.Dim("batch")}],
    )
    parts = {"calibration": brain.crops("calibration", 48, seed=1), "evaluation": brain.crops("evaluation", 24, seed=2)}
    stage = Quantize(calibration_samples=24)
    recipe = Recipe(
        source=OnnxSource(onnx=uuid.uuid4()), task=TASK, data=Data(artifact=uuid.uuid4()), stages=[stage, BuildEngine()]
    )
    runner: Runner = engines.load("onnxruntime").open(source, 1)
    evaluations = Evaluations(recipe, parts.__getitem__, lambda: (source, runner))
    context = StageContext(
        recipe=recipe,
        directory=directory,
        samples=parts.__getitem__,
        source=source,
        reference=directory / "reference.npy",
        evaluate=partial(evaluations.of, directory / "reference.npy"),
        onnxruntime=lambda: (source, runner),
        baseline=None,
        progress=lambda fraction, message="": None,
        checkpoints=NoMemory(),
        timings=NoMemory(),
        seed=0,
        threads=1,
    )
    begin = time.monotonic()
    model = stages.load("quantize").run(stage, source, context).model
    print(f"quantize: {time.monotonic() - begin:.0f} s")
    _print_table([Row("source", runner, source.path.stat().st_size), *_built(model, directory)], parts["evaluation"])


def _built(model: Model, directory: Path) -> list[Row]:
    rows = []
    for engine in ("onnxruntime", "openvino"):
        runtime = engines.load(engine)
        for form, name in forms(model, engine):
            place = directory / "-".join(("built", engine, form.precision, name))
            place.mkdir()
            built = Model(ModelFormat.ENGINE, runtime.build(form, place), precision=form.precision)
            label = f"{engine} {form.precision} {name}"
            rows.append(Row(label, runtime.open(built, 1), size_bytes(built, engine)))
    return rows


def _print_table(rows: list[Row], evaluation: Samples) -> None:
    timed = time_in_turns([row.runner for row in rows], first(evaluation, 1), Benchmark(warm_up=3, runs=20))
    print("| engine | size | latency | faster than the source | Dice |\n|---|---|---|---|---|")
    for row, its in zip(rows, timed, strict=True):
        size, dice = row.size / rows[0].size, evaluate(row.runner.run, evaluation, TASK).means["dice"]
        faster = ratio(timed[0], its)
        print(f"| {row.name} | {size:.0%} | {its.p50:.1f} ms | {faster.value:.2f} | {100 * dice:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    brain = load_brain()
    begin = time.monotonic()
    network = trained(brain, arguments.steps)
    print(f"training: {time.monotonic() - begin:.0f} s")
    with tempfile.TemporaryDirectory() as directory:
        compare(network, brain, Path(directory))


if __name__ == "__main__":
    main()
