"""The model that detectors are checked on where they read one, and the images that it knows."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from oodmon.taps.twin import Twin

__all__ = ["CLASSES", "IMAGE", "NOISE", "Model", "around", "members", "probe_on", "served"]

CLASSES: Final = 4
IMAGE: Final = (1, 9, 8)
NOISE: Final = 0.3

_FAR: Final = 30.0  # strange samples lie this many times the classes' own spread away
_FAINT: Final = 0.02  # or are shrunk by this, in the layer called `faint`
_MEMBERS: Final = 2


def centres_of(name: str, shape: tuple[int, ...]) -> tuple[Tensor, torch.Generator]:
    """One centre per class, (CLASSES, …), that the name decides."""
    fixed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand((CLASSES, *shape), generator=fixed) + 0.5, fixed


def strangeness(name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The centres (CLASSES, …), and how far from each of them strange samples lie (…), positive."""
    centres, fixed = centres_of(name, shape)
    return centres, torch.rand(shape, generator=fixed) * _FAR


def around(
    name: str, shape: tuple[int, ...], labels: Tensor, draw: torch.Generator, strange: bool
) -> Tensor:
    """Non-negative, as after a ReLU, around the centres of the classes or far from them."""
    centres, away = strangeness(name, shape)
    noise = torch.randn((len(labels), *shape), generator=draw) * NOISE / 3
    found = centres[labels] + noise
    if strange:
        found = found * _FAINT if name == "faint" else found + away
    return found.clamp_(min=0.0)


class Near(nn.Module):
    """Nearness of an image to each centre, (B, CLASSES) in (0, 1]."""

    def __init__(self, centres: Tensor) -> None:
        super().__init__()
        self.centres = nn.Parameter(centres)

    def forward(self, inputs: Tensor) -> Tensor:
        """exp(-|x - centre|² / 4)."""
        gaps = inputs[:, None] - self.centres
        return torch.exp(-gaps.square().sum(dim=2) / 4.0)


class Model(nn.Module):
    """Sure near a class; far from all of them unsure, and moved by which units are dropped.

    Args:
        seed: of what it makes of images that it does not know: members of an ensemble differ there.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.faint = Near(centres_of("inputs", IMAGE)[0].flatten(1))
        self.norm = nn.BatchNorm1d(CLASSES, affine=False)
        self.drop = nn.Dropout(0.3)
        draw = torch.Generator().manual_seed(seed)
        self.guess = nn.Parameter(torch.randn(self.faint.centres.shape, generator=draw) * 0.035)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, CLASSES)."""
        rows = inputs.float().flatten(1)
        guessed = self.drop(torch.tanh(rows / 10.0)) @ self.guess.T
        found: Tensor = self.norm(8.0 * self.faint(rows)) + guessed
        return found


@functools.cache
def served(device: str) -> nn.Module:
    """The model as it is served; in evaluation mode."""
    return Model().to(device).eval()


@functools.cache
def probe_on(device: str) -> Twin:
    """Further passes through it."""
    return Twin(served(device))


@functools.cache
def members() -> str:
    """A folder with the weights of other members of an ensemble."""
    folder = Path(tempfile.mkdtemp(prefix="oodmon-check-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for number in range(1, 1 + _MEMBERS):
        save_file(Model(number).state_dict(), folder / f"{number}.safetensors")
    return str(folder)
