"""One decision over many streams: the mean of their evidence, and which of them changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from oodmon.records import ALL, DriftResult

__all__ = ["LOG10_FLOOR", "together"]

_LN10: Final = math.log(10.0)
LOG10_FLOOR: Final = -9.0
"""Evidence below this is reported as this: it is as good as none."""


def together(
    results: Sequence[DriftResult], counted: Sequence[DriftResult]
) -> Sequence[DriftResult]:
    """Decide on the mean evidence; name the streams that changed by e-d-BH.

    The mean of e-detectors is one whatever their dependence. Which streams: the k of D with the
    most evidence, k the largest for which the k-th has at least A D / k (Dandapanthula and Ramdas,
    arXiv 2501.04130).

    Args:
        results: of the streams that have a window now; the statistic is log10 of the evidence.
        counted: all streams that share the promise, those without a window with the evidence that
            they have kept. A stream that can gather none is not among them.
    """
    if not results:
        return results
    threshold, mean, bar, worst = results[0].threshold, LOG10_FLOOR, math.inf, results[0]
    if counted:
        evidence = np.array([result.statistic for result in counted])
        streams = len(counted)
        mean = float(np.logaddexp.reduce(evidence * _LN10)) / _LN10 - math.log10(streams)
        ordered = np.sort(evidence)[::-1]
        bars = threshold + np.log10(streams / np.arange(1, streams + 1))
        reached = np.flatnonzero(ordered >= bars)
        bar = float(ordered[reached[-1]]) if len(reached) else math.inf
        worst = counted[int(np.argmax(evidence))]
    named = [
        replace(result, drifted=True) if result.statistic >= bar else result for result in results
    ]
    overall = replace(
        results[0],
        detector=ALL,
        segment=ALL,
        statistic=mean,
        drifted=bool(counted) and mean >= threshold,
        effect=worst.effect,
        since=worst.since,
        samples=max(result.samples for result in results),
        reference_samples=worst.reference_samples,
    )
    return [*named, overall]
