"""Networks whose published weights are at hand: a CIFAR-10 ResNet, an MNIST ConvNet, a TREC GRU.

Each `load_…` function reads a safetensors state dict (nothing is unpickled) and gives the network
in evaluation mode. What belongs to the input is part of the network: images go in as [0, 1].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ConvNet", "Gru", "ResNet", "Vocabulary", "load_convnet", "load_gru", "load_resnet"]

CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_STD = (0.229, 0.224, 0.225)
WIDTHS = (16, 32, 64)
SLOPE = 1.702  # of the sigmoid that approximates GELU
UNKNOWN, PAD = 0, 1
WORDS = 40  # of a question; shorter ones are padded in front

_Net = TypeVar("_Net", bound=nn.Module)


class Block(nn.Module):
    """Two convolutions beside a shortcut that drops every other place and adds empty channels."""

    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.empty = stride, (out - wide) // 2

    def forward(self, maps: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(maps)))
        kept = maps
        if self.stride > 1 or self.empty:
            kept = functional.pad(
                maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.empty, self.empty)
            )
        return functional.relu(self.bn2(self.conv2(inner)) + kept)


class ResNet(nn.Module):
    """Images (B, 3, 32, 32) in [0, 1] → logits (B, 10); He et al., CVPR 2016, option A."""

    mean: Tensor
    std: Tensor
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(CIFAR_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(CIFAR_STD)[:, None, None], persistent=False)
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        wide = WIDTHS[0]
        for number, out in enumerate(WIDTHS, 1):
            stride = 1 if number == 1 else 2
            stage = [Block(wide, out, stride), *(Block(out, out, 1) for _ in range(blocks - 1))]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            wide = out
        self.linear = nn.Linear(wide, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = functional.relu(self.bn1(self.conv1((images - self.mean) / self.std)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        logits: Tensor = self.linear(maps.mean(dim=(2, 3)))
        return logits


class ConvNet(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] → logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = _gelu(functional.max_pool2d(self.conv1(images), 2))
        maps = _gelu(functional.max_pool2d(self.conv2(maps), 2))
        logits: Tensor = self.fc2(_gelu(self.fc1(maps.flatten(1))))
        return logits


class Gru(nn.Module):
    """Token ids (B, T) → logits (B, 50)."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 50, padding_idx=PAD)
        self.gru = nn.GRU(50, 128, num_layers=2, batch_first=True)
        self.linear = nn.Linear(128, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        _, last = self.gru(self.embedding(tokens))
        logits: Tensor = self.linear(last[1])
        return logits


def load_resnet(path: Path, blocks: int) -> ResNet:
    """`blocks` a stage: 3 of ResNet-20, 9 of ResNet-56."""
    return _filled(ResNet(blocks), path)


def load_convnet(path: Path) -> ConvNet:
    """Of the Outlier Exposure paper (Hendrycks, Mazeika and Dietterich, ICLR 2019)."""
    return _filled(ConvNet(), path)


def load_gru(path: Path, vocabulary: Path) -> tuple[Gru, Vocabulary]:
    """Of the same paper, and the words that it knows."""
    words = Vocabulary(json.loads(vocabulary.read_text(encoding="utf-8"))["itos"])
    return _filled(Gru(len(words.places)), path), words


class Vocabulary:
    """Texts → token ids."""

    def __init__(self, words: Sequence[str]) -> None:
        self.places = {word: place for place, word in enumerate(words)}

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """(N, WORDS): lower case, split on white space, cut at the end, padded in front."""
        found = torch.full((len(texts), WORDS), PAD)
        for row, text in enumerate(texts):
            ids = [self.places.get(word, UNKNOWN) for word in text.lower().split()][:WORDS]
            if ids:
                found[row, -len(ids) :] = torch.tensor(ids)
        return found


def _gelu(values: Tensor) -> Tensor:
    return values * torch.sigmoid(SLOPE * values)


def _filled(network: _Net, path: Path) -> _Net:
    network.load_state_dict(load_file(path))
    return network.eval()
