"""How a network is trained within a stage: the same words for distilling, fine-tuning and training for int8."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.subject import Words

Ratio = Annotated[float, Field(ge=0, le=1)]


class Augmentation(Words):
    """Random changes of a training sample, made anew each time it is seen; masks are moved along."""

    flips: list[Literal["horizontal", "vertical"]] = Field(default=[], max_length=2)
    shift_ratio: Ratio = Field(default=0.0, description="Largest shift, as a share of the image's size.")
    intensity: float = Field(default=0.0, ge=0, le=1, description="Largest relative change of scale and of offset.")

    @model_validator(mode="after")
    def _flips_once(self) -> Self:
        if len(set(self.flips)) < len(self.flips):
            raise ValueError("a flip is named twice")
        return self


class SoftTargets(Words):
    """Hinton's loss: alpha * T^2 * KL(student_T || teacher_T) + (1 - alpha) * task loss. arXiv 1503.02531."""

    temperature: float = Field(default=2.0, gt=0, le=100)
    alpha: Ratio = Field(default=0.5, description="Weight of the soft loss; 0: the labels alone.")


class Training(Words):
    """AdamW on the data set's train part. Its last `validation_ratio` is kept out, for early stopping and choosing.

    Of labelled images that is the last of every class. The evaluation part is never seen here.
    """

    epochs: int = Field(default=20, ge=1, le=10_000)
    batch: int = Field(default=16, ge=1, le=4096)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    weight_decay: float = Field(default=1e-4, ge=0, le=1)
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    ema_decay: float = Field(default=0.98, ge=0, lt=1, description="Of the averaged weights; 0: none are kept.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Of the labels only.")
    class_weights: list[Annotated[float, Field(ge=0)]] | None = Field(default=None, max_length=1000)
    augmentation: Augmentation = Augmentation()
    validation_ratio: float = Field(default=0.1, ge=0, le=0.5)
    patience: int | None = Field(default=None, ge=1, description="Epochs without a better validation; null: all.")

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if self.patience is not None and self.validation_ratio == 0:
            raise ValueError("patience needs samples that are kept out: give a validation_ratio")
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError("class_weights are all zero: nothing would be learnt from")
        return self
