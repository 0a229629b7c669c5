"""How a network is trained within a stage: the same words for distilling, fine-tuning and training for int8."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.subject import Words

Ratio = Annotated[float, Field(ge=0, le=1)]


class Augmentation(Words):
    """Random changes of a training sample, made anew each time it is seen; masks are moved along.

    None are made unless asked for: what helps depends on the data. Where intensity itself tells classes apart, as in
    images of one scanner, changing it costs points; across scanners it is what makes a network robust.
    """

    flips: list[Literal["horizontal", "vertical"]] = Field(default=[], max_length=2)
    shift_ratio: Ratio = Field(default=0.0, description="Largest shift, as a share of the image's size.")
    intensity: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Largest relative change of scale, and of offset as a share of the image's own spread.",
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Largest standard deviation of Gaussian noise, as a share of the image's own spread.",
    )

    @model_validator(mode="after")
    def _flips_once(self) -> Self:
        if len(set(self.flips)) < len(self.flips):
            raise ValueError("a flip is named twice")
        return self


class SoftTargets(Words):
    """Hinton's loss: alpha * T^2 * KL(student_T || teacher_T) + (1 - alpha) * task loss. arXiv 1503.02531.

    With alpha 1 no labels are needed. A raw task has no classes: the student learns the teacher's outputs themselves.
    """

    temperature: float = Field(default=2.0, gt=0, le=100)
    alpha: Ratio = Field(default=0.5, description="Weight of the soft loss; 0: the labels alone, 1: the teacher alone.")
    teacher: Literal["auto", "always"] = Field(
        default="auto",
        description="auto: two short trainings on a part of the samples, with the teacher and on the labels alone, are "
        "compared on the others; the teacher is used only if it is better. always: used untried.",
    )


class Training(Words):
    """AdamW on the data set's train part, all of it unless `validation_ratio` keeps some out.

    Kept out are samples spread over every class, or whole groups where the data names them, or, since neighbouring
    slices look alike, several blocks with a gap on each side. The evaluation part is never seen here.
    """

    epochs: int = Field(default=20, ge=1, le=10_000)
    batch: int = Field(default=16, ge=1, le=4096)
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    weight_decay: float = Field(default=1e-2, ge=0, le=1)
    schedule: Literal["cosine", "one_cycle"] = Field(
        default="cosine", description="cosine: a linear warm-up over the first twentieth of the steps, then a cosine."
    )
    ema_decay: float = Field(default=0.0, ge=0, lt=1, description="Of the averaged weights; 0: none are kept.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Of the labels only.")
    class_weights: list[Annotated[float, Field(ge=0)]] | None = Field(default=None, max_length=1000)
    augmentation: Augmentation = Augmentation()
    validation_ratio: float = Field(
        default=0.0, ge=0, le=0.5, description="Share of the train part that only chooses the best epoch."
    )
    patience: int | None = Field(default=None, ge=1, description="Epochs without a better validation; null: all.")

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        if self.patience is not None and self.validation_ratio == 0:
            raise ValueError("patience needs samples that are kept out: give a validation_ratio")
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError("class_weights are all zero: nothing would be learnt from")
        return self
