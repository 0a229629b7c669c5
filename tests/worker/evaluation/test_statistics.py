"""Bounds hold what they say: known cases by hand, other libraries, and no certainty from a handful of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import beta, binom, bootstrap, t

from shared.evidence import UNSEEN_LOSS, groups_needed, unseen_share
from shared.recipe import Goal
from shared.report import Bound
from worker.evaluation import records
from worker.evaluation.metrics import Evaluation, Records
from worker.evaluation.outputs import Ints
from worker.evaluation.overlap import Doubles
from worker.evaluation.statistics import bounds, jackknife_bound, losses_of, tango_bound, upper_bound

RNG = np.random.default_rng(0)


def scored(name: str, values: Doubles) -> Evaluation:
    return Evaluation({name: float(values.mean())}, scores={name: values})


def drop(name: str, before: Doubles, after: Doubles, groups: Ints | None = None, kind: str = "max_drop") -> Bound:
    goal = Goal(metric=name, kind=kind, value=0.01)  # type: ignore[arg-type]
    return bounds([goal], scored(name, before), scored(name, after), groups, seed=0)[0]


# ---------------------------------------------------------------- decisions


def right(count: int, wrong: Sequence[int] = ()) -> Doubles:
    values = np.ones(count)
    values[list(wrong)] = 0
    return values


def test_without_a_differing_decision_about_three_in_n_may_be_lost() -> None:
    found = drop("top1", right(300), right(300))
    assert (found.value, found.groups, found.method) == (0, 300, "Tango score interval")
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 300))
    assert drop("top1", right(298), right(298)).bound > 0.01 > found.bound


def met_rate(count: int, differ: float, goal: float) -> float:
    """Exact probability that a bound lies within the goal, of a model that loses exactly the goal."""
    rate = 0.0
    for differing in range(int(binom.ppf(1 - 1e-9, count, differ)) + 1):
        for worse in range(differing + 1):
            better = differing - worse
            if worse - better <= count * goal and tango_bound(worse, better, count) <= goal:
                chance = binom.pmf(worse, differing, (differ + goal) / 2 / differ)
                rate += binom.pmf(differing, count, differ) * chance
    return rate


@pytest.mark.parametrize(("count", "differ", "goal"), [(271, 0.0101, 0.01), (135, 0.0201, 0.02), (50, 0.16, 0.02)])
def test_a_false_met_of_decisions_is_exactly_below_five_percent_where_tango_alone_is_above(
    count: int, differ: float, goal: float
) -> None:
    assert met_rate(count, differ, goal) < 0.05


def test_the_bound_of_pairs_grows_with_what_was_lost_and_with_what_differs() -> None:
    assert tango_bound(12, 4, 400) > tango_bound(8, 0, 400) > 8 / 400
    assert tango_bound(4, 12, 400) < 0.01
    assert tango_bound(3, 0, 3) == 1


def test_a_threshold_of_decisions_is_exact() -> None:
    found = drop("top1", right(50), right(50, [0, 1, 2]), kind="threshold")
    assert found.value == pytest.approx(0.94)
    assert found.bound == pytest.approx(beta.ppf(0.05, 47, 4))
    assert drop("top1", right(2), 0 * right(2), kind="threshold").bound == 0


def test_images_of_one_patient_count_once() -> None:
    after = right(200, range(4))
    alone, grouped = (drop("top1", right(200), after, groups) for groups in (None, np.arange(200) // 10))
    assert (grouped.groups, grouped.method) == (20, "bootstrap-t over groups")
    assert grouped.bound > alone.bound


# ---------------------------------------------------------------- means


def test_a_mean_of_even_losses_has_about_the_bound_of_student() -> None:
    losses = RNG.normal(0.01, 0.05, 400)
    expected = losses.mean() + t.ppf(0.95, 399) * losses.std(ddof=1) / 20
    bound, method = upper_bound(losses_of(losses, None), UNSEEN_LOSS, seed=0)
    assert bound == pytest.approx(expected, abs=0.0006)
    assert method == "bootstrap-t over samples"
    assert bound > bootstrap((losses,), np.mean, confidence_level=0.9, rng=0).confidence_interval.high - 0.001


def test_a_loss_that_few_samples_bear_is_bounded_further_away() -> None:
    losses = np.r_[np.zeros(92), np.full(8, 0.125)] + RNG.normal(0, 0.002, 100)
    plain = losses.mean() + t.ppf(0.95, 99) * losses.std(ddof=1) / 10
    assert upper_bound(losses_of(losses, None), UNSEEN_LOSS, seed=0)[0] > plain + 0.001


def test_equal_losses_of_a_few_samples_are_no_certainty() -> None:
    for count in (1, 3, 50):
        found = drop("dice", np.full(count, 0.9), np.full(count, 0.9))
        assert found.value == 0
        assert found.bound >= UNSEEN_LOSS * unseen_share(count) * 0.999
    assert drop("dice", np.full(3, 0.9), np.full(3, 0.9)).bound > 0.1
    assert drop("dice", np.full(100, 0.9), np.full(100, 0.9)).bound < 0.01


def test_the_bound_of_a_threshold_lies_below_the_metric_and_that_of_a_distance_above() -> None:
    dice, distances = RNG.uniform(0.7, 1, 80), RNG.uniform(1, 5, 80)
    assert 0.7 < drop("dice", dice, dice, kind="threshold").bound < dice.mean()
    assert distances.mean() < drop("hd95", distances, distances, kind="threshold").bound < 5
    lost = drop("hd95", distances, distances + 0.5)
    assert lost.value == pytest.approx(0.5)
    assert lost.bound > 0.5


def test_samples_that_repeat_in_a_group_say_nothing_new() -> None:
    losses = RNG.normal(0, 0.02, 30)
    single = upper_bound(losses_of(losses, None), UNSEEN_LOSS, seed=0)[0]
    repeated = upper_bound(losses_of(np.repeat(losses, 7), np.repeat(np.arange(30), 7)), UNSEEN_LOSS, seed=0)[0]
    ungrouped = upper_bound(losses_of(np.repeat(losses, 7), None), UNSEEN_LOSS, seed=0)[0]
    assert repeated == pytest.approx(single)
    assert ungrouped < single


def test_groups_of_unequal_sizes_are_weighed_by_their_samples() -> None:
    groups = np.repeat([7, 3, 9], [1, 5, 10])
    found = losses_of(np.repeat([0.4, 0.2, 0.1], [1, 5, 10]), groups)
    assert found.sizes.tolist() == [5, 1, 10]
    assert found.value == pytest.approx((0.4 + 1 + 1) / 16)


def test_a_bound_is_the_same_for_one_seed() -> None:
    losses = losses_of(RNG.exponential(0.01, 40), None)
    assert upper_bound(losses, UNSEEN_LOSS, seed=3) == upper_bound(losses, UNSEEN_LOSS, seed=3)


def test_many_samples_are_bounded_in_bounded_time_and_memory() -> None:
    losses = losses_of(RNG.normal(0, 0.02, 50_000), None)
    assert upper_bound(losses, UNSEEN_LOSS, seed=0, resamples=100)[0] < 0.001


# ---------------------------------------------------------------- metrics that are no mean


def table(count: int, noise: float, multilabel: bool = False) -> Records:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, count)
    truth = rng.random((count, 3)) < 0.4 if multilabel else labels[:, None] == np.arange(3)
    scores = 1.5 * truth + rng.normal(0, 1, (count, 3)) + noise * rng.normal(0, 1, (count, 3))
    chances = (np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)).astype(np.float32)
    found = chances > 0.4 if multilabel else chances.argmax(axis=1)[:, None] == np.arange(3)
    return Records(truth, found, chances.round(2), multilabel)


def rows(records: Records, kept: Ints) -> Records:
    return Records(records.truth[kept], records.found[kept], records.probabilities[kept], records.multilabel)


OF_LABELS = [name for name in records.NAMES if name != "kappa"]


@pytest.mark.parametrize(
    ("name", "multilabel"), [*((name, False) for name in records.NAMES), *((name, True) for name in OF_LABELS)]
)
@pytest.mark.parametrize("groups", [np.arange(60), np.arange(60) // 7])
def test_the_table_without_a_group_has_the_metric_of_the_rest(name: str, multilabel: bool, groups: Ints) -> None:
    whole = table(60, 0.5, multilabel)
    expected = [records.mean(name, rows(whole, np.flatnonzero(groups != group))) for group in np.unique(groups)]
    assert records.without_each(name, whole, groups) == pytest.approx(expected)


@pytest.mark.parametrize("name", records.NAMES)
def test_a_recomputed_metric_has_a_bound_on_its_worse_side(name: str) -> None:
    models = [Evaluation({name: records.mean(name, one)}, records=one) for one in (table(300, 0.1), table(300, 0.4))]
    goals = [Goal(metric=name, kind=kind, value=0.01) for kind in ("max_drop", "threshold")]  # type: ignore[arg-type]
    lost, reached = bounds(goals, *models, None, seed=0)
    assert 0 < lost.bound - lost.value < 0.2
    assert (reached.bound > reached.value) == (name == "ece")


def test_the_bound_of_a_share_by_jackknife_is_about_that_of_the_plain_mean() -> None:
    """Balanced accuracy of classes of one size is top1."""
    whole = table(600, 0.3)
    name = "balanced_accuracy"
    goal = Goal(metric=name, kind="threshold", value=0.5)
    found = bounds([goal], Evaluation(), Evaluation({name: records.mean(name, whole)}, records=whole), None, seed=0)[0]
    right = (whole.truth & whole.found).any(axis=1)
    assert found.value - found.bound == pytest.approx(1.96 * right.std() / np.sqrt(600), rel=0.1)


def test_a_calibration_error_of_few_samples_hides_what_is_lost_so_its_bound_lies_further_away() -> None:
    """The binned error of a well calibrated model is above its true one, the more so the fewer samples there are."""
    rng = np.random.default_rng(0)

    def calibrated(count: int) -> Records:
        sure = rng.uniform(0.5, 1, count).astype(np.float32)
        truth = (rng.random(count) < sure)[:, None] == np.array([True, False])
        chances = np.stack([sure, 1 - sure], axis=1)
        return Records(truth, chances > 0.5, chances, multilabel=False)

    few, many = (records.mean("ece", calibrated(count)) for count in (200, 100_000))
    bias = records.ece_bias(calibrated(200), np.arange(200))
    assert few - many < bias * 1.5
    assert bias > 5 * records.ece_bias(calibrated(100_000), np.arange(100_000))
    one = calibrated(200)
    model = Evaluation({"ece": records.mean("ece", one)}, records=one)
    found = bounds([Goal(metric="ece", kind="max_drop", value=0.01)], model, model, None, seed=0)[0]
    assert found.value == 0
    assert found.bound >= records.ece_bias(one, np.arange(200))


def test_a_class_that_one_sample_has_can_show_nothing() -> None:
    whole = table(60, 0.1)
    kept = np.r_[np.flatnonzero(~whole.truth[:, 2]), np.flatnonzero(whole.truth[:, 2])[:1]]
    one = Evaluation({"sensitivity": 0.9}, records=rows(whole, kept))
    found = bounds([Goal(metric="sensitivity", kind="max_drop", value=0.01)], one, one, None, seed=0)[0]
    assert found.bound == pytest.approx(0.9)  # all may be lost
    assert found.method == "too few groups for a bound"


# ---------------------------------------------------------------- agreement


@pytest.mark.parametrize("metric", ["rms_error", "agreement"])
@pytest.mark.parametrize("count", [16, 64])
@pytest.mark.parametrize("spread", [0.25, 0.8])
def test_an_error_that_varies_widely_lies_beyond_its_bound_in_one_draw_of_twenty(
    metric: str, count: int, spread: float
) -> None:
    rng = np.random.default_rng(0)
    power = 2 if metric == "rms_error" else 1
    true = 0.01 * np.exp(power * spread**2 / 2)
    beyond, reach = 0, []
    for _ in range(400):
        powers = (0.01 * np.exp(rng.normal(0, spread, count))) ** power
        values = np.r_[powers.mean(), (powers.sum() - powers) / (count - 1)] ** (1 / power)
        shown = values if metric == "rms_error" else 1 - values
        bound = jackknife_bound(metric, float(shown[0]), shown[1:], powers)
        reach.append((bound.bound if metric == "rms_error" else 1 - bound.bound) / true)
        beyond += reach[-1] < 1
    assert beyond / 400 <= 0.05
    assert np.median(reach) < 2.2  # it is no bound that anything meets


@pytest.mark.parametrize("tiny", [0.0, 1e-9, 1e-7])
def test_a_sample_with_hardly_an_error_does_not_drive_the_bound_away(tiny: float) -> None:
    for errors in (np.r_[tiny, np.full(15, 0.01)], np.r_[0.016, tiny, np.zeros(14)]):
        without = (errors.sum() - errors) / 15
        bound = jackknife_bound("agreement", 1 - errors.mean(), 1 - without, errors)
        exact = jackknife_bound("agreement", 1 - errors.mean(), 1 - without, np.where(errors < 1e-6, 0, errors))
        assert bound.bound == pytest.approx(exact.bound, rel=1e-3)
        assert 0.98 < bound.bound < 1 - errors.mean()


# ---------------------------------------------------------------- which goals have bounds


def test_only_quality_goals_that_were_evaluated_have_bounds() -> None:
    goals = [
        Goal(metric="latency", kind="min_speedup", value=2),
        Goal(metric="rms_error", kind="threshold", value=0.1),
        Goal(metric="hd95", kind="threshold", value=2),
        Goal(metric="dice", kind="threshold", value=0.8),
    ]
    dice = scored("dice", RNG.uniform(0.8, 1, 40))
    assert [bound.metric for bound in bounds(goals, dice, dice, None, seed=0)] == ["dice"]


def test_so_many_groups_as_are_needed_settle_it() -> None:
    losses = np.random.default_rng(1).normal(0.004, 0.03, 60)
    found = drop("dice", np.full(60, 0.9), 0.9 - losses)
    assert found.value < 0.01 < found.bound
    needed = groups_needed(found.value, found.bound, 0.01, 60, "dice")
    many = np.tile(losses, round(needed / 60) + 1)
    assert drop("dice", np.full(len(many), 0.9), 0.9 - many).bound < 0.0105
