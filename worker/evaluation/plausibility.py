"""Whether the source model does what its owner thinks: most jobs that go wrong do so by their preprocessing."""

from __future__ import annotations

from shared import metrics
from shared.errors import StageFailed
from shared.metrics import METRICS
from shared.recipe import Recipe, Task
from shared.report import Measurement
from worker.evaluation.metrics import Evaluation

CLEARLY = 0.05  # of a ratio, or relative of a distance: what a source model may fall short of its expected metric
CHECK = "Check preprocessing (scale, mean, std, channels, layout), the order of the classes, and the weights."
HARDLY = 0.1  # Dice of a class that is hardly found


def check_expectations(recipe: Recipe, source: Measurement) -> None:
    """Raises StageFailed (source_below_expectation) where the source model is clearly worse than `expect` says."""
    for name, expected in recipe.expect.items():
        reached = source.metrics.get(name)
        if reached is None:
            continue
        allowed = CLEARLY if METRICS[name].unit == "ratio" else CLEARLY * expected
        if metrics.loss_of(name, expected, reached) > allowed:
            unit = "points" if METRICS[name].unit == "ratio" else "mm or pixels"
            raise StageFailed(
                f"The source model reaches {metrics.shown(name, reached):.1f} {unit} of {name} on the evaluation part; "
                f"{metrics.shown(name, expected):.1f} were expected.",
                hint=CHECK,
                code="source_below_expectation",
            )


def doubts(evaluation: Evaluation, task: Task) -> list[str]:
    """Sentences on a source model that decides by chance, or always the same."""
    if task.kind == "classification":
        return _classification(evaluation, task)
    if task.key in ("segmentation", "multilabel voxels"):
        return _structures(evaluation, task)
    if task.key == "multilabel images":
        auroc = evaluation.means.get("auroc")
        if auroc is not None and auroc <= 0.5:
            return [f"The source model tells no label better than chance (mean AUROC {auroc:.2f}). {CHECK}"]
    return []


def _classification(evaluation: Evaluation, task: Task) -> list[str]:
    recalls = {name: row["sensitivity"] for name, row in evaluation.by_class.items() if "sensitivity" in row}
    found = [name for name, recall in recalls.items() if recall > 0]
    if len(recalls) > 1 and len(found) <= 1:
        only = f"every sample for {found[0]!r}" if found else "no sample for its own class"
        return [f"The source model takes {only}. {CHECK}"]
    balanced = evaluation.means.get("balanced_accuracy")
    if balanced is not None and len(recalls) > 1 and balanced <= 1.2 / len(recalls):
        return [
            f"The source model decides nearly by chance: balanced accuracy {100 * balanced:.1f} points, "
            f"{100 / len(recalls):.1f} by guessing. {CHECK}"
        ]
    return []


def _structures(evaluation: Evaluation, task: Task) -> list[str]:
    dice = {name: row["dice"] for name, row in evaluation.by_class.items() if "dice" in row}
    if task.background is not None:
        dice.pop(task.classes[task.background], None)
    hardly = [name for name, value in dice.items() if value < HARDLY]
    if dice and len(hardly) == len(dice):
        return [f"The source model finds hardly anything of {', '.join(hardly)}. {CHECK}"]
    return []
