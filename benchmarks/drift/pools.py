"""Scores of real models on known and novel data, for the streams of the benchmark.

A small CNN on Fashion-MNIST with KMNIST, notMNIST and corruptions as what it does not know, and a
text classifier on TREC questions with captions and news. Scores are held-out ones, energy for the
images and negative largest logit for the texts; both higher for what is novel.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["drifting", "save_pools"]

F8 = npt.NDArray[np.float64]
TRAIN = 12_000
EPOCHS = 2
WORDS = 3_000


def save_pools(data: Path, target: Path) -> list[str]:
    """Train, score, save; what could not be made, and why."""
    pools: dict[str, F8] = {}
    missing = []
    for make in (_images, _texts, drifting):
        try:
            pools |= {name: _in_order(name, scores) for name, scores in make(data).items()}
        except (OSError, ImportError, KeyError) as error:
            missing.append(f"{make.__name__.strip('_')}: {error}")
    arrays: dict[str, Any] = {name.replace("/", "|"): found for name, found in pools.items()}
    np.savez(target, **arrays)
    return missing


def _in_order(name: str, scores: F8) -> F8:
    """A pool is a law: sorted, each value once; a stream that drifts has its own order."""
    return scores if name.startswith("drifting/") else np.unique(scores)


def _archive(path: Path) -> npt.NDArray[np.float32]:
    with np.load(path) as file:
        images = file["images"]
    scaled: npt.NDArray[np.float32] = images.astype(np.float32) / 255.0
    return scaled.reshape(len(images), 1, 28, 28)


def _images(data: Path) -> dict[str, F8]:
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with np.load(data / "fashion_mnist_train.npz") as file:
        images = file["images"].reshape(-1, 1, 28, 28).astype(np.float32) / 255.0
        labels = file["labels"].astype(np.int64)
    x, y = torch.from_numpy(images[:TRAIN]), torch.from_numpy(labels[:TRAIN])
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x))
        for begin in range(0, len(x), 64):
            rows = order[begin : begin + 64]
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def score(values: npt.NDArray[np.float32]) -> F8:
        with torch.no_grad():
            found = torch.cat(
                [
                    -torch.logsumexp(model(torch.from_numpy(values[at : at + 512])), 1)
                    for at in range(0, len(values), 512)
                ]
            )
        scores: F8 = found.double().numpy()
        return scores

    known = _archive(data / "fashion_mnist_test.npz")
    rng = np.random.default_rng(0)
    noisy = known + 0.25 * rng.standard_normal(known.shape).astype(np.float32)
    return {
        "images/id": score(np.concatenate([known, images[TRAIN : TRAIN + 10_000]])),
        "images/kmnist": score(_archive(data / "kmnist_test.npz")),
        "images/notmnist": score(_archive(data / "notmnist_test.npz")),
        "images/noise": score(np.clip(noisy, 0.0, 1.0)),
    }


def _lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def _texts(data: Path) -> dict[str, F8]:
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [json.loads(line) for line in _lines(data / "text_trec.jsonl.gz")]
    order = np.random.default_rng(0).permutation(len(rows))
    learnt = [rows[place] for place in order[:3_000]]
    held = [rows[place]["text"] for place in order[3_000:]]
    counted: Counter[str] = Counter()
    for row in learnt:
        counted.update(row["text"].lower().split())
    places = {word: at for at, (word, _) in enumerate(counted.most_common(WORDS))}
    classes = sorted({row["label"] for row in learnt})

    def bags(texts: list[str]) -> Any:
        found = np.zeros((len(texts), WORDS), np.float32)
        for at, text in enumerate(texts):
            known = [places[word] for word in text.lower().split() if word in places]
            found[at, known] = 1.0
        return torch.from_numpy(found / np.maximum(np.sqrt(found.sum(1, keepdims=True)), 1.0))

    x = bags([row["text"] for row in learnt])
    y = torch.tensor([classes.index(row["label"]) for row in learnt])
    model = nn.Sequential(nn.Linear(WORDS, 32), nn.ReLU(), nn.Linear(32, len(classes)))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(6):
        shuffled = torch.randperm(len(x))
        for begin in range(0, len(x), 64):
            part = shuffled[begin : begin + 64]
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def score(texts: list[str]) -> F8:
        with torch.no_grad():
            scores: F8 = -model(bags(texts)).max(1).values.double().numpy()
        return scores

    return {
        "texts/id": score(held),
        "texts/captions": score(_lines(data / "text_multi30k_captions.txt.gz")),
        "texts/news": score(_lines(data / "text_wmt16_sentences.txt.gz")),
    }


def drifting(data: Path) -> dict[str, F8]:
    """Streams that are known to drift, as one score each: how far a row lies from the first 2,000.

    The squared distance in standard deviations of each column, as a Mahalanobis detector on
    uncorrelated features would score it. Nobody knows the change points.
    """
    found = {}
    for name, file, columns in (
        ("Elec2", "stream_elec2.csv.gz", ("nswprice", "nswdemand", "vicprice", "vicdemand")),
        ("NOAA", "stream_noaa_weather.csv.gz", ()),
    ):
        path = data / file
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            head = lines.readline().strip().split(",")
            wanted = [head.index(column) for column in columns or head[:-1]]
            table = np.array(
                [[float(line.split(",")[at]) for at in wanted] for line in lines], np.float64
            )
        first = table[:2_000]
        spread = np.maximum(first.std(axis=0), 1e-9)
        found[f"drifting/{name}"] = (((table - first.mean(axis=0)) / spread) ** 2).sum(axis=1)
    return found
