"""The public library that scores are compared with, where it is installed; else a skip."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
from scipy.stats import spearmanr
from torch import Tensor


def pytorch_ood() -> Any:
    """pytorch-ood's detectors, entered without its `__init__`, which needs torchvision."""
    if "pytorch_ood" not in sys.modules:
        spec = importlib.util.find_spec("pytorch_ood")
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip("pytorch-ood is not installed (pip install --no-deps pytorch-ood==0.4.0)")
        package = types.ModuleType("pytorch_ood")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["pytorch_ood"] = package
    try:
        return importlib.import_module("pytorch_ood.detector")
    except ImportError as error:
        pytest.skip(f"pytorch-ood cannot be imported: {error}")


def rank_agreement(ours: Tensor, theirs: Tensor) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(ours.double().numpy(), theirs.double().numpy()).statistic)
