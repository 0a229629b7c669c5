"""The form of a training step is chosen by its time, and left alone where that is not worth measuring."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from worker.precision import PLAIN, StepForm, fastest_form


class Machine:
    """A clock that a step moves on by what its form costs."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.steps, self.seconds = 0.0, list[StepForm](), seconds

    def step(self, form: StepForm) -> None:
        self.steps.append(form)
        name = f"{form.precision}_last" if form.channels_last else form.precision
        self.now += self.seconds.get(name, 10.0)

    def choose(self, num_steps: int) -> StepForm:
        return fastest_form(self.step, num_steps, lambda: self.now)


@pytest.fixture(autouse=True)
def _a_cpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


def test_the_fastest_form_is_taken_where_it_is_clearly_faster() -> None:
    assert Machine(fp32=1.0, fp32_last=0.9, bf16_last=0.5).choose(1000) == StepForm("bf16", channels_last=True)
    assert Machine(fp32=1.0, fp32_last=0.7).choose(1000) == StepForm(channels_last=True)


def test_a_little_faster_is_no_reason_to_leave_fp32() -> None:
    assert Machine(fp32=1.0, fp32_last=0.9, bf16=0.85).choose(1000) == PLAIN


def test_a_cpu_without_bf16_is_not_tried_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    machine = Machine(fp32=1.0)
    machine.choose(1000)
    assert {form.precision for form in machine.steps} == {"fp32"}


def test_a_short_training_is_not_measured_for() -> None:
    few = Machine(fp32=1.0, bf16=0.1)
    assert few.choose(99) == PLAIN
    assert few.steps == []
    quick = Machine(fp32=0.001, bf16=0.0001)
    assert quick.choose(1000) == PLAIN
    assert set(quick.steps) == {PLAIN}


def test_weights_are_laid_out_and_brought_back() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(4, 4, 3), nn.Linear(4, 4))
    before = [parameter.clone() for parameter in network.parameters()]
    form = StepForm(channels_last=True)
    form.lay_out(network)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[1].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert form.laid_out(torch.zeros(2, 3, 5, 5)).is_contiguous(memory_format=torch.channels_last)
    PLAIN.lay_out(network)
    assert all(parameter.is_contiguous() for parameter in network.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, network.parameters(), strict=True))
