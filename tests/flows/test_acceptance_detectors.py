"""The acceptance experiments A5, B1 and C1 hold for three seeds, by the example that shows them.

The figures are in docs/acceptance.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples import fashion_mnist as example
from tests.data import data_path
from tests.fashion import SEEDS
from tests.figures import Figures

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fashion_mnist(tmp_path: Path, figures: Figures) -> None:
    folder = data_path("fashion_mnist_train.npz").parent
    out = tmp_path / "figures.json"
    found = subprocess.run(
        [
            *(sys.executable, "examples/fashion_mnist.py", "--data", str(folder)),
            *("--out", str(out), "--seeds", *map(str, SEEDS)),
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.exists(), found.stdout[-4000:] + found.stderr[-2000:]
    for run in json.loads(out.read_text(encoding="utf-8")):
        keep(run, figures)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


def keep(run: dict[str, Any], figures: Figures) -> None:
    """The figures of one seed, by the bounds of the example itself."""
    seed, aurocs = run["seed"], run["auroc"]
    for label, (experiment, bounds) in example.AT_LEAST.items():
        for ood, bound in zip(example.OODS, bounds, strict=True):
            if bound:
                what = f"{label}: {ood}"
                figures.hold(experiment, what, aurocs[label][ood], seed=seed, least=bound)
    for label in aurocs:
        if label.startswith("gram"):
            gain = aurocs[label]["MNIST"] - aurocs["msp"]["MNIST"]
            least = example.GRAM_OVER_MSP
            figures.hold("A5", f"{label} above msp: MNIST", gain, seed=seed, least=least)
    for label, bound in example.ACCURACY.items():
        experiment = "C1" if "duq" in label else "A1"
        accuracy = run["accuracy"][label]
        figures.hold(experiment, f"{label}: accuracy", accuracy, seed=seed, least=bound)


def test_a_missing_file_is_said_clearly(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "examples/fashion_mnist.py", "--data", str(tmp_path)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode != 0
    assert "fashion_mnist_train.npz is missing" in found.stderr
    assert "Traceback" not in found.stderr
