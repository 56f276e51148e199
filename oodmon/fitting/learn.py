"""One pass over the reference data, then: learn on one share, calibrate on the other.

The shares are disjoint whatever the source, because a calibration on samples that a detector has
learnt from would promise too much. The model runs once; what the tap saw is kept in memory, and
beyond a limit in temporary files.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from oodmon.calibration import Calibration
from oodmon.contexts import Context
from oodmon.contracts import Detector, Probe, Reads, Tap
from oodmon.detectors import Reference, Scorer
from oodmon.errors import ContractError
from oodmon.fitting.placed import check
from oodmon.fitting.reading import Reading, offered, place_of, probe_of, reads_of
from oodmon.fitting.shares import Shares, moved
from oodmon.fitting.sources import Source
from oodmon.taps.identity import identify
from oodmon.taps.layout import head_of

__all__ = ["RUN", "Fitted", "Fitting", "fit"]

log = logging.getLogger(__name__)

Progress = Callable[[str, float, str], None]
"""Called with a stage (``tap`` or a detector's id), the share of it that is done, and a note."""

RUN: Final = 256
"""Neighbours that stay together in data that is in order."""

_LEAST: Final = 2
"""Samples that each share must have."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """One detector.

    Attributes:
        scorer: the detector with what it learnt.
        calibration: the held-out scores.
        invalid: held-out samples that it could not score; they are left out.
        learn_seconds, score_seconds: spent on learning; on scoring the held-out share.
        scores: float32 (n,) the held-out scores in the order of the data, NaN left out.
        predicted: int64 (n,) their predicted classes, or empty.
    """

    scorer: Scorer
    calibration: Calibration
    invalid: int
    learn_seconds: float
    score_seconds: float
    scores: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fitting:
    """All detectors of a config.

    Attributes:
        detectors: id → what became of it.
        found: what the tap reads, one sentence each.
        learnt, calibrated: samples in the two shares.
        accuracy: the model's, on the labelled samples, or NaN where that cannot be told.
        outliers: known outliers, which are in neither share.
        commonest: share of the commonest label, which guessing reaches.
    """

    detectors: Mapping[str, Fitted]
    found: tuple[str, ...]
    learnt: int
    calibrated: int
    accuracy: float
    outliers: int = 0
    commonest: float = 0.0


def fit(
    model: nn.Module,
    source: Source,
    *,
    tap: Tap,
    detectors: Mapping[str, Detector],
    model_name: str,
    version: str,
    learn_share: float = 0.5,
    seed: int = 0,
    device: str = "",
    in_order: bool = False,
    progress: Progress | None = None,
    context: Context = Context(),  # noqa: B008  # frozen
) -> Fitting:
    """Learn and calibrate every detector.

    Args:
        model: run in evaluation mode without gradients; left as it was.
        source: in-distribution data as served, labelled for detectors that need classes. Rows
            with the label -1 are known outliers: never calibrated with, and learnt from only by
            detectors that learn from such.
        tap, detectors: as configured.
        model_name, version: kept in the states' headers, and so is which weights it has.
        learn_share: share of the samples to learn from, (0, 1); the rest calibrates.
        seed: of the split and of every detector's randomness.
        device: where the model and the detectors run; "" leaves the model where it is.
        in_order: the data is in the order as served, so neighbours are kept together.
        progress: told how far it is.
        context: what scores will be ranked within: the data has to say it.

    Raises:
        ContractError: the tap finds no layer, or the data cannot be used.
    """
    if not 0.0 < learn_share < 1.0:
        raise ContractError(f"learn_share: {learn_share} is not in (0, 1)")
    tell = progress or _quiet
    if device:
        model = model.to(device)
    place = place_of(model)
    weights = identify(model)
    layers = offered(tap, model)
    pinned = {name: detector.pin(layers) for name, detector in detectors.items()}
    with tempfile.TemporaryDirectory(prefix="oodmon-fit-") as scratch:
        shares = Shares(Path(scratch), learn_share, seed, RUN if in_order else 1)
        reads = reads_of(pinned.values())
        found = _run(model, source, tap, reads, shares, tell, context)
        if min(shares.learn.rows, shares.calibrate.rows) < _LEAST:
            raise ContractError(
                f"{shares.learn.rows} samples to learn from and {shares.calibrate.rows} to "
                f"calibrate with are too few; at least {_LEAST} of each are needed"
            )
        if identify(model) != weights:
            log.warning(
                "the model's own passes change its parameters or buffers, so the states do not say "
                "which it has, and one that was trained again will not be told"
            )
            weights = ""
        made_for = (model_name, version, weights)
        head = head_of(getattr(model, "_orig_mod", model))
        probe = probe_of(tap, model, reads)
        fitted = {
            name: _fit_one(name, detector, shares, head, seed, place, tell, made_for, probe)
            for name, detector in pinned.items()
        }
    return Fitting(
        fitted,
        found,
        shares.learn.rows,
        shares.calibrate.rows,
        shares.accuracy,
        shares.outliers.rows,
        shares.commonest,
    )


def _fit_one(
    name: str,
    detector: Detector,
    shares: Shares,
    head: tuple[Tensor, Tensor] | None,
    seed: int,
    device: torch.device,
    tell: Progress,
    made_for: tuple[str, str, str],
    probe: Probe | None,
) -> Fitted:
    begun = time.monotonic()
    reference = Reference.from_batches(
        lambda: itertools.chain(shares.learn.batches(), shares.outliers.batches()),
        head=head,
        seed=seed,
        device=device,
        progress=lambda done, note: tell(name, 0.9 * done, note or "learning"),
        probe=probe,
    )
    try:
        scorer = Scorer.learn(detector, reference, *made_for)
        learnt = time.monotonic()
        tell(name, 0.9, "calibrating")
        columns = [
            scorer.score(dataclasses.replace(moved(acts, device), probe=probe)).cpu().numpy()
            for acts in shares.calibrate.batches()
        ]
    except ContractError as error:
        raise ContractError(f"detector {name!r}: {error}") from error
    scores = np.concatenate(columns)
    rows = ~np.isnan(scores)
    valid, classes = scores[rows], _predicted(shares)
    if len(valid) < _LEAST:
        raise ContractError(
            f"detector {name!r} could score {len(valid)} of {len(scores)} held-out samples"
        )
    labelled, wrong = shares.held
    calibration = dataclasses.replace(
        Calibration.from_scores(
            name, scorer.digest, scores, classes, detector.measures, **shares.places
        ),
        labelled=labelled,
        wrong=wrong,
    )
    tell(name, 1.0, "done")
    return Fitted(
        scorer,
        calibration,
        len(scores) - len(valid),
        learnt - begun,
        time.monotonic() - learnt,
        valid,
        classes[rows] if len(classes) else classes,
    )


def _predicted(shares: Shares) -> npt.NDArray[np.int64]:
    """The predicted classes of the held-out share, empty for a model without class logits."""
    columns = []
    for acts in shares.calibrate.batches():
        if acts.logits is None or acts.logits.ndim != 2 or acts.logits.shape[1] < 2:
            return np.empty(0, np.int64)
        columns.append(acts.logits.argmax(1).cpu().numpy())
    return np.concatenate(columns) if columns else np.empty(0, np.int64)


def _run(
    model: nn.Module,
    source: Source,
    tap: Tap,
    reads: Reads,
    shares: Shares,
    tell: Progress,
    context: Context,
) -> tuple[str, ...]:
    """Every sample through the tapped model once; what the tap found."""
    done = 0
    with Reading(model, tap, reads) as reading:
        for batch in source.batches():
            check(batch.places, context, source.told)
            acts = reading.read(batch)
            shares.add(acts, batch.places)
            done += acts.rows
            tell("tap", done / source.samples if source.samples else 0.0, f"{done} samples")
    tell("tap", 1.0, f"{done} samples")
    return reading.found


def _quiet(stage: str, done: float, note: str) -> None:
    del stage, done, note
