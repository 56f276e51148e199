"""Where tests find real data sets; what is not on this machine is a skip with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def data_path(name: str) -> Path:
    """The file of this name in OODMON_TEST_DATA or in ``shared/data`` beside the checkout."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("OODMON_TEST_DATA", root.parent / "shared" / "data"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"data set {name} is not here; set OODMON_TEST_DATA to a folder that has it")
    return path
