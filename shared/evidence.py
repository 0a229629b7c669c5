"""How much a number of samples can show: what an evaluation part can show at all, and what would settle a verdict.

Samples stand for groups here where samples belong together. worker/evaluation/statistics.py makes the bounds.
"""

from __future__ import annotations

import math

from shared.metrics import METRICS
from shared.subject import Task

Z = 1.6448536269514722  # of a one-sided 95 % bound
LEVEL = 0.05
# Samples that fail may be absent from those that were tried. Of a metric that scores samples, a bound allows for 20
# points lost by each of as many samples as may go unseen with a probability of 5 %.
UNSEEN_LOSS = 0.2
ASSUMED_SPREAD = 0.02  # standard deviation of the paired loss of a sample, where nothing is measured yet
NEVER = 10_000
TOO_FEW = "too few groups for a bound"  # in place of a method
CLOPPER_PEARSON = "Clopper-Pearson"  # the method of a bound of a share of decisions, one a sample


def unseen_share(num_samples: int) -> float:
    """The share of samples that may fail though none of those tried did, at 95 %: about 3 in `num_samples`."""
    return -math.expm1(math.log(LEVEL) / num_samples)


def smallest_showable_drop(task: Task, num_samples: int) -> float | None:
    """The smallest max_drop of the task's leading metric that so many samples can show where nothing is lost at all.

    top1: no decision differs. Others: the loss of a sample spreads by 2 points, which is an assumption. None for a raw
    task, and without samples.
    """
    if not task.metrics or num_samples < 1:
        return None
    if task.metrics[0] == "top1" or num_samples == 1:
        return unseen_share(num_samples)
    student = Z + (Z**3 + Z) / (4 * (num_samples - 1))  # about Student's t
    return max(student * ASSUMED_SPREAD / math.sqrt(num_samples), UNSEEN_LOSS * unseen_share(num_samples))


def samples_to_show(task: Task, max_drop: float) -> int | None:
    """The fewest samples that can show a max_drop of the task's leading metric; None where no number can."""
    if not task.metrics or max_drop <= 0:
        return None
    fewest, enough = 1, 2
    while (smallest_showable_drop(task, enough) or 0.0) > max_drop:
        fewest, enough = enough, enough * 2
    while enough - fewest > 1:
        middle = (fewest + enough) // 2
        shows = (smallest_showable_drop(task, middle) or 0.0) <= max_drop
        fewest, enough = (fewest, middle) if shows else (middle, enough)
    return enough


def evidence_note(task: Task, num_samples: int, max_drop: float | None = None) -> str | None:
    """One sentence for the submitter of a job: what loss the evaluation part can show, what `max_drop` would take."""
    smallest = smallest_showable_drop(task, num_samples)
    if smallest is None:
        return None
    name = task.metrics[0]
    condition = "if no decision changes" if name == "top1" else "if losses spread by 2 points a sample, as is common"
    can = f"{num_samples} evaluation samples can show that at most {100 * smallest:.2g} points of {name} are lost"
    if max_drop is None or smallest <= max_drop:
        return f"{can}, {condition}."
    needed = samples_to_show(task, max_drop)
    rest = f"it takes about {needed} samples" if needed is not None else "no number of samples can"
    return f"{can}, {condition}; to show a max_drop of {100 * max_drop:g} points {rest}."


def groups_needed(value: float, bound: float, goal: float, groups: int, metric: str | None = None) -> int:
    """About how many groups bring the bound inside the goal, if value and spread stay as they are.

    The distance of bound and value shrinks with the square root of the number of groups. Beside that, failures that
    were not seen must cost no more than the room there is.
    """
    room, margin = abs(goal - value), abs(bound - value)
    if room == 0:
        return groups * NEVER  # the value lies on the goal: no number settles it
    unseen = 1.0 if metric == "top1" else UNSEEN_LOSS if metric in METRICS and METRICS[metric].unit == "ratio" else 0.0
    least = _groups_that_show(room / unseen) if unseen else 1
    if unseen and margin <= unseen * unseen_share(groups) * (1 + 1e-6):
        return least
    if metric == "top1":
        # the score interval, about: margin^2 = z^2 (spread + margin) / groups
        spread = max(groups * margin**2 / Z**2 - margin, 0.0)
        return max(math.ceil(Z**2 * (spread + room) / room**2), least)
    return max(math.ceil(groups * (margin / room) ** 2 - 1e-6), least)


def _groups_that_show(share: float) -> int:
    """The fewest groups of which no larger share may fail unseen."""
    return 1 if share >= 1 else math.ceil(math.log(LEVEL) / math.log1p(-share))
