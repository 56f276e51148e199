"""Detectors side by side: learnt, given the same activations and changed copies, and timed."""

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

from oodmon.contracts import Detector, Probe
from oodmon.detectors import Reference, Scorer
from oodmon.errors import ContractError
from oodmon.fitting.corruptions import corruptions_for
from oodmon.fitting.learn import Progress
from oodmon.fitting.reading import Reading
from oodmon.fitting.sampled import rows_of
from oodmon.fitting.shares import Kept, moved
from oodmon.fitting.sources import Batch
from oodmon.records import Activations

__all__ = [
    "LEAST",
    "Scores",
    "Trial",
    "change_all",
    "count_of",
    "fastest",
    "learn_all",
    "microseconds",
    "read_all",
]

Scores = npt.NDArray[np.float32]

LEAST: Final = 8
"""Samples that a share must have to say anything."""

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


def learn_all(
    trying: Mapping[str, Detector],
    kept: Kept,
    head: tuple[Tensor, Tensor] | None,
    seed: int,
    place: torch.device,
    probe: Probe | None,
    tell: Progress,
) -> tuple[dict[str, Scorer], dict[str, str]]:
    """Id → scorer, and id → why it cannot learn here."""
    made: dict[str, Scorer] = {}
    skipped: dict[str, str] = {}
    for number, (name, detector) in enumerate(trying.items()):
        tell("learning", number / len(trying), name)
        reference = Reference.from_batches(
            kept.batches, head=head, seed=seed, device=place, probe=probe
        )
        try:
            made[name] = Scorer.learn(detector, reference)
        except ContractError as error:
            skipped[name] = str(error)
    if trying:
        tell("learning", 1.0, "")
    return made, skipped


def change_all(
    tried: Trial,
    reading: Reading,
    held: Sequence[Batch],
    seconds: float,
    pass_seconds: float,
    seed: int,
    skipped: dict[str, str],
    tell: Progress,
) -> dict[str, dict[str, Scores]]:
    """Change → id → scores of corrupted copies; what the model refuses is skipped."""
    found: dict[str, dict[str, Scores]] = {}
    changes = corruptions_for(held, seed)
    few = _affordable(held, seconds, pass_seconds * max(1, len(changes)))
    for number, (change, corrupted) in enumerate(changes.items()):
        tell("corrupting", number / len(changes), change)
        try:
            found[change] = tried.scores(reading.read(corrupted(batch)) for batch in few)
        except Exception as error:  # the model may refuse what it was not made for
            cause = error.__cause__ or error
            skipped[change] = f"the model raised {type(cause).__name__}: {cause}"
    tell("corrupting", 1.0, "")
    return found


def _affordable(held: Sequence[Batch], seconds: float, per_row: float) -> list[Batch]:
    """As many of the held-out rows as can be passed in the time, and some at least."""
    rows = max(4 * LEAST, int(seconds / per_row)) if per_row > 0 else count_of(held)
    few: list[Batch] = []
    for batch in held:
        if rows > 0:
            few.append(rows_of(batch, slice(0, rows)))
            rows -= batch.rows
    return few


def count_of(batches: Sequence[Batch]) -> int:
    """Rows in all of them."""
    return sum(batch.rows for batch in batches)


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
