"""What a teacher is worth: the same student, trained for the same steps with its soft targets and without.

    python -m benchmarks.distillation [--examples brain_mri digits] [--seeds 3] [--fractions 0.1 0.3 1]

A fraction is the share of the training samples that the student is given with their labels; fewer samples are seen
more often, so that every student takes about as many steps, and the two that are compared exactly as many. No epoch is
chosen: the last averaged weights are taken, and the evaluation part is looked at once, by each student in the table.

Before that the settings are chosen: a student of a seed of its own is trained with each of a few on four fifths of
the training samples, and scored on the others; first alone, for the learning rate, then taught with that one,
for temperature and alpha. Each run is written down as it ends, so that the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from benchmarks.training_context import training_context
from shared.recipe import Augmentation, ModelFormat, Recipe, SoftTargets, TorchSource, Training
from worker.architectures import new_module
from worker.context import Model, StageContext
from worker.data import Samples, open_samples
from worker.engines.eager import EagerRunner
from worker.environment import environment
from worker.evaluation.metrics import evaluate
from worker.loading import load_module
from worker.material import split
from worker.training import train
from worker.width import narrower

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WIDTH = 0.25
CHOOSING_SEED, CHOOSING_FRACTION, CHOOSING_RATIO = 100, 0.3, 0.2
RATES = [4e-3, 2e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2]  # the first is the examples' own
GRID = [(2.0, 0.5), (2.0, 0.9), (4.0, 0.5), (4.0, 0.9)]  # temperature, alpha
EPOCHS = {"brain_mri": 60, "digits": 10}  # over the whole of the training samples
LIVELY = {
    "brain_mri": Augmentation(flips=["horizontal"], shift_ratio=0.05, intensity=0.1, noise=0),
    "digits": Augmentation(shift_ratio=0.1, intensity=0.1, noise=0),
}


@dataclass(frozen=True)
class Lesson:
    """How a student learns. Alpha 0: from the labels alone."""

    epochs: int
    learning_rate: float
    temperature: float = 1.0
    alpha: float = 0.0


@dataclass(frozen=True)
class Run:
    """One student: which, how it learnt, and what it reached on which part."""

    example: str
    part: str
    fraction: float
    seed: int
    epochs: int
    learning_rate: float
    temperature: float
    alpha: float
    metric: float
    teacher: float
    seconds: float

    @property
    def order(self) -> tuple[Any, ...]:
        """What was asked for."""
        return self.example, self.part, self.fraction, self.seed, *dataclasses.astuple(self.lesson)

    @property
    def lesson(self) -> Lesson:
        return Lesson(self.epochs, self.learning_rate, self.temperature, self.alpha)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", nargs="+", choices=sorted(LIVELY), default=sorted(LIVELY))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.1, 0.3, 1.0])
    parser.add_argument("--epochs", type=int, help="instead of each example's own number")
    parser.add_argument("--teacher-epochs", type=int, help="instead of the example's own number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "distillation")
    parser.add_argument("--out", type=Path, default=RESULTS / "distillation.md")
    options = parser.parse_args()

    options.work.mkdir(parents=True, exist_ok=True)
    runs = []
    for example in options.examples:
        bench = _Example(example, options.work / example, options.threads, options.teacher_epochs)
        epochs = options.epochs or EPOCHS[example]
        alone, tried = bench.choose([Lesson(epochs, rate) for rate in RATES])
        taught, tried_then = bench.choose([Lesson(epochs, alone.learning_rate, *soft) for soft in GRID])
        runs += tried + tried_then
        for fraction in options.fractions:
            for seed in range(options.seeds):
                runs += [bench.run("evaluation", fraction, seed, lesson) for lesson in (alone, taught)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(_page(runs, options), encoding="utf-8")
    print(f"wrote {options.out}")


class _Example:
    """One example's teacher, student and data."""

    def __init__(self, name: str, directory: Path, threads: int, teacher_epochs: int | None) -> None:
        self.name, self.directory, self.threads = name, directory, threads
        self.journal = directory / "runs.jsonl"
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

    def choose(self, lessons: Sequence[Lesson]) -> tuple[Lesson, list[Run]]:
        """The lesson that kept-out samples find best, of equals the first; and all that were tried."""
        tried = [self.run("kept out", CHOOSING_FRACTION, CHOOSING_SEED, lesson) for lesson in lessons]
        return _best(tried).lesson, tried

    def run(self, part: str, fraction: float, seed: int, lesson: Lesson) -> Run:
        """Train one student and score it on the part; what an earlier call has done is read from the journal."""
        asked = (self.name, part, fraction, seed, *dataclasses.astuple(lesson))
        for line in self.journal.read_text(encoding="utf-8").splitlines() if self.journal.exists() else []:
            if (done := Run(**json.loads(line))).order == asked:
                return done
        began = time.monotonic()
        learnt, judged = self._parts(part)
        network = self._trained(self._few(learnt, fraction, seed), fraction, seed, lesson)
        found, teacher = self._score(network, judged), self._score(load_module(self.source), judged)
        run = Run(
            example=self.name,
            part=part,
            fraction=fraction,
            seed=seed,
            epochs=lesson.epochs,
            learning_rate=lesson.learning_rate,
            temperature=lesson.temperature,
            alpha=lesson.alpha,
            metric=found,
            teacher=teacher,
            seconds=time.monotonic() - began,
        )
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(run)) + "\n")
        print(run, flush=True)
        return run

    def _parts(self, part: str) -> tuple[Samples, Samples]:
        """What is learnt from, and what is scored on: the evaluation part, or training samples that are kept out."""
        train = self._samples("train")
        if part == "evaluation":
            return train, self._samples("evaluation")
        learnt, kept_out = split(train, CHOOSING_RATIO)
        return _at(train, learnt.positions), _at(train, kept_out.positions)

    def _trained(self, samples: Samples, fraction: float, seed: int, lesson: Lesson) -> nn.Module:
        assert self.source.architecture is not None
        student = narrower(self.source.architecture, WIDTH)
        assert student is not None
        torch.manual_seed(seed)
        network = new_module(student)
        batch = 8 if self.recipe.task.kind == "segmentation" else 64
        training = Training(
            epochs=round(lesson.epochs / fraction),
            batch=min(batch, len(samples)),
            learning_rate=lesson.learning_rate,
            augmentation=LIVELY[self.name],
            schedule="one_cycle",
            weight_decay=1e-4,
            ema_decay=0.98,
        )
        taught: dict[str, Any] = {}
        if lesson.alpha:
            soft = SoftTargets(temperature=lesson.temperature, alpha=lesson.alpha, teacher="always")
            taught = {"teacher": load_module(self.source), "soft_targets": soft}
        train(network, training, self._context(samples, seed), **taught)
        return network

    def _score(self, network: nn.Module, samples: Samples) -> float:
        runner = EagerRunner(network, self.threads)
        return evaluate(runner.run, samples, self.recipe.task).means[self.recipe.task.metrics[0]]

    def _few(self, samples: Samples, fraction: float, seed: int) -> Samples:
        """A random share of the samples, the same with a teacher and without."""
        count = max(2, round(fraction * len(samples)))
        return _at(samples, np.random.default_rng(seed).permutation(len(samples))[:count].tolist())

    def _samples(self, part: str) -> Samples:
        format = self.data.suffix.removeprefix(".")
        return open_samples(self.data, format, part, self.recipe.data, self.recipe.task)

    def _context(self, chosen: Samples, seed: int) -> StageContext:
        return training_context(
            self.recipe, self.source, lambda part: chosen, self.directory, seed=seed, threads=self.threads
        )


def _at(samples: Samples, order: Sequence[int]) -> Samples:
    read_input, read_target = samples.read_input, samples.read_target
    assert read_target is not None
    return dataclasses.replace(
        samples,
        num_samples=len(order),
        read_input=lambda index: read_input(order[index]),
        read_target=lambda index: read_target(order[index]),
    )


def _script(example: str, script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / example / script), *arguments], check=True)


# ---------------------------------------------------------------- the page


def _page(runs: Sequence[Run], options: argparse.Namespace) -> str:
    """The table, the environment, and in words where the teacher helped and where it did not."""
    lines = ["# What a teacher is worth", "", *_method(options), ""]
    lines += ["| example | labels | teacher | student alone | student taught | gain, points | seeds won |"]
    lines += ["|---|---|---|---|---|---|---|"]
    verdicts = []
    scored = [run for run in runs if run.part == "evaluation"]
    for example, fraction in dict.fromkeys((run.example, run.fraction) for run in scored):
        here = [run for run in scored if (run.example, run.fraction) == (example, fraction)]
        alone = {run.seed: 100 * run.metric for run in here if not run.alpha}
        taught = {run.seed: 100 * run.metric for run in here if run.alpha}
        gains = [taught[seed] - alone[seed] for seed in alone]
        won = sum(gain > 0 for gain in gains)
        lines.append(
            f"| {example} | {fraction:.0%} | {100 * here[0].teacher:.2f} | {_spread(alone.values())} | "
            f"{_spread(taught.values())} | {np.mean(gains):+.2f} | {won} of {len(gains)} |"
        )
        verdicts.append(f"- {example}, {fraction:.0%} of the labels: {_verdict(gains)}")
    lines += ["", "Mean and, in brackets, lowest to highest over the seeds.", "", *verdicts, ""]
    return "\n".join([*lines, *_choice([run for run in runs if run.part == "kept out"])]) + "\n"


def _method(options: argparse.Namespace) -> list[str]:
    here = environment()
    return [
        f"The same student ({WIDTH:g} of the source's channels), the same seed, samples, augmentation and number of "
        "steps, with the source as teacher and without. Mean Dice or top-1 of the evaluation part, in points, with the "
        "last averaged weights: no epoch was chosen. The teacher has seen the labels of all training samples, whatever "
        "the student is given: who has a trained network to make smaller may have few labels at hand. It is shown the "
        "student's own samples only. What it could say of the other images, whose labels the student does not have, "
        "was not measured.",
        "",
        "Written by `make bench-distillation`.",
        "",
        f"- {here.cpu}, {here.cores} cores, {options.threads} thread; GPU: {here.gpu or 'none'}",
        f"- torch {torch.__version__}, Python {here.python}",
    ]


def _choice(tried: Sequence[Run]) -> list[str]:
    """What the choice rests on: each setting, its score, and which were taken."""
    lines = ["## How the settings were chosen", ""]
    lines += [
        f"With seed {CHOOSING_SEED}, none of the table's, and {CHOOSING_FRACTION:.0%} of the labels; scored on the "
        f"{CHOOSING_RATIO:.0%} of the training samples (blocks of slices, samples of each digit), from which these "
        "students had not learnt. "
        "First the learning rate, for the student alone; then, with that one, temperature and alpha. The best was "
        "taken, of equals the first. The evaluation part had no say; epochs were set by the time there was. "
        "Higher rates joined the list while its last was the best for the brain; a table of the evaluation part with "
        f"{RATES[0]:g} alone had been seen by then. One seed "
        "and few samples tell small differences from chance no better than the table above does. What the choice rests "
        "on:",
        "",
        "| example | epochs | learning rate | temperature | alpha | score |",
        "|---|---|---|---|---|---|",
    ]
    for run in tried:
        rivals = [other for other in tried if other.example == run.example and bool(other.alpha) == bool(run.alpha)]
        score = f"{100 * run.metric:.2f}"
        soft = f"{run.temperature:g} | {run.alpha:g}" if run.alpha else "alone |"
        lines.append(
            f"| {run.example} | {run.epochs} | {run.learning_rate:g} | {soft} | "
            f"{f'**{score}**' if run == _best(rivals) else score} |"
        )
    return lines


def _best(tried: Sequence[Run]) -> Run:
    return max(tried, key=lambda run: run.metric)


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
