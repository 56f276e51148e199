"""The acceptance experiments A1, A5, B1 and C1 hold for three seeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import data_path

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fashion_mnist() -> None:
    folder = data_path("fashion_mnist_train.npz").parent
    found = subprocess.run(
        [sys.executable, "examples/fashion_mnist.py", "--data", str(folder)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]


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
