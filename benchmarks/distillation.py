"""What a teacher is worth: the same student, trained for the same steps with its soft targets and without.

    python -m benchmarks.distillation [--examples brain_mri digits] [--seeds 3] [--fractions 0.1 0.3 1] [--epochs 40]

A fraction is the share of the training samples that the student is given with their labels; fewer samples are seen
more often, so that every student takes the same number of steps. Nothing is kept out to choose an epoch by: the last
averaged weights are taken, and the evaluation part is looked at once. Each run is written down as it ends, so that the
same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from shared.recipe import Augmentation, ModelFormat, Recipe, SoftTargets, TorchSource, Training
from worker import engines
from worker.architectures import new_module
from worker.benchmark import measure
from worker.context import Model, StageContext
from worker.data import Samples, open_samples
from worker.engines.eager import EagerRunner
from worker.environment import environment
from worker.evaluate import evaluate
from worker.loading import load_module
from worker.training import train
from worker.width import narrower

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WIDTH = 0.25
LIVELY = {
    "brain_mri": Augmentation(flips=["horizontal"], shift_ratio=0.05, intensity=0.1),
    "digits": Augmentation(shift_ratio=0.1, intensity=0.1),
}


@dataclass(frozen=True)
class Run:
    """One student: which, how it was taught, and what it reached on the evaluation part."""

    example: str
    fraction: float
    seed: int
    taught: bool
    epochs: int
    temperature: float
    alpha: float
    metric: float
    teacher: float
    seconds: float

    def order(self) -> tuple[Any, ...]:
        soft = (self.temperature, self.alpha) if self.taught else None
        return (self.example, self.fraction, self.seed, self.taught, self.epochs, soft)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", nargs="+", choices=sorted(LIVELY), default=sorted(LIVELY))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.1, 0.3, 1.0])
    parser.add_argument("--epochs", type=int, default=40, help="over the whole of the training samples")
    parser.add_argument("--teacher-epochs", type=int, help="instead of the example's own number")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "distillation")
    parser.add_argument("--out", type=Path, default=RESULTS / "distillation.md")
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    soft = SoftTargets(temperature=options.temperature, alpha=options.alpha)
    journal = options.work / "runs.jsonl"
    done = {run.order(): run for run in _read(journal)}
    for example in options.examples:
        bench = _Example(example, options.work / example, options.threads, options.teacher_epochs)
        for fraction in options.fractions:
            for seed in range(options.seeds):
                for taught in (False, True):
                    key = (example, fraction, seed, taught, options.epochs, _key(soft) if taught else None)
                    if key in done:
                        continue
                    run = bench.run(fraction, seed, soft if taught else None, options.epochs)
                    with journal.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(dataclasses.asdict(run)) + "\n")
                    done[run.order()] = run
                    print(run, flush=True)
    wanted = [
        run
        for run in done.values()
        if run.epochs == options.epochs
        and run.example in options.examples
        and (not run.taught or (run.temperature, run.alpha) == _key(soft))
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(_page(wanted, options), encoding="utf-8")
    print(f"wrote {options.out}")


def _key(soft: SoftTargets) -> tuple[float, float]:
    return (soft.temperature, soft.alpha)


def _read(journal: Path) -> list[Run]:
    if not journal.exists():
        return []
    return [Run(**json.loads(line)) for line in journal.read_text(encoding="utf-8").splitlines()]


class _Example:
    """One example's teacher, student and data."""

    def __init__(self, name: str, directory: Path, threads: int, teacher_epochs: int | None) -> None:
        self.name, self.directory, self.threads = name, directory, threads
        document = yaml.safe_load((ROOT / "examples" / name / "job.yaml").read_text(encoding="utf-8"))["recipe"]
        weights = directory / Path(document["source"]["weights"]).name
        self.data = directory / Path(document["data"]["artifact"]).name
        if not weights.exists():
            _script(name, "prepare.py", "--out", str(directory))
            told = ["--data", str(self.data), "--out", str(weights), "--threads", str(threads)]
            _script(name, "train.py", *told, *([] if teacher_epochs is None else ["--epochs", str(teacher_epochs)]))
        document["source"]["weights"] = document["data"]["artifact"] = str(uuid.uuid4())
        document["benchmark"] = {"runs": 10, "warm_up": 1, "batches": [1]}
        self.recipe = Recipe.model_validate(document)
        assert isinstance(self.recipe.source, TorchSource)
        self.source = Model(ModelFormat.TORCH, weights, self.recipe.source.architecture)
        runner = engines.load("torch eager").open(self.source, threads)
        self.baseline = measure(self.source, runner, self._samples("evaluation"), self.recipe)

    def run(self, fraction: float, seed: int, soft: SoftTargets | None, epochs: int) -> Run:
        """Train one student, with a teacher's soft targets if there are any, and evaluate it."""
        began = time.monotonic()
        assert self.source.architecture is not None
        student = narrower(self.source.architecture, WIDTH)
        assert student is not None
        torch.manual_seed(seed)
        network = new_module(student)
        lesson: dict[str, Any] = {} if soft is None else {"teacher": load_module(self.source), "soft_targets": soft}
        batch = 8 if self.recipe.task.kind == "segmentation" else 64
        chosen = self._few(fraction, seed)
        training = Training(
            epochs=round(epochs / fraction),
            batch=min(batch, len(chosen)),
            learning_rate=4e-3,
            augmentation=LIVELY[self.name],
            validation_ratio=0.0,
        )
        train(network, training, self._context(chosen, seed), **lesson)
        runner = EagerRunner(network, self.threads)
        metric = self.recipe.task.metrics[0]
        found = evaluate(runner.run, self._samples("evaluation"), self.recipe.task)[0][metric]
        seconds = time.monotonic() - began
        told = (0.0, 0.0) if soft is None else _key(soft)
        teacher = self.baseline.metrics[metric]
        return Run(self.name, fraction, seed, soft is not None, epochs, *told, found, teacher, seconds)

    def _few(self, fraction: float, seed: int) -> Samples:
        """A random share of the training samples, the same with a teacher and without."""
        samples = self._samples("train")
        count = max(2, round(fraction * len(samples)))
        order = np.random.default_rng(seed).permutation(len(samples))[:count].tolist()
        read_input, read_target = samples.read_input, samples.read_target
        assert read_target is not None
        return dataclasses.replace(
            samples,
            num_samples=count,
            read_input=lambda index: read_input(order[index]),
            read_target=lambda index: read_target(order[index]),
        )

    def _samples(self, part: str) -> Samples:
        format = self.data.suffix.removeprefix(".")
        return open_samples(self.data, format, part, self.recipe.data, self.recipe.task)

    def _context(self, chosen: Samples, seed: int) -> StageContext:
        return StageContext(
            recipe=self.recipe,
            directory=self.directory,
            samples=lambda part: chosen,
            source=self.source,
            reference=self.directory / "reference.npy",
            baseline=self.baseline,
            progress=lambda fraction, message="": None,
            checkpoints=_Nothing(),
            seed=seed,
            threads=self.threads,
        )


class _Nothing:
    """No memory: a run that is cut off begins again."""

    def load(self, name: str) -> Path | None:
        return None

    def save(self, name: str, path: Path) -> None:
        path.unlink()


def _script(example: str, script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / example / script), *arguments], check=True)


# ---------------------------------------------------------------- the page


def _page(runs: Iterable[Run], options: argparse.Namespace) -> str:
    """The table, the environment, and in words where the teacher helped and where it did not."""
    found = sorted(runs, key=Run.order)
    lines = ["# What a teacher is worth", "", *_method(options), ""]
    lines += ["| example | labels | teacher | student alone | student taught | gain, points | seeds won |"]
    lines += ["|---|---|---|---|---|---|---|"]
    verdicts = []
    for example in dict.fromkeys(run.example for run in found):
        for fraction in dict.fromkeys(run.fraction for run in found if run.example == example):
            here = [run for run in found if (run.example, run.fraction) == (example, fraction)]
            alone = {run.seed: 100 * run.metric for run in here if not run.taught}
            taught = {run.seed: 100 * run.metric for run in here if run.taught}
            gains = [taught[seed] - alone[seed] for seed in sorted(alone.keys() & taught.keys())]
            if not gains:
                continue
            won = sum(gain > 0 for gain in gains)
            lines.append(
                f"| {example} | {fraction:.0%} | {100 * here[0].teacher:.2f} | {_spread(alone.values())} | "
                f"{_spread(taught.values())} | {np.mean(gains):+.2f} | {won} of {len(gains)} |"
            )
            verdicts.append(f"- {example}, {fraction:.0%} of the labels: {_verdict(gains)}")
    return "\n".join([*lines, "", "Mean and, in brackets, lowest to highest over the seeds.", "", *verdicts]) + "\n"


def _method(options: argparse.Namespace) -> list[str]:
    here = environment()
    return [
        f"The same student ({WIDTH:g} of the source's channels), the same seed, samples, augmentation and number of "
        f"steps ({options.epochs} epochs of all samples), with the source as teacher (temperature "
        f"{options.temperature:g}, alpha {options.alpha:g}) and without. Mean Dice or top-1 of the "
        "evaluation part, in points, with the last averaged weights: no epoch was chosen.",
        "",
        f"- {here.cpu}, {here.cores} cores, {options.threads} threads; GPU: {here.gpu or 'none'}",
        f"- torch {torch.__version__}, Python {here.python}",
    ]


def _spread(values: Iterable[float]) -> str:
    known = list(values)
    return f"{np.mean(known):.2f} ({min(known):.2f} to {max(known):.2f})"


def _verdict(gains: list[float]) -> str:
    if all(gain > 0 for gain in gains):
        return f"the teacher helps, by {np.mean(gains):.2f} points, with every seed."
    if all(gain <= 0 for gain in gains):
        return f"the teacher does not help: {np.mean(gains):+.2f} points, with no seed better."
    return f"no clear winner: {np.mean(gains):+.2f} points, from {min(gains):+.2f} to {max(gains):+.2f}."


if __name__ == "__main__":
    main()
