"""Predictions on their way to the store, and what labels that came late say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from oodmon.calibration import Calibration
from oodmon.daemon.metrics import Metrics
from oodmon.labelling import Labelling
from oodmon.records import ScoreBatch
from oodmon.store.events import Store
from oodmon.store.labels import Prediction

__all__ = ["predictions", "tell"]

_SECOND: Final = 1_000_000_000
_GAUGES: Final = (
    "oodmon_labelled_samples",
    "oodmon_accuracy_ratio",
    "oodmon_accuracy_low_ratio",
    "oodmon_accuracy_high_ratio",
    "oodmon_estimate_shift_ratio",
    "oodmon_corrected_accuracy_ratio",
)


def predictions(labelling: Labelling, batch: ScoreBatch, error_of: str) -> Sequence[Prediction]:
    """What is kept of one batch: nothing where it has no predicted classes.

    Expected errors are kept as the detector gave them, whatever labels have made of them since: so
    all labels are about the same.

    Args:
        labelling: which samples.
        batch: as it came.
        error_of: the detector whose scores are the probability of a wrong answer; "" for none.
    """
    if batch.repeats or not len(batch.predicted):
        return ()
    errors = batch.scores[error_of].tolist() if error_of else [math.nan] * batch.rows
    segments = (
        [batch.segments[place] for place in batch.segment.tolist()]
        if len(batch.segment)
        else [""] * batch.rows
    )
    names = batch.sample_ids or [batch.sample_id(row) for row in range(batch.rows)]
    return [
        Prediction(name, batch.model, batch.version, segment, batch.observed_at, answer, error)
        for name, segment, answer, error in zip(
            names, segments, batch.predicted.tolist(), errors, strict=True
        )
        if labelling.keeps(name)
    ]


def tell(
    labelling: Labelling,
    store: Store,
    metrics: Metrics,
    newest: int,
    judge: Calibration | None = None,
) -> None:
    """What the labels that were joined come to; too few tell nothing but their number.

    Args:
        labelling: over which span.
        store, metrics: from where to where.
        newest: start of the newest window, from which the span goes back.
        judge: where labels have set the estimate right, how; what is told of how far it is off is
            told of the estimate so set right.
    """
    since = max(newest - round(labelling.over_seconds * _SECOND), 0)
    found = store.measured(since, 2**63 - 1)
    for name in _GAUGES:
        metrics.clear(name)
    for one in found:
        model = {"model": one.model, "model_version": one.version}
        metrics.put("oodmon_labelled_samples", one.labelled, **model)
        if one.labelled < labelling.least_labels:
            continue
        shift = one.shift
        # Another read than the one before: what was labelled then may be deleted by now.
        if judge is not None and (judged := store.judged(one.model, one.version, since)):
            errors = judge.wrong_at(np.array([error for error, _ in judged]))
            shift = float(errors.mean()) - sum(wrong for _, wrong in judged) / len(judged)
        told = (one.accuracy, one.low, one.high, shift, one.corrected)
        for name, value in zip(_GAUGES[1:], told, strict=True):
            if not math.isnan(value):
                metrics.put(name, value, **model)
