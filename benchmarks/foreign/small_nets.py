"""Networks that come as bare weights, written down again so that they load: facenet-pytorch's, and one of digits.

Only the layers and their names follow the packages; none of their code is imported, and the weights are read without
unpickling anything but tensors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


class ProposalNet(nn.Module):
    """MTCNN's first net, fully convolutional: boxes (N, 4, h, w) and face probabilities (N, 2, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.pool1(self.prelu1(self.conv1(images)))
        found = self.prelu3(self.conv3(self.prelu2(self.conv2(found))))
        return self.conv4_2(found), self.conv4_1(found).softmax(dim=1)


class RefineNet(nn.Module):
    """MTCNN's second net, on 24 x 24: a box (N, 4) and face probabilities (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.pool1(self.prelu1(self.conv1(images)))
        found = self.prelu3(self.conv3(self.pool2(self.prelu2(self.conv2(found)))))
        found = self.prelu4(self.dense4(found.permute(0, 3, 2, 1).flatten(1)))
        return self.dense5_2(found), self.dense5_1(found).softmax(dim=1)


class OutputNet(nn.Module):
    """MTCNN's third net, on 48 x 48: a box (N, 4), five points (N, 10) and face probabilities (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.pool1(self.prelu1(self.conv1(images)))
        found = self.pool2(self.prelu2(self.conv2(found)))
        found = self.pool3(self.prelu3(self.conv3(found)))
        found = self.prelu4(self.conv4(found))
        found = self.prelu5(self.dense5(found.permute(0, 3, 2, 1).flatten(1)))
        return self.dense6_2(found), self.dense6_3(found), self.dense6_1(found).softmax(dim=1)


class DigitNet(nn.Module):
    """digit-recognizer-py's net, on 28 x 28: scores of ten digits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2)]
        self.conv_layers = nn.Sequential(*layers)
        self.fc_layers = nn.Sequential(nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.fc_layers(self.conv_layers(images).flatten(1))
        return scores


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """The network with the weights of the file, every name matched, ready to run."""
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


def export(network: nn.Module, shape: tuple[int, ...], outputs: list[str], path: Path) -> Path:
    """The network as ONNX with a dynamic batch; `shape` is that of one sample. Written once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        example = torch.zeros(2, *shape)
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        program.save(str(partial))
        partial.rename(path)
    return path
