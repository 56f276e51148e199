"""FashionMNIST and the sets beside it, and the classifier of the acceptance experiments."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples import fashion_mnist as example
from oodmon import Activations
from oodmon.contracts import Detector
from oodmon.detectors import Reference, Scorer
from oodmon.evaluate import auroc
from tests.data import data_path

__all__ = ["SEEDS", "classifier", "images", "labelled", "learnt", "seen", "sets"]

SEEDS = (0, 1, 2)


def images(name: str, rows: int, start: int = 0) -> Tensor:
    """(rows, 1, 28, 28) in [0, 1]: that part of a fixed permutation."""
    return labelled(name, rows, start)[0]


def labelled(name: str, rows: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """The same with labels (rows,)."""
    with np.load(data_path(f"{name}.npz")) as data:
        found, labels = data["images"], data["labels"]
    chosen = np.random.default_rng(0).permutation(len(found))[start : start + rows]
    return torch.from_numpy(found[chosen]).float().unsqueeze(1) / 255, torch.from_numpy(
        labels[chosen]
    ).long()


@functools.cache
def sets() -> Mapping[str, example.Images]:
    """The training images, test images of the same kind ("ID"), and three other sets."""
    folder = data_path("fashion_mnist_train.npz").parent
    names = {"ID": "fashion_mnist_test", **example.OODS}
    return {
        "train": example.load(folder, "fashion_mnist_train", example.TRAIN_ROWS),
        **{what: example.load(folder, file, example.TEST_ROWS) for what, file in names.items()},
    }


@functools.cache
def classifier(seed: int) -> tuple[example.Backbone, nn.Linear]:
    """Trained for four epochs, once in a run of the tests; in eval mode."""
    return example.train_classifier(sets()["train"], seed)


def learnt(
    detector: Detector, inputs: Tensor, seed: int = 0, outliers: Tensor | None = None
) -> Scorer:
    """Learnt from inputs; outliers are rows of the reference with the label -1."""
    labels = torch.zeros(len(inputs), dtype=torch.int64)
    if outliers is not None:
        inputs = torch.cat([inputs, outliers])
        labels = torch.cat([labels, labels.new_full((len(outliers),), -1)])
    return Scorer.learn(detector, Reference.from_arrays(inputs=inputs, labels=labels, seed=seed))


def seen(scorer: Scorer, inside: Tensor, outside: Tensor) -> float:
    """AUROC of the inputs outside against those inside."""

    def scores(inputs: Tensor) -> np.ndarray[Any, Any]:
        return scorer.score(Activations(inputs=inputs)).numpy()

    return float(auroc(scores(inside), scores(outside)))
