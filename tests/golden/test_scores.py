"""Detectors give the scores of their formulas, as float64 oracles computed them once and for all.

The files in `scores/` are added to, never edited: a change of a score is a change for every stored
calibration. `python -m tests.golden.test_scores` writes those that are missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oodmon.detectors import Scorer
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.golden import oracles

FOLDER = Path(__file__).parent / "scores"
LAYERS = ("early", "late")
GRAM: dict[str, dict[str, Any]] = {
    "gram_rowsum": {"statistic": "rowsum", "powers": (1, 2, 3, 4, 5)},
    "gram_rowsum_ten": {"statistic": "rowsum", "powers": tuple(range(1, 11))},
    "gram_triu": {"statistic": "triu", "powers": (1, 2, 3)},
    "gram_diag": {"statistic": "diag", "powers": (2, 4, 6)},
}
LOGITS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "msp": ("msp", {}, oracles.msp),
    "msp_warm": ("msp", {"temperature": 2.5}, lambda z: oracles.msp(z, 2.5)),
    "msp_prob": ("msp", {"scale": "prob"}, oracles.probability),
    "max_logit": ("max_logit", {}, oracles.max_logit),
    "energy": ("energy", {}, oracles.energy),
    "energy_warm": ("energy", {"temperature": 2.5}, lambda z: oracles.energy(z, 2.5)),
    "entropy": ("entropy", {}, oracles.entropy),
}


def make_logits() -> dict[str, np.ndarray]:
    """Few classes, many classes and a binary logit, with ties, saturation and -inf."""
    draw = np.random.default_rng(0)
    few = draw.normal(size=(24, 7)).astype(np.float32) * 3
    few[0] = 0.0
    few[1, :2] = 9.0
    few[2, 3] = 60.0
    few[3] = [1e4, -1e4, 0, 0, 0, 0, 0]
    few[4, 5] = -np.inf
    many = draw.normal(size=(12, 150)).astype(np.float32) * 2
    many[0] = 1.5
    many[1, [3, 9, 70]] = 12.0
    many[2, 4] = 50.0
    many[3, 4] = -np.inf
    binary = np.array([[-40.0], [-3.0], [0.0], [0.5], [70.0]], np.float32)
    return {"few": few, "many": many, "binary": binary}


def make_gram() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {
        "early": draw.normal(size=(60, 4, 3, 3)).astype(np.float32),
        "late": np.maximum(draw.normal(size=(60, 5)), 0).astype(np.float32) * 40,
        "logits": draw.normal(size=(60, 3)).astype(np.float32) * 2,
    }


def gram_oracle(data: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, np.ndarray]:
    """Bounds from rows 0..29, weights from rows 30..39, scores of rows 40..59."""
    logits = data["logits"].astype(np.float64)
    label = logits.argmax(axis=1)
    sure = -oracles.probability(logits)
    found: dict[str, np.ndarray] = {}
    total = np.zeros(20)
    for name in LAYERS:
        maps = data[name].astype(np.float64).reshape(60, data[name].shape[1], -1)
        unit = 2.0 ** np.ceil(np.log2(np.abs(maps[:40]).max()))
        values = oracles.gram_statistics(maps, options["powers"], options["statistic"]) / unit**2
        lower = np.array([values[:30][label[:30] == c].min(axis=0) for c in range(3)])
        upper = np.array([values[:30][label[:30] == c].max(axis=0) for c in range(3)])
        deviation = oracles.gram_deviation(values, lower[label], upper[label], 1e-6) / sure
        weight = 1.0 / deviation[30:40].mean()
        total += weight * deviation[40:]
        found |= {f"{name}.lower": lower, f"{name}.upper": upper}
        found[f"{name}.weight"], found[f"{name}.unit"] = np.array(weight), np.array(unit)
    return {**found, "scores": total}


def write() -> None:
    logits = {f"in_{name}": array for name, array in make_logits().items()}
    for name, (_, _, oracle) in LOGITS.items():
        for kind, array in make_logits().items():
            logits[f"{name}_{kind}"] = oracle(array.astype(np.float64))
    gram = {f"in_{name}": array for name, array in make_gram().items()}
    for name, options in GRAM.items():
        expected = gram_oracle(make_gram(), options)
        gram |= {f"{name}_{key}": array for key, array in expected.items()}
    for name, arrays in (("logits", logits), ("gram", gram)):
        path = FOLDER / f"{name}.npz"
        if not path.exists():
            np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # names are not options


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as data:
        return dict(data)


@pytest.mark.parametrize("kind", ["few", "many", "binary"])
@pytest.mark.parametrize("name", list(LOGITS))
def test_logit_scores(name: str, kind: str) -> None:
    golden = read("logits")
    detector, options, oracle = LOGITS[name]
    logits = golden[f"in_{kind}"]
    expected = golden[f"{name}_{kind}"]
    np.testing.assert_allclose(oracle(logits.astype(np.float64)), expected, rtol=1e-12)
    scorer = Scorer(detectors.create(detector, **options), {})
    found = scorer.score(Activations(logits=torch.from_numpy(logits))).numpy()
    np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("name", list(GRAM))
def test_gram_scores(name: str) -> None:
    golden = read("gram")
    options = GRAM[name]
    expected = {key: golden[f"{name}_{key}"] for key in gram_oracle(make_gram(), options)}
    data = {key: golden[f"in_{key}"] for key in (*LAYERS, "logits")}
    for key, array in gram_oracle(data, options).items():
        np.testing.assert_allclose(array, expected[key], rtol=1e-9, err_msg=key)
    state = {
        f"{layer}.{end}": torch.from_numpy(expected[f"{layer}.{end}"]).float()
        for layer in LAYERS
        for end in ("lower", "upper")
    }
    for key in ("unit", "weight"):
        values = [float(expected[f"{layer}.{key}"]) for layer in LAYERS]
        state[key] = torch.tensor(values, dtype=torch.float32)
    scorer = Scorer(detectors.create("gram", layers=LAYERS, **options), state)
    rows = {key: torch.from_numpy(array[40:]) for key, array in data.items()}
    found = scorer.score(
        Activations(layers={layer: rows[layer] for layer in LAYERS}, logits=rows["logits"])
    )
    np.testing.assert_allclose(found.numpy(), expected["scores"], rtol=2e-4)


if __name__ == "__main__":
    write()
