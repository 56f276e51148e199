"""How a detector is measured beside pytorch-ood's: paired, in turn, as ratios within one run.

One thread, the same tensors, calls in turn, CPU time; each ratio is the median over paired rounds.
Ours is `Scorer.score` on fresh activations, so that nothing is shared between calls; theirs is the
call on precomputed logits, features or maps. Both run in inference mode. `results` makes of the
lines what the table ends with.

To add a family, add a file to this folder with a function

    def cases(peer: ModuleType | None) -> Iterator[Case]: ...

that yields one `Case` per line of the table; nothing else has to be touched. `peer` is
pytorch-ood's `detector` module, or none where it is not installed: then leave `theirs` empty. Make
the tensors from a seeded generator, yield a case as soon as it is made (so that only one family's
tensors are in memory), and set `same_formula` where both compute the same number up to a monotone
map, so that the rank agreement is printed and held. A family may also have

    def notes(rounds: int) -> Iterator[Joint]: ...

for what several detectors cost together.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from scipy.stats import spearmanr
from torch import Tensor

from oodmon.detectors import Scorer
from oodmon.records import Activations

__all__ = ["Case", "Joint", "Line", "agreement", "import_peer", "measure", "seconds"]

Call = Callable[[], Tensor]

_ROUND_SECONDS: Final = 0.02
"""A timed stretch lasts about this long at least: a call of microseconds is repeated."""

_PATIENCE_SECONDS: Final = 2.0
"""A peer that takes longer for one call is timed once or thrice, not in every round."""

_RANK: Final = 0.9999
"""Rank agreement to reach where both compute the same formula."""


JOINT_GOAL: Final = 1.3
"""Several logit detectors in one batch cost at most so many times the dearest of them."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        method: the detector's name; ratios of one method are averaged before methods are.
        what: the setting, such as "256x1000".
        scorer: ours.
        fresh: makes the activations of one call; called outside the timed stretch.
        rows: samples in them.
        theirs: pytorch-ood's call on the same tensors, giving its scores; none where it has none.
        same_formula: both order the samples alike, so rank agreement must be at least 0.9999.
        oracle: float64 scores (B,) that ours should be close to, if there are any.
        goal: ratio to reach; 0 says 1.
        remark: why the peer differs, in a few words.
    """

    method: str
    what: str
    scorer: Scorer
    fresh: Callable[[], Activations]
    rows: int
    theirs: Call | None = None
    same_formula: bool = False
    oracle: Tensor | None = None
    goal: float = 0.0
    remark: str = ""


@dataclass(frozen=True)
class Line:
    """What was measured of a case. Times in CPU seconds a call; NaN where there is no peer."""

    method: str
    what: str
    rows: int
    seconds: float
    ratio: float
    rank: float
    error: float
    goal: float
    remark: str

    @property
    def strays(self) -> bool:
        """The order is not the peer's, though it should be."""
        return self.rank < _RANK  # False where there is nothing to compare with

    @property
    def met(self) -> bool:
        """The goal is reached, or there is nothing to compare with."""
        slow = self.ratio < max(self.goal, 1.0)  # False where the ratio is NaN
        return not slow and not self.strays

    def text(self) -> str:
        """The line of the table."""
        ratio = "" if math.isnan(self.ratio) else f"{self.ratio:.2f}x"
        goal = f">={self.goal:.0f}" if self.goal else ""
        rank = "" if math.isnan(self.rank) else f"{self.rank:.6f}"
        error = "" if math.isnan(self.error) else f"{self.error:.0e}"
        return (
            f"{self.method:18}{self.what:24}{self.seconds * 1e6:12.1f}"
            f"{self.rows / self.seconds:14,.0f}{ratio:>11}{goal:>7}{rank:>11}{error:>8}"
            f"{'' if self.met else '  MISSED'}{'  ' + self.remark if self.remark else ''}"
        )


@dataclass(frozen=True)
class Joint:
    """What several detectors take on one batch, beside the dearest of them alone."""

    methods: tuple[str, ...]
    what: str
    rows: int
    ratio: float

    @property
    def met(self) -> bool:
        """At most 1.3 times the dearest."""
        return self.ratio <= JOINT_GOAL

    def text(self) -> str:
        """The line below the table."""
        return f"{' + '.join(self.methods)} at {self.what}: {self.ratio:.2f}x the dearest alone"


HEADER: Final = (
    f"{'detector':18}{'setting':24}{'us a call':>12}{'samples/s':>14}{'peer/ours':>11}"
    f"{'goal':>7}{'Spearman':>11}{'oracle':>8}"
)


def import_peer() -> types.ModuleType | None:
    """pytorch-ood's detectors without the rest of the package; prints why not, if not.

    Its package imports torchvision for data sets, which its detectors do not need. So the package
    is entered without running its `__init__`: `pip install --no-deps pytorch-ood` is enough.
    """
    spec = importlib.util.find_spec("pytorch_ood")
    if spec is None or spec.submodule_search_locations is None:
        print("pytorch-ood is not installed (pip install --no-deps pytorch-ood==0.4.0): no ratios")
        return None
    package = types.ModuleType("pytorch_ood")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["pytorch_ood"] = package
    try:
        return importlib.import_module("pytorch_ood.detector")
    except ImportError as error:
        print(f"pytorch-ood cannot be imported ({error}): no ratios")
        return None


def seconds(call: Callable[[], Any], times: int) -> float:
    """CPU seconds a call: on a shared machine the wall clock counts what others do."""
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times


def _ours(case: Case, times: int) -> float:
    """The activations are made beforehand, as the tap makes them once for all detectors."""
    batches = [case.fresh() for _ in range(times)]
    score = case.scorer.score
    began = time.process_time()
    while batches:
        score(batches.pop())  # let go of, as a service does
    return (time.process_time() - began) / times


def _times(taken: float) -> int:
    return max(1, int(_ROUND_SECONDS / max(taken, 1e-6)))


def measure(case: Case, rounds: int) -> Line:
    """Time ours and theirs in turn, and compare the scores."""
    found = case.scorer.score(case.fresh())
    rank = error = math.nan
    if case.theirs is not None:
        began = time.process_time()
        scores = case.theirs()
        first = time.process_time() - began
        if case.same_formula and case.rows > 1:
            rank = agreement(found, scores)
    if case.oracle is not None:
        size = case.oracle.abs().clamp(min=float(case.oracle.abs().median()), max=math.inf)
        error = float(((found.double() - case.oracle).abs() / size.clamp(min=1e-12)).amax())
    mine, ratios = [], []
    times = _times(_ours(case, 3))
    if case.theirs is None:
        mine = [_ours(case, times) for _ in range(rounds)]
    elif first > _PATIENCE_SECONDS:
        mine = [_ours(case, times) for _ in range(3)]
        ratios = [first / statistics.median(mine)]
    else:
        their_times = _times(seconds(case.theirs, 1))
        for _ in range(rounds):
            mine.append(_ours(case, times))
            ratios.append(seconds(case.theirs, their_times) / mine[-1])
    return Line(
        method=case.method,
        what=case.what,
        rows=case.rows,
        seconds=statistics.median(mine),
        ratio=statistics.median(ratios) if ratios else math.nan,
        rank=rank,
        error=error,
        goal=case.goal,
        remark=case.remark,
    )


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(ours.double().numpy(), theirs.double().cpu().numpy()).statistic)
