"""Reference data → what detectors learnt and how their scores are calibrated (torch)."""

from __future__ import annotations

from oodmon.fitting.learn import Fitted, Fitting, fit
from oodmon.fitting.sources import Batch, Source

__all__ = ["Batch", "Fitted", "Fitting", "Source", "fit"]
