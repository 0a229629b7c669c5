"""The int8 forms of a network for one runtime: all of it, its products alone, and with as much float as it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shared.errors import StageFailed
from worker.engines import Runner
from worker.quantization.calibration import Calibration
from worker.quantization.mixed_precision import Form, search
from worker.quantization.openvino import QuantizedNetwork, Scheme, schemes
from worker.quantization.qdq import all_operators_pay, layers, write_qdq
from worker.quantization.quality import CLOSE, GOOD, LEVELS, Quality, QualityCheck
from worker.quantization.sensitivity import Budget, Layers, Sensitivity, rank

Open = Callable[[Path], Runner]
OnProgress = Callable[[float], None]


@dataclass
class RuntimeForms:
    """What was made for one runtime, and what could not be made, with its reason."""

    forms: list[Form] = field(default_factory=list)
    ranking: list[Sensitivity] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    scheme: str | None = None

    @property
    def best(self) -> Form | None:
        """The first that is good, for those with more in int8 come first; or else the one that loses least."""
        good = next((form for form in self.forms if form.reaches(GOOD)), None)
        checked = [(form.quality.rank, form) for form in self.forms if form.quality is not None]
        return good or min(checked, key=lambda pair: pair[0], default=(None, None))[1]


class Writer(Protocol):
    """How a runtime's forms are written. Each method may raise StageFailed (quantize_failed)."""

    scheme: str | None
    open: Open  # the form as the runtime runs it

    def whole(self, check: QualityCheck | None, on_progress: OnProgress) -> list[Form]:
        """The forms with no layer in float, the one with most in int8 first."""

    def segments(self) -> list[Layers]:
        """Layers that go back to float together, in the network's order."""

    def mixed(self, layers: Layers) -> Path:
        """All in int8 but these layers."""

    def alone(self, layers: Layers) -> Runner:
        """These layers in int8, all others in float."""


def make_forms(
    writer: Writer, check: QualityCheck | None, num_samples: int, accuracy_aware: bool, on_progress: OnProgress
) -> RuntimeForms:
    """The whole forms and, for levels that none of them reaches, mixed ones. `num_samples` gave the ranges."""
    found = RuntimeForms()
    try:
        found.forms = writer.whole(check, lambda share: on_progress(0.4 * share))
        found.scheme = writer.scheme
        missed = [level for level in LEVELS if not any(form.reaches(level) for form in found.forms)]
        if check is not None and accuracy_aware and missed:
            budget = Budget.of(num_samples)
            found.ranking = _ranking(writer, check, budget, lambda share: on_progress(0.4 + 0.3 * share))
            found.forms += search(found.ranking, missed, _attempt(writer, check, on_progress), check.num_passes, budget)
    except StageFailed as error:
        found.failures.append(error.detail)
    return found


def _ranking(writer: Writer, check: QualityCheck, budget: Budget, on_progress: OnProgress) -> list[Sensitivity]:
    def error_of(layers: Layers, num_samples: int) -> float:
        return check.error(writer.alone(layers), num_samples)

    return rank(writer.segments(), error_of, len(check.inputs), budget, on_progress)


def _attempt(writer: Writer, check: QualityCheck, on_progress: OnProgress) -> Callable[[Layers, str], Form]:
    """Makes and checks a mixed form; the file of one that is not good is deleted, for nothing will take it."""
    num_tried = 0

    def attempt(layers: Layers, name: str) -> Form:
        nonlocal num_tried
        num_tried += 1
        on_progress(0.7 + 0.3 * num_tried / (num_tried + 4))  # how many there will be is not known
        path = writer.mixed(layers)
        quality = check.of(writer.open(path))
        if not quality.reaches(GOOD):
            path.unlink()
            path.with_suffix(".bin").unlink(missing_ok=True)
        return Form(name, path, layers, quality)

    return attempt


def _checked(path: Path, check: QualityCheck | None, open_form: Open) -> Quality | None:
    return None if check is None else check.of(open_form(path))


# ---------------------------------------------------------------- QDQ


class QdqForms:
    """Forms as ONNX, for ONNX Runtime or, `symmetric`, for TensorRT."""

    scheme: str | None = None

    def __init__(
        self, network: Path, ranges: Path, method: str, directory: Path, open_form: Open, *, symmetric: bool
    ) -> None:
        self.network, self.ranges, self.method, self.symmetric = network, ranges, method, symmetric
        self.directory = directory
        self.open: Open = open_form

    def whole(self, check: QualityCheck | None, on_progress: OnProgress) -> list[Form]:
        names = ["products"] if self.symmetric or not all_operators_pay(self.network) else ["full", "products"]
        forms = []
        for name in names:
            path = self._write(name, products_only=name == "products")
            forms.append(Form(name, path, quality=_checked(path, check, self.open)))
        return forms

    def segments(self) -> list[Layers]:
        return [(name,) for name in layers(self.network)]

    def mixed(self, layers: Layers) -> Path:
        return self._write(f"mixed-{len(list(self.directory.iterdir()))}", products_only=True, in_float=layers)

    def alone(self, layers: Layers) -> Runner:
        return self.open(self._write("alone", products_only=True, only=layers))

    def _write(self, name: str, *, products_only: bool, in_float: Layers = (), only: Layers = ()) -> Path:
        path = self.directory / f"{name}.onnx"
        write_qdq(
            self.network,
            self.ranges,
            self.method,
            path,
            symmetric=self.symmetric,
            products_only=products_only,
            in_float=in_float,
            only=only,
        )
        return path


# ---------------------------------------------------------------- OpenVINO


class OpenVinoForms:
    """Forms in OpenVINO's own files, quantized by the scheme that loses least on the check."""

    def __init__(self, network: Path, calibration: Calibration, method: str, directory: Path, open_form: Open) -> None:
        self.network, self.calibration, self.method = network, calibration, method
        self.directory = directory
        self.open: Open = open_form
        self.scheme: str | None = None
        self.quantized: QuantizedNetwork | None = None

    def whole(self, check: QualityCheck | None, on_progress: OnProgress) -> list[Form]:
        """Other schemes than the plain one are tried where they fit the network and the plain one is not close."""
        best: Form | None = None
        fitting = schemes(self.network)
        for position, scheme in enumerate(fitting):
            if best is not None and (check is None or best.reaches(CLOSE)):
                break
            try:
                quantized, form = self._full(
                    scheme,
                    check,
                    lambda share, its=position: on_progress((its + share) / len(fitting)),  # type: ignore[misc]
                )
            except StageFailed as error:
                if best is None:
                    raise
                logging.warning("int8 by the scheme %s failed: %s", scheme.name, error.detail)
                continue
            if best is None or _is_better(form, best):
                best, self.quantized = form, quantized
                self.scheme = scheme.name + ("" if quantized.bias_correction else ", without bias correction")
        assert best is not None
        return [best, *self._products(best, check)]

    def _full(
        self, scheme: Scheme, check: QualityCheck | None, on_progress: OnProgress
    ) -> tuple[QuantizedNetwork, Form]:
        """All in int8, with NNCF's correction of biases or without, whichever loses less."""
        corrected = QuantizedNetwork(self.network, self.calibration, self.method, scheme, on_progress=on_progress)
        path = self.directory / f"full-{scheme.name.replace(' ', '-')}.xml"
        form = self._saved(corrected, path, check)
        uncorrected = corrected.without_bias_correction()
        if check is None or uncorrected is None:
            return corrected, form
        other = self._saved(uncorrected, path.with_stem(f"{path.stem}-uncorrected"), check)
        return (uncorrected, other) if _loses_less(other, form) else (corrected, form)

    def _saved(self, quantized: QuantizedNetwork, path: Path, check: QualityCheck | None) -> Form:
        quantized.save(path)
        return Form("full", path, quality=_checked(path, check, self.open))

    def _products(self, full: Form, check: QualityCheck | None) -> list[Form]:
        """The products alone in int8, where that loses less: all that is fast in int8 stays in it."""
        assert self.quantized is not None
        others = tuple(name for name, is_product in self.quantized.layers if not is_product)
        if check is None or not others or full.reaches(CLOSE):
            return []
        path = self.quantized.save(self.directory / "products.xml", products_only=True)
        form = Form("products", path, quality=_checked(path, check, self.open))
        return [form] if _is_better(form, full) else []

    def segments(self) -> list[Layers]:
        assert self.quantized is not None
        return self.quantized.segments()

    def mixed(self, layers: Layers) -> Path:
        assert self.quantized is not None
        path = self.directory / f"mixed-{len(list(self.directory.iterdir()))}.xml"
        return self.quantized.save(path, in_float=layers)

    def alone(self, layers: Layers) -> Runner:
        assert self.quantized is not None
        return self.open(self.quantized.save_alone(self.directory / "alone.xml", layers))


def _loses_less(form: Form, other: Form) -> bool:
    """Whether it reaches more levels, or errs less: what two good forms lose of the metric is chance."""
    if form.quality is None or other.quality is None:
        return False
    ranks = [(-quality.num_levels, quality.rms_error) for quality in (form.quality, other.quality)]
    return ranks[0] < ranks[1]


def _is_better(form: Form, other: Form) -> bool:
    return form.quality is not None and other.quality is not None and form.quality.rank < other.quality.rank
