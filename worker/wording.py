"""The sentences of a report: what a stage misses, and a job's headline; and how a text is made fit to be stored."""

from __future__ import annotations

import re
from collections.abc import Sequence

from shared.evidence import TOO_FEW
from shared.figures import goal_name, interval, needed, quantity, reached, wanted
from shared.judging import FASTER, gains, is_faster, speedup_of
from shared.recipe import Quantize, Recipe
from shared.report import Agreement, Baseline, GoalResult, Measurement, StageReport

UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # shared/storable.py says why


def legible(text: str, most: int | None = None) -> str:
    """The text as the ledger can keep it: what it cannot is shown as an escape; one that is too long is cut."""
    shown = UNSTORABLE.sub(lambda found: ascii(found[0])[1:-1], text)
    return shown if most is None or len(shown) <= most else shown[: most - 1] + "…"


# ---------------------------------------------------------------- goals


def why_missed(gate: Sequence[GoalResult], agreement: Agreement | None) -> str | None:
    """What a stage's result misses, as one sentence; None if nothing."""
    if agreement is not None and not agreement.passed:
        return f"its outputs are not those of the network it was made of: {agreement.reason}"
    return missed_words([result for result in gate if result.outcome == "missed"]) or None


def missed_words(missed: Sequence[GoalResult]) -> str:
    """Goals with what was reached: "max_drop of dice: 2.31 points, at most 1 point wanted"."""
    return "; ".join(f"{goal_name(one)}: {reached(one)}, {wanted(one.goal)} wanted" for one in missed)


# ---------------------------------------------------------------- the headline


def headline(
    recipe: Recipe,
    baseline: Baseline,
    reports: Sequence[StageReport],
    final: int | None,
    goals: Sequence[GoalResult],
) -> str:
    """The verdict in words: what is delivered, what it misses or could not show, and what a reader must know beside."""
    delivered = None if final is None else reports[final]
    sentences = [_delivered(delivered, goals), *_not_faster(baseline, delivered)]
    sentences.append(_of_no_use(recipe, reports, delivered))
    if not recipe.goals:
        sentences.append(f"The recipe names no goal, so {_assumed(recipe)} was assumed.")
    return " ".join([*(sentence for sentence in sentences if sentence), *baseline.doubts])


def _delivered(delivered: StageReport | None, goals: Sequence[GoalResult]) -> str:
    if delivered is None:
        return "Nothing is delivered: no stage left a model that is right, so your own is the best there is."
    begin = f"The model of stage {delivered.position} ({delivered.kind}) is delivered"
    missed = [result for result in goals if result.outcome == "missed"]
    lacking = [f"there is no engine for {target.target}" for target in delivered.targets if target.engine is None]
    if missed or lacking:
        misses = [f"it misses {missed_words(missed)}"] if missed else []
        return f"{begin}, but {'; '.join(misses + lacking)}."
    unknown = [goal_name(result) for result in goals if result.outcome == "not_evaluated"]
    unknown += [
        f"the engine for {one.target}" for one in delivered.targets if one.engine is not None and not one.evaluated
    ]
    if unknown:
        return f"{begin}; not evaluated: {', '.join(dict.fromkeys(unknown))}."
    not_shown = [result for result in goals if result.outcome == "not_shown"]
    if not_shown:
        return f"{begin}; its figures lie inside every goal, but that is not shown: {unshown_words(not_shown)}."
    return f"{begin}; it meets every goal." if goals else f"{begin}; its outputs are close to your model's."


def unshown_words(results: Sequence[GoalResult]) -> str:
    """max_drop of dice is 0.2 points, but may be 1.5 points (at most 1 point wanted; …)."""
    words = []
    for result in results:
        assert result.bound is not None
        figures = f"{reached(result)}, but may be {quantity(result.goal, result.bound)}"
        if result.method == TOO_FEW:
            figures = f"{reached(result)}, measured on too few independent samples to say how sure that is"
        words.append(f"{goal_name(result)} is {figures} ({wanted(result.goal)} wanted{_settled_by(result)})")
    return "; ".join(words)


def _settled_by(result: GoalResult) -> str:
    if result.method == TOO_FEW:
        return ""
    if result.needed:
        return f"; {needed(result)} would settle it"
    if result.compared is not None:
        return f"; no more than {result.compared} samples are compared"
    return "; no number of samples would show it" if result.goal.is_quality else ""


def _not_faster(baseline: Baseline, delivered: StageReport | None) -> list[str]:
    """A sentence on each delivered engine that is not faster than the source model, whatever the goals."""
    rows = {} if delivered is None else {one.target: one.measurement for one in delivered.targets if one.evaluated}
    if len(rows) < 2:
        row = None if delivered is None else delivered.measurement
        return [] if row is None or is_faster(row) else [_how_slow(baseline, row)]
    return [
        _how_slow(baseline, row, target) for target, row in rows.items() if row is not None and not is_faster(row)
    ]


def _how_slow(baseline: Baseline, row: Measurement, target: str | None = None) -> str:
    subject, by = ("It", "") if target is None else (f"The engine for {target}", f" by the engine for {target}")
    ratio = speedup_of(row)
    if ratio is None:
        return f"How fast {subject[0].lower()}{subject[1:]} is was not measured."
    spread = f"95 %: {interval(ratio)}; " if interval(ratio) else ""
    speed = f"{ratio.value:.2f}x ({spread}from {FASTER:g}x on it is called faster)"
    if gains(baseline.source, row):
        return f"{subject} is not faster than your own model: {speed}."
    return f"Nothing is gained{by}: it is not 5 % smaller than your own model, and not faster: {speed}."


def _of_no_use(recipe: Recipe, reports: Sequence[StageReport], delivered: StageReport | None) -> str:
    """Which stages left nothing in what is delivered, and whether that is the source model itself."""
    dropped = [stage for stage in reports if stage.status in ("dropped", "skipped")]
    sentences = []
    if dropped:
        were = "was" if len(dropped) == 1 else "were"
        reasons = "; ".join(f"{stage.kind}: {(stage.reason or 'no reason is known').rstrip('.')}" for stage in dropped)
        sentences.append(f"{len(dropped)} of {len(reports)} stages {were} dropped ({reasons})")
    for stage, words in zip(reports, recipe.stages, strict=False):
        if isinstance(words, Quantize) and stage not in dropped and not _has_bits_of(words, delivered):
            bits = words.scheme.partition("_")[0]
            sentences.append(f"No {bits} engine was both right and the fastest")
            dropped.append(stage)
    trained = any(stage.kind in ("distill", "prune") and stage not in dropped for stage in reports)
    quantized = any(stage.kind == "quantize" and stage not in dropped for stage in reports)
    if sentences and delivered is not None and delivered.measurement is not None and not trained and not quantized:
        precision = delivered.measurement.method.precision
        sentences[-1] += f": the model is your own, {'unchanged' if precision == 'fp32' else f'in {precision}'}"
    return " ".join(f"{sentence}." for sentence in sentences)


def _has_bits_of(quantize: Quantize, delivered: StageReport | None) -> bool:
    """Whether what is delivered was made of what the stage left; taken for granted where no engine was chosen."""
    if delivered is None or not delivered.targets or delivered.measurement is None:
        return True
    precision = delivered.measurement.method.precision
    return precision == "fp16" if quantize.scheme == "fp16" else "int8" in precision


def _assumed(recipe: Recipe) -> str:
    if not recipe.assumed_goals:
        return "closeness to the source model's outputs"
    goal = recipe.assumed_goals[0]
    return f"a loss of {wanted(goal)} of {goal.metric}"


def warnings_of(reports: Sequence[StageReport]) -> list[str]:
    """What the stages warn of, in their order: that a teacher was of no use."""
    found = []
    for stage in reports:
        logs = [stage.details, *(log for log in stage.details.get("training") or [] if isinstance(log, dict))]
        warnings = [log["teacher_warning"] for log in logs if log.get("teacher_warning")]
        found += [f"Stage {stage.position} ({stage.kind}): {warning}" for warning in dict.fromkeys(warnings)]
    return found
