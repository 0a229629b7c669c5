"""Pruning leaves a smaller network that is as right as before, or says why it cannot before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import ViT, VNet
from safetensors.torch import load_file
from timm import create_model
from torch import nn
from torchvision.models import swin_t

from shared.errors import StageFailed
from shared.recipe import ModelFormat, Prune, SoftTargets, Training
from tests.worker.workbench import UNET, Workbench
from worker import engines, stages
from worker.complexity import module_macs, module_parameters
from worker.context import Model, StageResult
from worker.dependency import remove
from worker.evaluation.metrics import evaluate
from worker.loading import load_module
from worker.rehearsal import check_reloads, check_trains

HEALING = Training(epochs=60, batch=4, learning_rate=0.02, ema_decay=0.9)
BRIEF = Training(epochs=1, batch=8)
HALF = Prune(round_to=2, training=None)


def dice(bench: Workbench, model: Model) -> float:
    runner = engines.load("torch eager").open(model, 1)
    return evaluate(runner.run, bench.samples("evaluation"), bench.recipe.task).means["dice"]


def cut(bench: Workbench, directory: Path, **words: Any) -> dict[str, Any]:
    """What the report would tell of the source, cut by these words and not trained."""
    module = load_module(bench.source)
    shears = shears_for(module, HALF.model_copy(update=words), bench, directory)
    shears.cut(module, 1.0)
    told: dict[str, Any] = shears.told(module)
    return {**told, "weights": module.state_dict()}


def shears_for(
    module: nn.Module, stage: Prune, bench: Workbench, directory: Path, sample: torch.Tensor | None = None
) -> Any:
    """The stage's shears for a network; `sample` is one input where the network takes none of the bench's."""
    if sample is None:
        sample = torch.from_numpy(bench.samples("evaluation").inputs(0, 1))
    return stages.load("prune")._Shears(stage, module, UNET, bench.context(directory), sample)


@pytest.fixture(scope="module")
def half(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    return bench.run(HALF, bench.source, tmp_path_factory.mktemp("half"))


# ---------------------------------------------------------------- the deed


def test_a_pruned_network_collapses_and_fine_tuning_heals_it(
    bench: Workbench, half: StageResult, tmp_path: Path
) -> None:
    whole = bench.baseline.metrics["dice"]
    stage = Prune(round_to=2, training=HEALING, soft_targets=SoftTargets(teacher="always"))
    healed = bench.run(stage, bench.source, tmp_path)
    assert dice(bench, half.model) < whole - 0.2
    assert dice(bench, healed.model) > whole - 0.05
    (log,) = healed.details["training"]
    assert log["epochs_run"] == 60
    assert healed.details["teacher"] == "the source model"


def test_the_result_is_an_architecture_and_smaller_weights(bench: Workbench, half: StageResult) -> None:
    assert half.model == Model(ModelFormat.TORCH, half.model.path, bench.source.architecture, pruned=True)
    assert [path.name for path in half.model.path.parent.iterdir()] == ["model.safetensors"]
    before, after = load_file(bench.source.path), load_file(half.model.path)
    assert list(before) == list(after)
    assert sum(tensor.numel() for tensor in after.values()) < 0.3 * sum(tensor.numel() for tensor in before.values())


def test_the_report_tells_sizes_before_and_after(bench: Workbench, half: StageResult) -> None:
    told, module = half.details, load_module(half.model)
    assert told["parameters"] == [bench.baseline.parameters, module_parameters(module)]
    assert told["macs"] == [bench.baseline.macs, module_macs(module, (1, 32, 32))]
    assert told["channels"]["conv_0.conv_0.conv"] == [8, 4]
    assert "final_conv" not in told["channels"]
    assert told["heads"] == ["final_conv"]
    assert told["channels_removed_ratio"] == pytest.approx(0.5)
    assert (told["teacher"], told["training"]) == (None, [])


def test_a_pruned_model_can_be_pruned_on(bench: Workbench, half: StageResult, tmp_path: Path) -> None:
    twice = bench.run(HALF, half.model, tmp_path)
    assert twice.details["parameters"][0] == half.details["parameters"][1]
    assert twice.details["parameters"][1] < 0.35 * twice.details["parameters"][0]


# ---------------------------------------------------------------- the words


@pytest.mark.parametrize("importance", ["l1", "l2", "batchnorm_scale", "taylor"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_importance_and_scope_removes_its_share(
    bench: Workbench, tmp_path: Path, importance: str, scope: str
) -> None:
    told = cut(bench, tmp_path, pruning_ratio=0.4, importance=importance, scope=scope, round_to=1)
    assert told["channels_removed_ratio"] == pytest.approx(0.4, abs=0.06)


def test_importances_choose_differently(bench: Workbench, tmp_path: Path) -> None:
    taylor, l2 = (cut(bench, tmp_path, importance=importance) for importance in ("taylor", "l2"))
    assert taylor["channels"] == l2["channels"]
    assert any(not torch.equal(one, l2["weights"][name]) for name, one in taylor["weights"].items())


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_a_budget_of_macs_is_reached(bench: Workbench, tmp_path: Path, ratio: float) -> None:
    reached = cut(bench, tmp_path, pruning_ratio=ratio, budget="macs", round_to=1)["macs_removed_ratio"]
    assert ratio <= reached < ratio + 0.05


def test_channels_left_are_multiples(bench: Workbench, tmp_path: Path) -> None:
    told = cut(bench, tmp_path, pruning_ratio=0.6, round_to=4)
    assert all(after % 4 == 0 for _, after in told["channels"].values())


def test_ignored_layers_keep_their_channels(bench: Workbench, tmp_path: Path) -> None:
    told = cut(bench, tmp_path, ignored_layers=["down_1", "conv_0.conv_1.conv.weight"])
    assert not any(name.startswith("down_1") for name in told["channels"])
    assert "conv_0.conv_1.conv" not in told["channels"]
    assert "conv_0.conv_0.conv" in told["channels"]
    assert told["ignored_layers"] == ["down_1", "conv_0.conv_1.conv"]


@pytest.mark.parametrize("budget", ["channels", "macs"])
def test_in_steps_the_last_reaches_the_ratio(bench: Workbench, tmp_path: Path, budget: str) -> None:
    module = load_module(bench.source)
    stage = HALF.model_copy(update={"budget": budget, "round_to": 1})
    shears, removed = shears_for(module, stage, bench, tmp_path), []
    for share in (0.5, 1.0):
        shears.cut(module, share)
        removed.append(shears.told(module)[f"{budget}_removed_ratio"])
    assert removed == pytest.approx([0.25, 0.5], abs=0.03)


def test_each_step_is_fine_tuned_and_progress_only_rises(bench: Workbench, tmp_path: Path) -> None:
    seen: list[float] = []
    ctx = replace(bench.context(tmp_path), progress=lambda fraction, message="": seen.append(fraction))
    wanted = Prune(round_to=2, iterations=2, importance="taylor", soft_targets=None, training=BRIEF)
    details = stages.load("prune").run(wanted, bench.source, ctx).details
    assert details["teacher"] is None
    assert [log["epochs_run"] for log in details["training"]] == [1, 1]
    assert details["channels_removed_ratio"] == pytest.approx(0.5)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


# ---------------------------------------------------------------- what is refused


def refusal(bench: Workbench, stage: Prune, directory: Path, model: Model | None = None) -> StageFailed:
    with pytest.raises(StageFailed) as refused:
        bench.run(stage, model or bench.source, directory)
    return refused.value


def test_an_unknown_layer_is_told_with_close_names(bench: Workbench, tmp_path: Path) -> None:
    found = refusal(bench, HALF.model_copy(update={"ignored_layers": ["conv_0.conv_0.convv"]}), tmp_path)
    assert found.code == "unknown_layer"
    assert "conv_0.conv_0.conv" in str(found.hint)


def test_nothing_to_remove_is_told_with_the_largest_layer(bench: Workbench, tmp_path: Path) -> None:
    found = refusal(bench, Prune(round_to=64, training=None), tmp_path)
    assert found.code == "not_prunable"
    assert "multiples of 64" in found.detail
    assert "largest layer that may be pruned has 32" in found.detail


def test_macs_that_cannot_be_removed_are_told(bench: Workbench, tmp_path: Path) -> None:
    found = refusal(bench, Prune(pruning_ratio=0.97, budget="macs", round_to=8, training=None), tmp_path)
    assert found.code == "not_prunable"
    assert "at most; 97% was asked" in found.detail


def refused_by_shears(module: nn.Module, sample: torch.Tensor, bench: Workbench, directory: Path) -> StageFailed:
    """Why a network of random weights is refused, on a sample of its own."""
    shears = shears_for(module, HALF.model_copy(update={"round_to": 8}), bench, directory, sample)
    with pytest.raises(StageFailed) as refused:
        shears.cut(module, 1.0)
    assert refused.value.code == "not_prunable"
    return refused.value


@pytest.mark.parametrize(
    ("build", "channels", "layer"),
    [
        (lambda: VNet(spatial_dims=2, in_channels=1, out_channels=2), 1, "in_tr"),
        (lambda: create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4), 3, "blocks.0.attn"),
    ],
    ids=["repeated channels", "attention"],
)
def test_a_layer_that_breaks_is_told_and_without_it_the_rest_is_pruned(
    bench: Workbench, tmp_path: Path, build: Callable[[], nn.Module], channels: int, layer: str
) -> None:
    module, sample = build().eval(), torch.randn(1, channels, 32, 32)
    found = refused_by_shears(copy.deepcopy(module), sample, bench, tmp_path)
    assert f"the layer '{layer}' does not run with fewer channels" in found.detail
    assert str(found.hint).startswith("Add to ignored_layers: ")

    ignored = str(found.hint).split('"')[1::2]
    before = module_parameters(module)
    stage = HALF.model_copy(update={"round_to": 8, "ignored_layers": ignored})
    shears_for(module, stage, bench, tmp_path, sample).cut(module, 1.0)
    assert module_parameters(module) < before


def test_a_shape_written_into_the_code_is_told_by_layer(bench: Workbench, tmp_path: Path) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 16, 1)
            self.inner = Flat()
            self.last = nn.Linear(16, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.last(self.inner(self.first(inputs)))
            return found

    class Flat(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.view(len(inputs), 16, -1).mean(dim=2)

    found = refused_by_shears(Written(), torch.randn(1, 1, 3, 3), bench, tmp_path)
    assert "the layer 'inner' does not run with fewer channels: shape '[1, 16, -1]' is invalid" in found.detail
    assert found.hint == 'Add to ignored_layers: "first".'


def test_attention_that_cannot_be_followed_is_told_by_layer(bench: Workbench, tmp_path: Path) -> None:
    vit = ViT(1, (32, 32), (16, 16), 32, 64, 1, 2, classification=True, num_classes=4, spatial_dims=2)
    found = refused_by_shears(vit.eval(), torch.randn(1, 1, 32, 32), bench, tmp_path)
    assert "cannot be followed through the network" in found.detail
    assert "patch_embedding" in str(found.hint) or "attn" in str(found.hint)


def test_shifted_windows_are_refused_with_what_to_do(bench: Workbench, tmp_path: Path) -> None:
    found = refused_by_shears(swin_t(num_classes=4).eval(), torch.randn(1, 3, 32, 32), bench, tmp_path)
    assert "its windows are shifted, and channels cannot be followed through that" in found.detail
    assert found.hint == "Distill it into a smaller student instead."


def test_a_layer_that_runs_in_training_alone_is_tried_too(bench: Workbench) -> None:
    class Helped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.side = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 2, 1), nn.Conv2d(16, 2, 1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found = self.first(inputs)
            outputs: torch.Tensor = self.last(found) + (self.side(found) if self.training else 0)
            return outputs

    module, sample = Helped().eval(), torch.randn(1, 1, 8, 8)
    remove(module, sample, {"first": [0, 1]})
    with pytest.raises(StageFailed, match="in training, the layer 'side' does not run with fewer channels"):
        check_trains(module, sample, "Helped")


def test_a_size_that_is_kept_outside_of_the_weights_is_found(
    bench: Workbench, half: StageResult, tmp_path: Path
) -> None:
    other = load_module(half.model)
    with torch.no_grad():
        other.get_parameter("final_conv.bias").add_(1)
    with pytest.raises(StageFailed, match="a size is kept outside of the weights"):
        check_reloads(other, half.model, torch.from_numpy(bench.samples("evaluation").inputs(0, 1)))


def test_a_network_without_a_normalization_has_no_scales(bench: Workbench, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    stage = HALF.model_copy(update={"importance": "batchnorm_scale"})
    shears = shears_for(module, stage, bench, tmp_path, torch.randn(1, 3, 32, 32))
    with pytest.raises(StageFailed, match="no normalization with a scale") as refused:
        shears.cut(module, 1.0)
    assert refused.value.hint == 'Use importance "l2".'


def test_what_is_refused_is_refused_before_training(bench: Workbench, tmp_path: Path) -> None:
    ctx = bench.context(tmp_path)
    with pytest.raises(StageFailed):
        stages.load("prune").run(Prune(round_to=64), bench.source, ctx)
    assert ctx.checkpoints.load("training") is None
