"""Engines that are compared: built in every form, timed in turns, evaluated from the fastest on, and the best chosen.

An engine whose outputs are broken is never chosen. Of the others, those that meet the job's goals come first, then
those that may miss a goal of agreement on other samples, then those that miss only goals of speed or size, then those
that miss a quality goal, by least first. Among equals the fastest wins; a difference that the stop-watch cannot tell is
a tie, which the smaller engine wins. No precision and no runtime wins everywhere: int8 can be slower than fp32, and one
runtime's int8 wrong where another's is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shared.errors import StageFailed
from shared.judging import judge
from shared.metrics import METRICS
from shared.recipe import ModelFormat
from shared.report import Agreement, Candidate, GoalResult, Measurement
from worker import engines
from worker.benchmark import Complexity, Timed, complexity_of, first, same_speed, time_in_turns, time_quickly
from worker.context import Model, StageContext
from worker.engines import Runner
from worker.evaluation.once import Evaluated, identity
from worker.measurement import Timings, measurement, with_resources
from worker.ranking import FITS, MISSES_RESOURCES, rank, unshown
from worker.wording import missed_words, unshown_words

TIE_RATIO = 1.1  # candidates this close to the fastest right one are evaluated and timed to the end beside it
MAX_FINALISTS = 5
IN_BF16 = {"fp32": "bf16", "int8": "int8+bf16", "int8+fp32": "int8+bf16"}


@dataclass(frozen=True)
class Built:
    """One engine on disk, loaded, and what it was built of. `form` tells forms of one precision apart."""

    model: Model
    portable: Path
    runner: Runner
    form: str = ""

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.runner.engine, self.runner.precision, self.form) if part)


@dataclass
class Contender:
    """A built engine with what is known of it so far: it is measured again as more becomes known."""

    built: Built
    timed: Timed
    measurement: Measurement
    evaluated: Evaluated | None = None
    goals: list[GoalResult] = field(default_factory=list)
    is_finalist: bool = False
    is_finished: bool = False
    why_not: str | None = None  # why it was not evaluated, or could not be

    @property
    def agreement(self) -> Agreement | None:
        return None if self.evaluated is None else self.evaluated.agreement

    @property
    def is_right(self) -> bool:
        """Whether it was evaluated and its outputs are not broken."""
        return self.agreement is not None and self.agreement.passed

    @property
    def missed(self) -> list[GoalResult]:
        return [result for result in self.goals if result.outcome == "missed"]

    @property
    def rank(self) -> tuple[int, float]:
        """The lower the better, speed aside."""
        return rank(self.goals)


# ---------------------------------------------------------------- building


def build(engine: str, form: Model, name: str, model: Model, ctx: StageContext) -> Built | Candidate:
    """The engine, loaded; or why it cannot be had. `model` is what the form is a form of."""
    directory = ctx.directory / "-".join(part for part in (engine, form.precision, name) if part)
    directory.mkdir()
    runtime = engines.load(engine)
    try:
        files = Model(ModelFormat.ENGINE, runtime.build(form, directory), precision=form.precision)
        runner = runtime.open(files, ctx.recipe.benchmark.threads)
    except StageFailed as error:
        return refused(engine, form.precision, error.detail, name)
    return Built(files, form.path if form.path.suffix == ".onnx" else model.path, runner, name)


def distinct(built: Iterable[Built]) -> list[Built]:
    """The engines without those that are the same bytes, run the same way, as one before them."""
    return list({identity(entry.model, entry.runner): entry for entry in reversed(list(built))}.values())[::-1]


def forms(model: Model, engine: str, source: Model | None = None) -> list[tuple[Model, str]]:
    """What is worth building for a runtime, with the form's name; no two have the same precision and name.

    A `source`, the customer's own graph, is worth it too: what cleaning does for one runtime another may not like.
    Where the CPU computes in bf16, OpenVINO runs each file a second time with all that is not int8 in bf16.
    """
    found = [(form, form.name) for form in model.candidates(engine)]
    if source is not None:
        found.append((source, "source"))
    if engine == "openvino" and engines.load(engine).has_bf16():
        halved = [(form, name) for form, name in found if form.precision in IN_BF16]
        found += [(replace(form, precision=IN_BF16[form.precision]), name) for form, name in halved]
    return found


def refused(engine: str, precision: str, reason: str, form: str = "", agreement: Agreement | None = None) -> Candidate:
    """An engine that was not measured."""
    return Candidate(
        engine=engine, precision=precision, form=form, measurement=None, agreement=agreement, kept=False, reason=reason
    )


# ---------------------------------------------------------------- comparing


def compare(
    built: Sequence[Built],
    model: Model,
    ctx: StageContext,
    span: tuple[float, float],
    choices: Sequence[Sequence[str]],
) -> list[Contender]:
    """Time every engine, evaluate from the fastest on as far as each choice needs it, time the finalists to the end.

    A choice is made among the engines of some runtimes, which it names. `span` is the part of the stage's progress that
    this is.
    """
    comparison = _Comparison(model, ctx, span)
    contenders = comparison.start(built)
    for names in choices:
        comparison.evaluate([entry for entry in contenders if entry.built.runner.engine in names])
    comparison.time_finalists(contenders, choices)
    return contenders


class _Comparison:
    """What the steps of one comparison share."""

    def __init__(self, model: Model, ctx: StageContext, span: tuple[float, float]) -> None:
        self.ctx, self.span = ctx, span
        self.samples = ctx.samples("evaluation")
        self.batch = first(self.samples, ctx.recipe.benchmark.batches[0])
        self.complexity: Complexity = complexity_of(model, self.samples)
        self.source = source_runner(ctx)
        _, self.onnxruntime = ctx.onnxruntime()
        self.num_evaluated = 0

    def start(self, built: Sequence[Built]) -> list[Contender]:
        """All of them and the source model, timed in turns for a moment."""
        runners = [entry.runner for entry in built]
        everyone = [self.source, self.onnxruntime, *runners]
        source, onnxruntime, *timed = time_quickly(everyone, self.batch, on_wait=self._waiting(0.0))
        contenders = []
        for entry, its in zip(built, timed, strict=True):
            row = measurement(
                entry.model,
                entry.runner,
                Timings(its, source, onnxruntime),
                self.complexity,
                self.ctx.recipe,
                self.samples,
            )
            contenders.append(Contender(entry, its, row))
            self._judge(contenders[-1])
        return contenders

    def evaluate(self, contenders: Sequence[Contender]) -> None:
        """From the fastest on, those that are too large last; not those that a faster one makes needless."""
        best: Contender | None = None
        for entry in sorted(contenders, key=lambda entry: (entry.rank[0], entry.timed.p50)):
            if entry.evaluated is None and entry.why_not is None:
                if best is not None and (entry.rank[0] != FITS or entry.timed.p50 > TIE_RATIO * best.timed.p50):
                    entry.why_not = f"not evaluated: {self._slower(entry, best)}"
                    continue
                self._evaluate(entry)
            if entry.is_right and entry.rank[0] == FITS and (best is None or entry.timed.p50 < best.timed.p50):
                best = entry
        for entry in contenders:  # an earlier choice, among other engines, may have passed one over that this one kept
            if entry.evaluated is not None:
                entry.why_not = None if entry.is_right else entry.why_not

    def _slower(self, entry: Contender, best: Contender) -> str:
        if entry.missed:
            return f"it misses {missed_words(entry.missed)}, and {best.built.name} misses none"
        return f"{entry.timed.p50 / best.timed.p50:.2f} times the latency of {best.built.name}, which misses no goal"

    def _evaluate(self, entry: Contender) -> None:
        built = entry.built
        share = 0.9 * self.num_evaluated / (self.num_evaluated + 2)  # how many there will be is not known
        self._waiting(share)(f"evaluating {built.name}")
        self.num_evaluated += 1
        try:
            entry.evaluated = self.ctx.evaluate(built.model, built.runner)
        except StageFailed as error:
            entry.why_not = error.detail
            return
        entry.measurement = _evaluated_row(entry.measurement, entry.evaluated, self.ctx)
        if not entry.is_right:
            entry.why_not = f"its outputs are wrong: {entry.evaluated.agreement.reason}"
        if _needs_resources(self.ctx):
            entry.measurement = with_resources(
                entry.measurement, built.model, built.runner, self.ctx.recipe, self.samples
            )
        self._judge(entry)

    def _waiting(self, share: float) -> Callable[[str], None]:
        begin, end = self.span
        return lambda message: self.ctx.progress(begin + share * (end - begin), message)

    def _judge(self, entry: Contender) -> None:
        entry.goals = judged(entry.measurement, self.ctx)

    def time_finalists(self, contenders: Sequence[Contender], choices: Sequence[Sequence[str]]) -> None:
        """Of each choice those that are right and nearly the best, timed in turns until the ratios are known."""
        finalists: dict[int, Contender] = {}
        for names in choices:
            right = [entry for entry in contenders if entry.is_right and entry.built.runner.engine in names]
            lowest = min((entry.rank[0] for entry in right), default=FITS)
            equals = sorted((entry for entry in right if entry.rank[0] == lowest), key=_p50)
            finalists |= {
                id(entry): entry
                for entry in equals[:MAX_FINALISTS]
                if lowest >= MISSES_RESOURCES or entry.timed.p50 <= TIE_RATIO * equals[0].timed.p50
            }
        if not finalists:
            return
        runners = [self.source, self.onnxruntime, *(entry.built.runner for entry in finalists.values())]
        settings = self.ctx.recipe.benchmark
        source, onnxruntime, *timed = time_in_turns(runners, self.batch, settings, on_wait=self._waiting(0.9))
        for entry, its in zip(finalists.values(), timed, strict=True):
            entry.timed, entry.is_finalist = its, True
            entry.measurement = entry.measurement.model_copy(update=Timings(its, source, onnxruntime).fields())
            runs = len(its.times_ms)
            method = entry.measurement.method.model_copy(update={"runs": runs})
            entry.measurement = entry.measurement.model_copy(update={"method": method})
            self._judge(entry)


def _evaluated_row(row: Measurement, evaluated: Evaluated, ctx: StageContext) -> Measurement:
    return row.model_copy(update=evaluated.fields(ctx.recipe))


def _needs_resources(ctx: StageContext) -> bool:
    return any(goal.metric in ("memory", "throughput") for goal in ctx.recipe.goals)


def source_runner(ctx: StageContext) -> Runner:
    """The source model as the baseline ran it."""
    home = "torch eager" if ctx.source.format == ModelFormat.TORCH else "onnxruntime"
    runner: Runner = engines.load(home).open(ctx.source, ctx.recipe.benchmark.threads)
    return runner


# ---------------------------------------------------------------- choosing


def choose(contenders: Sequence[Contender]) -> Contender | None:
    """The best of the finalists: the fastest of those that miss least, or a smaller one that is as fast."""
    finalists = [entry for entry in contenders if entry.is_finalist]
    if not finalists:
        return None
    lowest = min(entry.rank for entry in finalists)
    equals = [entry for entry in finalists if entry.rank == lowest]
    fastest = min(equals, key=_p50)
    tied = [entry for entry in equals if entry is fastest or same_speed(entry.timed, fastest.timed)]
    return min(tied, key=lambda entry: entry.measurement.size_bytes)  # of equals the first, in the order of forms


def finish(best: Contender, ctx: StageContext) -> None:
    """Measure what only a delivered engine is measured for; once, for however many targets it is chosen."""
    if best.is_finished:
        return
    built, samples = best.built, ctx.samples("evaluation")
    dear = {name for name in ctx.recipe.task.metrics if METRICS[name].on_request}
    if dear:
        best.evaluated = ctx.evaluate(built.model, built.runner, dear)
        best.measurement = _evaluated_row(best.measurement, best.evaluated, ctx)
    if best.measurement.peak_memory_bytes is None:
        best.measurement = with_resources(best.measurement, built.model, built.runner, ctx.recipe, samples)
    best.goals, best.is_finished = judged(best.measurement, ctx), True


def judged(row: Measurement, ctx: StageContext) -> list[GoalResult]:
    assert ctx.baseline is not None
    return [judge(goal, ctx.baseline, row) for goal in ctx.recipe.goals_in_force]


def as_candidate(entry: Contender, best: Contender | None, contenders: Sequence[Contender]) -> Candidate:
    """The candidate for the report, with the reason why it is kept or not."""
    return Candidate(
        engine=entry.built.runner.engine,
        precision=entry.built.runner.precision,
        form=entry.built.form,
        measurement=entry.measurement,
        agreement=entry.agreement,
        goals=entry.goals,
        kept=entry is best,
        reason=reason(entry, best, contenders),
    )


def reason(entry: Contender, best: Contender | None, contenders: Sequence[Contender]) -> str:
    """Why an engine is kept or not, in words."""
    if entry.why_not is not None or best is None:
        return entry.why_not or "its outputs are wrong"
    missed = missed_words(entry.missed)
    if entry is best:
        wrong = [other for other in contenders if other.evaluated is not None and not other.is_right]
        rivals = len(contenders) - len(wrong)
        fastest = all(_p50(entry) <= _p50(other) for other in contenders if other not in wrong)
        among = f"the {'fastest' if fastest else 'best'} of {rivals}" if rivals > 1 else "the only one that is right"
        return f"{among}, though it misses {missed}" if missed else among
    if entry.rank > best.rank:
        return f"misses {missed}" if missed else f"not shown to meet a goal: {unshown_words(unshown(entry.goals))}"
    if same_speed(entry.timed, best.timed):
        smaller = best.measurement.size_bytes < entry.measurement.size_bytes
        return f"as fast as {best.built.name}{', which is smaller' if smaller else ''}"
    slower = f"{_p50(entry) / _p50(best):.2f} times the latency of {best.built.name}"
    float_ones = [other for other in contenders if _is_float_twin(entry, other) and _p50(other) < _p50(entry)]
    if not float_ones:
        return slower
    twin = min(float_ones, key=_p50)
    precision = entry.built.runner.precision
    pays = f"{precision} does not pay here: {_p50(entry) / _p50(twin):.2f} times the latency of {twin.built.name}"
    return pays if twin is best else f"{pays}, {slower}"


def _is_float_twin(entry: Contender, other: Contender) -> bool:
    """Whether the other is the same runtime's fp32, and this one has fewer bits."""
    same = entry.built.runner.engine == other.built.runner.engine
    return same and other.built.runner.precision == "fp32" != entry.built.runner.precision


def _p50(entry: Contender) -> float:
    return entry.measurement.latency_ms.p50
