"""Scores of a data set by detectors that were fitted before: one pass, nothing kept but scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import nn

from oodmon.contracts import Tap
from oodmon.detectors import Scorer
from oodmon.errors import ContractError
from oodmon.fitting.learn import Progress
from oodmon.fitting.reading import Reading, probe_of, reads_of
from oodmon.fitting.sources import Source

__all__ = ["measure"]


def measure(
    model: nn.Module,
    source: Source,
    *,
    tap: Tap,
    scorers: Mapping[str, Scorer],
    progress: Progress | None = None,
    stage: str = "data",
) -> dict[str, npt.NDArray[np.float32]]:
    """Detector → scores (n,) of the source's samples, in its order; NaN where it cannot score one.

    The model runs as in service: in evaluation mode, through the same tap, and it is left as it
    was. What makes further passes is given a twin of it. `scorers` lie on the model's device.

    Raises:
        ContractError: the source is empty, the tap reads nothing, or a detector cannot read it.
    """
    columns: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in scorers}
    reads = reads_of(scorer.detector for scorer in scorers.values())
    probe = probe_of(tap, model, reads)
    done = 0
    with Reading(model, tap, reads) as reading:
        for batch in source.batches():
            acts = reading.read(batch)
            if probe is not None:
                acts = dataclasses.replace(acts, probe=probe)
            for name, scorer in scorers.items():
                try:
                    columns[name].append(scorer.score(acts).cpu().numpy())
                except ContractError as error:
                    raise ContractError(f"detector {name!r}, {source.told}: {error}") from error
            done += acts.rows
            if progress is not None:
                share = done / source.samples if source.samples else 0.0
                progress(stage, share, f"{done} samples")
    if not done:
        raise ContractError(f"{source.told}: there is no sample in it")
    return {name: np.concatenate(found) for name, found in columns.items()}
