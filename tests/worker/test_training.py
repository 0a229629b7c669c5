"""The training loop: it learns, stops, resumes to the same bytes, and says why it cannot."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import BasicUNet
from safetensors.torch import save
from torch import nn

from shared.errors import StageFailed
from shared.recipe import Augmentation, SoftTargets, Task, Training
from tests.worker.workbench import ARGUMENTS, TISSUES, Drawer, Workbench
from worker import loop
from worker.context import StageContext
from worker.data import Samples
from worker.descent import optimizer_of, scheduler_of
from worker.loading import load_module
from worker.material import split
from worker.precision import StepForm
from worker.save_timer import INTERVAL_VARIABLE
from worker.training import TrainingLog, train

QUICK = Training(epochs=4, batch=8, learning_rate=0.01, validation_ratio=0.1)
STILL = Augmentation()
LIVELY = Augmentation(flips=["horizontal", "vertical"], shift_ratio=0.2, intensity=0.1, noise=0.1)


class Cut(Exception):
    """The attempt ends here, as if the process had been killed."""


@dataclasses.dataclass(frozen=True)
class Shelf(Drawer):
    """Checkpoints that outlive an attempt, with their bytes; `cut_after` ends the attempt once so many are safe."""

    directory: Path = Path()
    cut_after: int | None = None

    def save(self, name: str, path: Path) -> None:
        number = len(list(self.directory.glob("*")))
        self.kept[name] = Path(shutil.copy(path, self.directory / f"{number}.safetensors"))
        if self.cut_after == number + 1:
            raise Cut


@pytest.fixture
def ctx(bench: Workbench, tmp_path: Path) -> StageContext:
    return bench.context(tmp_path)


def small_unet(seed: int = 1, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return BasicUNet(**{**ARGUMENTS, "features": [8, 8, 8, 8, 8, 8], **changes})


def digest(network: nn.Module) -> str:
    return hashlib.sha256(save({name: value.contiguous() for name, value in network.state_dict().items()})).hexdigest()


def without_time(log: TrainingLog) -> TrainingLog:
    return dataclasses.replace(log, resumed_after=0)


# ---------------------------------------------------------------- learning


def test_a_student_learns_and_is_left_with_its_best_weights(ctx: StageContext) -> None:
    network = small_unet()
    log = train(network, Training(epochs=8, batch=6, learning_rate=0.02, validation_ratio=0.1), ctx)
    assert log.epochs[-1].loss < 0.7 * log.epochs[0].loss
    assert [epoch.number for epoch in log.epochs] == list(range(1, 9))
    assert log.best.metric == max(epoch.metric or 0 for epoch in log.epochs)
    assert (log.metric, log.samples, log.kept_out, log.device) == ("dice", 20, 2, "cpu")
    assert not network.training
    again = small_unet(seed=7)
    again.load_state_dict(network.state_dict())
    same = Training(epochs=1, batch=6, learning_rate=1e-12, ema_decay=0, weight_decay=0, validation_ratio=0.1)
    rejudged = train(again, same, ctx)
    assert rejudged.best.metric == pytest.approx(log.best.metric, abs=0.2)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_the_learning_rate_follows_its_schedule(ctx: StageContext, schedule: Any) -> None:
    log = train(small_unet(), QUICK.model_copy(update={"schedule": schedule}), ctx)
    rates = [epoch.learning_rate for epoch in log.epochs]
    assert rates[-1] < 1e-4
    assert max(rates) <= 0.01
    assert sorted(rates[1:], reverse=True) == rates[1:]


def test_a_cosine_warms_up_over_the_first_twentieth_of_its_steps() -> None:
    training = Training(epochs=10, learning_rate=0.1)
    optimizer = optimizer_of(nn.Linear(2, 2), training)
    scheduler = scheduler_of(optimizer, training, steps=10)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert rates[52] == pytest.approx(0.05, abs=0.001)
    assert 0 < rates[-1] < 1e-4


def test_a_student_learns_from_its_teacher_alone(bench: Workbench, ctx: StageContext) -> None:
    """With alpha 1 the labels count for nothing: here every one of them is wrong."""
    teacher, inputs = load_module(bench.source), torch.from_numpy(bench.samples("evaluation").inputs(0, 20))
    found = bench.samples("train")
    assert found.read_target is not None
    wrong = dataclasses.replace(found, read_target=lambda index: np.zeros((32, 32), dtype=np.int64))
    agreement = []
    for alpha in (0.0, 1.0):
        network = small_unet()
        training = Training(epochs=12, batch=6, learning_rate=0.02)
        context = dataclasses.replace(ctx, samples=lambda part: wrong, checkpoints=Drawer())
        train(network, training, context, teacher=teacher, soft_targets=SoftTargets(temperature=2.0, alpha=alpha))
        with torch.no_grad():
            agreement.append(float((network(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean()))
    assert agreement[0] < 0.4
    assert agreement[1] > 0.7


def test_the_averaged_weights_are_those_that_are_left(ctx: StageContext) -> None:
    plain, averaged = small_unet(), small_unet()
    for network, ema_decay in ((plain, 0.0), (averaged, 0.9)):
        training = QUICK.model_copy(update={"ema_decay": ema_decay, "validation_ratio": 0.0})
        train(network, training, ctx)
    assert digest(plain) != digest(averaged)
    before, after = dict(plain.named_parameters()), dict(averaged.named_parameters())
    assert all(torch.isfinite(after[name]).all() for name in before)


def test_without_kept_out_samples_the_last_weights_are_left(ctx: StageContext) -> None:
    training = QUICK.model_copy(update={"validation_ratio": 0.0})
    log = train(small_unet(), training, ctx)
    assert (log.best_epoch, log.kept_out, log.samples, log.stopped_early) == (4, 0, 24, False)
    assert log.details()["validation_dice"] is None


def test_training_stops_early_without_progress_and_takes_the_later_of_two_that_are_as_good(ctx: StageContext) -> None:
    words = {"patience": 3, "ema_decay": 0, "weight_decay": 0, "validation_ratio": 0.1}
    training = Training(epochs=50, batch=24, learning_rate=1e-9, **words)
    log = train(small_unet(), training, ctx)
    metrics = [epoch.metric or 0.0 for epoch in log.epochs]
    assert log.stopped_early
    assert len(log.epochs) == metrics.index(max(metrics)) + 1 + 3
    assert log.best_epoch == max(epoch.number for epoch in log.epochs if epoch.metric == max(metrics))


def test_the_evaluation_part_is_never_read(bench: Workbench, ctx: StageContext) -> None:
    asked = []

    def samples(part: str) -> Samples:
        asked.append(part)
        return bench.samples(part)

    train(small_unet(), QUICK, dataclasses.replace(ctx, samples=samples))
    assert set(asked) == {"train"}


# ---------------------------------------------------------------- the same bytes


def test_the_same_training_gives_the_same_bytes(ctx: StageContext) -> None:
    digests = []
    for _ in range(2):
        network = small_unet()
        train(network, QUICK.model_copy(update={"augmentation": LIVELY}), ctx)
        digests.append(digest(network))
        ctx = dataclasses.replace(ctx, checkpoints=Drawer())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("augmentation", "teach", "schedule"),
    [(LIVELY, True, "one_cycle"), (STILL, True, "cosine"), (LIVELY, False, "cosine")],
)
@pytest.mark.parametrize("cut_after", [1, 3, 5])
def test_a_resumed_training_ends_with_the_bytes_of_an_uninterrupted_one(
    bench: Workbench, ctx: StageContext, tmp_path: Path, augmentation: Any, teach: bool, schedule: Any, cut_after: int
) -> None:
    training = QUICK.model_copy(update={"epochs": 5, "augmentation": augmentation, "schedule": schedule})
    always = SoftTargets(teacher="always")
    lesson: dict[str, Any] = {"teacher": load_module(bench.source), "soft_targets": always} if teach else {}
    whole = small_unet(dropout=0.1)
    log = train(whole, training, ctx, **lesson)

    (tmp_path / "shelf").mkdir()
    shelf = Shelf(directory=tmp_path / "shelf", cut_after=cut_after)
    with pytest.raises(Cut):
        train(small_unet(dropout=0.1), training, dataclasses.replace(ctx, checkpoints=shelf), **lesson)
    torch.manual_seed(99)  # another process, another state of the generators
    resumed = small_unet(seed=5, dropout=0.1)
    again = dataclasses.replace(shelf, cut_after=None)
    log_again = train(resumed, training, dataclasses.replace(ctx, checkpoints=again), **lesson)
    assert log_again.resumed_after == cut_after
    assert without_time(log_again) == log
    assert digest(resumed) == digest(whole)
    assert len(list((tmp_path / "shelf").glob("*"))) == 5  # one an epoch: none was repeated


@pytest.mark.parametrize("cut_after", [1, 2, 3, 7])
def test_an_attempt_that_goes_on_after_a_trial_or_within_it_ends_with_the_same_bytes(
    bench: Workbench, ctx: StageContext, tmp_path: Path, cut_after: int
) -> None:
    """Two trials of 2 epochs each, then the training of 16: it is cut within the first, at an end, and later."""
    training = QUICK.model_copy(update={"epochs": 16, "batch": 12, "validation_ratio": 0.0})
    lesson: dict[str, Any] = {"teacher": load_module(bench.source), "soft_targets": SoftTargets()}
    whole = small_unet(dropout=0.1)
    log = train(whole, training, ctx, **lesson)
    assert log.trial is not None
    (tmp_path / "shelf").mkdir()
    shelf = Shelf(directory=tmp_path / "shelf", cut_after=cut_after)
    with pytest.raises(Cut):
        train(small_unet(dropout=0.1), training, dataclasses.replace(ctx, checkpoints=shelf), **lesson)
    resumed = small_unet(seed=5, dropout=0.1)
    again = dataclasses.replace(ctx, checkpoints=dataclasses.replace(shelf, cut_after=None))
    log_again = train(resumed, training, again, **lesson)
    assert without_time(log_again) == log
    assert digest(resumed) == digest(whole)
    assert len(list((tmp_path / "shelf").glob("*"))) == 2 + 2 + 16


def test_a_training_of_short_epochs_is_not_saved_after_each(
    ctx: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, "3600")
    (tmp_path / "shelf").mkdir()
    train(small_unet(), QUICK, dataclasses.replace(ctx, checkpoints=Shelf(directory=tmp_path / "shelf")))
    assert list((tmp_path / "shelf").glob("*")) == []


def test_a_form_of_step_that_was_chosen_is_kept_by_the_next_attempt(
    ctx: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "fastest_form", lambda step, num_steps: StepForm("bf16", channels_last=True))
    whole = small_unet()
    log = train(whole, QUICK, ctx)
    assert log.details()["precision"] == "bf16"
    assert log.details()["channels_last"]
    assert all(parameter.is_contiguous() and parameter.dtype == torch.float32 for parameter in whole.parameters())
    (tmp_path / "shelf").mkdir()
    shelf = Shelf(directory=tmp_path / "shelf", cut_after=2)
    with pytest.raises(Cut):
        train(small_unet(), QUICK, dataclasses.replace(ctx, checkpoints=shelf))
    monkeypatch.setattr(loop, "fastest_form", lambda step, num_steps: StepForm())
    resumed = small_unet(seed=5)
    again = dataclasses.replace(ctx, checkpoints=dataclasses.replace(shelf, cut_after=None))
    assert without_time(train(resumed, QUICK, again)) == log
    assert digest(resumed) == digest(whole)


def test_measuring_the_form_of_step_changes_nothing_that_is_learnt(
    ctx: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for measures in (False, True):

        def choose(step: Callable[[StepForm], None], num_steps: int, measures: bool = measures) -> StepForm:
            if measures:
                step(StepForm(channels_last=True))
                step(StepForm("bf16"))
            return StepForm()

        monkeypatch.setattr(loop, "fastest_form", choose)
        network = small_unet(norm="batch", dropout=0.1)
        train(network, QUICK, dataclasses.replace(ctx, checkpoints=Drawer()))
        digests.append(digest(network))
    assert digests[0] == digests[1]


def test_a_checkpoint_of_another_training_is_not_taken_up(ctx: StageContext) -> None:
    train(small_unet(), QUICK, ctx)
    other = [(QUICK.model_copy(update={"batch": 4}), small_unet()), (QUICK, small_unet(features=[8] * 5 + [16]))]
    for training, network in other:
        assert train(network, training, ctx).resumed_after == 0


def test_trainings_of_one_stage_have_checkpoints_of_their_own(ctx: StageContext) -> None:
    train(small_unet(), QUICK, ctx, name="first")
    assert train(small_unet(), QUICK, ctx, name="second").resumed_after == 0
    assert train(small_unet(), QUICK, ctx, name="first").resumed_after == 4


def test_training_leaves_the_generators_as_they_were(ctx: StageContext) -> None:
    network = small_unet()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(network, QUICK, ctx)
    assert torch.equal(torch.rand(4), expected)


# ---------------------------------------------------------------- the teacher has to prove itself


def test_a_teacher_that_knows_better_than_the_labels_is_used(bench: Workbench, ctx: StageContext) -> None:
    """Most labels that are learnt from are wrong, those that are kept out of the trial are right."""
    found, rng = bench.samples("train"), np.random.default_rng(0)
    kept_out = set(split(found, 0.2)[1].positions)
    read_target = found.read_target
    assert read_target is not None

    def read(index: int) -> Any:
        return read_target(index) if index in kept_out else rng.integers(0, 4, (32, 32))

    noisy = dataclasses.replace(found, read_target=read)
    training = Training(epochs=40, batch=6, learning_rate=0.02)
    log = train(
        *(small_unet(), training, dataclasses.replace(ctx, samples=lambda part: noisy)),
        teacher=load_module(bench.source),
        soft_targets=SoftTargets(alpha=0.9),
    )
    details = log.details()
    trial = details["teacher_trial"]
    assert (trial["epochs"], trial["samples"]) == (6, 5)
    assert trial["with_teacher"] > trial["labels_alone"] + 2 * trial["standard_error"]
    assert trial["teacher"] > trial["labels_alone"]
    assert (details["teacher_used"], details["teacher_warning"]) == (True, None)
    assert (log.samples, log.kept_out, len(log.epochs)) == (24, 0, 40)  # in the end all are learnt from


def test_a_teacher_that_is_no_better_than_the_labels_is_not_used_and_the_details_say_so(
    bench: Workbench, ctx: StageContext
) -> None:
    torch.manual_seed(3)
    ignorant = BasicUNet(**ARGUMENTS)
    training = Training(epochs=20, batch=6, learning_rate=0.02)
    taught, alone = small_unet(), small_unet()
    log = train(taught, training, ctx, teacher=ignorant, soft_targets=SoftTargets())
    details = log.details()
    assert not details["teacher_used"]
    assert "no better than the labels alone" in details["teacher_warning"]
    assert not details["teacher_trial"]["teacher_used"]
    train(alone, training, dataclasses.replace(ctx, checkpoints=Drawer()))
    assert digest(taught) == digest(alone)  # the trial left nothing behind


def test_a_training_too_short_for_a_trial_learns_from_the_labels_and_says_so(
    bench: Workbench, ctx: StageContext
) -> None:
    log = train(small_unet(), QUICK, ctx, teacher=load_module(bench.source), soft_targets=SoftTargets())
    assert log.trial is None
    assert "4 epochs are too few" in (log.teacher_warning or "")
    always = train(
        *(small_unet(), QUICK, dataclasses.replace(ctx, checkpoints=Drawer())),
        teacher=load_module(bench.source),
        soft_targets=SoftTargets(teacher="always"),
    )
    assert (always.taught, always.teacher_warning) == (True, None)


# ---------------------------------------------------------------- no labels, and several


def without_labels(bench: Workbench) -> Samples:
    return dataclasses.replace(bench.samples("train"), read_target=None)


@pytest.mark.parametrize("task", [TISSUES, Task(kind="raw")])
def test_without_labels_a_student_learns_its_teachers_outputs(
    bench: Workbench, tmp_path: Path, task: Task
) -> None:
    ctx = dataclasses.replace(bench.context(tmp_path, task=task), samples=lambda part: without_labels(bench))
    teacher, inputs = load_module(bench.source), torch.from_numpy(bench.samples("evaluation").inputs(0, 20))
    network = small_unet()
    training = Training(epochs=30, batch=6, learning_rate=0.02, validation_ratio=0.1)
    log = train(network, training, ctx, teacher=teacher, soft_targets=SoftTargets(alpha=1))
    assert log.metric == "closeness"
    assert (log.epochs[-1].metric or 0) > (log.epochs[0].metric or 0)
    with torch.no_grad():
        agreement = float((network(inputs).argmax(1) == teacher(inputs).argmax(1)).float().mean())
    assert agreement > 0.7


def test_without_labels_a_training_that_needs_them_is_refused(bench: Workbench, ctx: StageContext) -> None:
    silent = dataclasses.replace(ctx, samples=lambda part: without_labels(bench))
    with pytest.raises(StageFailed, match="The train part has no labels") as caught:
        train(small_unet(), QUICK, silent, teacher=load_module(bench.source), soft_targets=SoftTargets())
    assert caught.value.code == "data_mismatch"


def test_overlapping_structures_are_learnt(bench: Workbench, tmp_path: Path) -> None:
    """Grey and white are both tissue: three labels, of which several hold in one place."""
    found = bench.samples("train")
    read_target = found.read_target
    assert read_target is not None

    def read(index: int) -> Any:
        mask = read_target(index)
        return np.stack([mask >= 1, mask == 2, mask == 3]).astype(np.int64)  # (labels, H, W)

    several = dataclasses.replace(found, read_target=read)
    task = Task(kind="multilabel", per="voxel", classes=["tissue", "grey", "white"])
    ctx = dataclasses.replace(bench.context(tmp_path, task=task), samples=lambda part: several)
    training = Training(epochs=20, batch=6, learning_rate=0.02, augmentation=LIVELY, validation_ratio=0.2)
    log = train(small_unet(out_channels=3), training, ctx)
    assert log.metric == "dice"
    assert (log.best.metric or 0) > 0.7


# ---------------------------------------------------------------- what it tells


def test_progress_tells_the_loss_the_metric_and_the_time_left(ctx: StageContext) -> None:
    told: list[tuple[float, str]] = []
    train(small_unet(), QUICK, ctx, progress=lambda fraction, message="": told.append((fraction, message)))
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    assert told[0][1].startswith("epoch 1 of 4, loss ")
    assert "dice 0." in told[-1][1]
    assert "in epoch" in told[-1][1]
    assert told[-1][1].endswith(" left")


def test_details_tell_the_history_and_stay_short(ctx: StageContext) -> None:
    log = train(small_unet(), QUICK, ctx)
    details = log.details()
    assert [entry["number"] for entry in details["history"]] == [1, 2, 3, 4]
    assert details["validation_dice"] == log.best.metric
    long = dataclasses.replace(log, epochs=[dataclasses.replace(log.epochs[0], number=n) for n in range(1, 1001)])
    assert len(long.details()["history"]) <= 200
    assert long.details()["epochs_run"] == 1000


# ---------------------------------------------------------------- what it refuses


def test_a_training_that_diverges_is_refused_with_a_sentence(ctx: StageContext) -> None:
    network = small_unet()
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(StageFailed, match="Training diverged in epoch 1: the loss is not a finite number") as caught:
        train(network, QUICK, ctx)
    assert caught.value.code == "training_diverged"
    assert "learning_rate" in (caught.value.hint or "")


def test_a_network_of_other_outputs_is_refused(ctx: StageContext) -> None:
    with pytest.raises(StageFailed, match="but the task needs") as caught:
        train(small_unet(out_channels=3), QUICK, ctx)
    assert caught.value.code == "output_mismatch"


def test_a_network_of_other_inputs_is_refused(ctx: StageContext) -> None:
    with pytest.raises(StageFailed, match="cannot train on inputs of shape") as caught:
        train(small_unet(in_channels=3), QUICK, ctx)
    assert caught.value.code == "input_mismatch"


def test_too_few_samples_are_refused(bench: Workbench, ctx: StageContext) -> None:
    def one(part: str) -> Samples:
        return dataclasses.replace(bench.samples(part), num_samples=1)

    with pytest.raises(StageFailed, match="has 1 samples: too few"):
        train(small_unet(), QUICK, dataclasses.replace(ctx, samples=one))


def test_a_last_batch_of_one_sample_does_not_break_batch_norm(bench: Workbench, tmp_path: Path) -> None:
    """9 samples in batches of 4 are 3 + 3 + 3, not 4 + 4 + 1, which BatchNorm on a pooled vector refuses."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(1), nn.Linear(1, 2))

    def samples(part: str) -> Samples:
        found = bench.samples(part)
        return dataclasses.replace(found, num_samples=9, read_target=lambda index: torch.tensor(index % 2).numpy())

    ctx = bench.context(tmp_path, task=Task(kind="classification", classes=["no", "yes"]))
    training = Training(epochs=2, batch=4)
    log = train(network, training, dataclasses.replace(ctx, samples=samples))
    assert (log.metric, len(log.epochs)) == ("top1", 2)


def test_deep_supervision_and_auxiliary_heads_train_at_their_first_output(bench: Workbench, ctx: StageContext) -> None:
    class Many(nn.Module):
        def __init__(self, stacked: bool) -> None:
            super().__init__()
            self.head = nn.Conv2d(1, 4, 1)
            self.stacked = stacked

        def forward(self, inputs: torch.Tensor) -> Any:
            out = self.head(inputs)
            return torch.stack([out, out * 0], dim=1) if self.stacked else {"out": out, "aux": out * 0}

    for stacked in (True, False):
        assert len(train(Many(stacked), QUICK, ctx, name=f"stacked-{stacked}").epochs) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_trains_in_half_precision_and_gives_the_network_back_on_the_cpu(ctx: StageContext) -> None:
    network = small_unet()
    log = train(network, QUICK, ctx)
    assert log.device == "cuda"
    assert next(network.parameters()).device.type == "cpu"
    assert log.epochs[-1].loss < log.epochs[0].loss
