"""Scorers side by side on the same activations, and what each costs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oodmon.contracts import Probe
from oodmon.detectors import Scorer
from oodmon.errors import ContractError
from oodmon.fitting.reading import Reading
from oodmon.fitting.shares import Kept, moved
from oodmon.fitting.sources import Batch
from oodmon.records import Activations

__all__ = ["Scores", "Trial", "fastest", "microseconds", "read_all"]

Scores = npt.NDArray[np.float32]

_REPEATS: Final = 5
"""Timed runs, of which the fastest counts."""


class Trial:
    """All scorers on the same activations; one that cannot score them is skipped from then on."""

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        place: torch.device,
        probe: Probe | None,
        skipped: dict[str, str],
    ) -> None:
        self.scorers = dict(scorers)
        self._place, self._probe, self._skipped = place, probe, skipped

    def scores(self, batches: Iterator[Activations]) -> dict[str, Scores]:
        """Id → scores (n,) of all rows."""
        columns: dict[str, list[Scores]] = {name: [] for name in self.scorers}
        for acts in batches:
            there = dataclasses.replace(moved(acts, self._place), probe=self._probe)
            for name, scorer in list(self.scorers.items()):
                try:
                    columns[name].append(scorer.score(there).cpu().numpy())
                except ContractError as error:
                    self._skipped[name] = str(error)
                    del self.scorers[name]
        return {name: np.concatenate(columns[name]) for name in self.scorers}


def read_all(reading: Reading, batches: Sequence[Batch], folder: Path) -> Kept:
    """What the tap sees of all batches; beyond a limit of memory in files of the folder."""
    kept = Kept(folder)
    for batch in batches:
        kept.add(moved(reading.read(batch), torch.device("cpu")))
    return kept


def microseconds(scorer: Scorer, clean: Kept, place: torch.device, probe: Probe | None) -> float:
    """To score one sample of a full batch, with nothing shared that another detector computed."""
    acts = moved(next(clean.batches()), place)

    def run() -> Tensor:
        return scorer.score(dataclasses.replace(acts, probe=probe)).cpu()

    return 1e6 * fastest(run) / acts.rows


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs; of a slow one there are fewer."""
    best = math.inf
    spent = 0.0
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
        spent += best
        if spent > 1.0:
            break
    return max(best, 1e-9)
