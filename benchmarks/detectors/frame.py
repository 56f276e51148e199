"""How a detector is measured beside pytorch-ood's: paired, in turn, as ratios within one run.

One thread, the same tensors, calls in turn, CPU time; each ratio is the median over paired rounds.
Ours is `Scorer.score` on fresh activations, so that nothing is shared between calls; theirs is the
call on precomputed logits, features or maps. Both run in inference mode.

To add a family, add a file to this folder with a function

    def cases(peer: ModuleType | None) -> Iterator[Case]: ...

that yields one `Case` per line of the table; nothing else has to be touched. `peer` is
pytorch-ood's `detector` module, or none where it is not installed: then leave `theirs` empty. Make
the tensors from a seeded generator, yield a case as soon as it is made (so that only one family's
tensors are in memory), and set `same_formula` where both compute the same number up to a monotone
map, so that the rank agreement is printed and held. A family may also have

    def notes(rounds: int) -> Iterator[str]: ...

for what does not fit a line of the table.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from scipy.stats import spearmanr
from torch import Tensor

from oodmon.detectors import Scorer
from oodmon.records import Activations

__all__ = ["Case", "Line", "agreement", "import_peer", "measure", "seconds", "summary"]

Call = Callable[[], Tensor]

_ROUND_SECONDS: Final = 0.02
"""A timed stretch lasts about this long at least: a call of microseconds is repeated."""

_PATIENCE_SECONDS: Final = 2.0
"""A peer that takes longer for one call is timed once or thrice, not in every round."""

_RANK: Final = 0.9999
"""Rank agreement to reach where both compute the same formula."""


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
        counts: enters the geometric mean (large batches do, single samples do not).
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
    counts: bool = True
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
    counts: bool
    remark: str

    @property
    def met(self) -> bool:
        """The goal is reached, or there is nothing to compare with."""
        slow = self.ratio < max(self.goal, 1.0)  # False where the ratio is NaN
        return not slow and not self.rank < _RANK

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
    for acts in batches:
        score(acts)
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
        counts=case.counts,
        remark=case.remark,
    )


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(ours.double().numpy(), theirs.double().cpu().numpy()).statistic)


def summary(lines: Iterable[Line]) -> Mapping[str, Any]:
    """Geometric mean over the methods that both have, the minimum, and what missed its goal."""
    compared = [line for line in lines if not math.isnan(line.ratio)]
    per_method: dict[str, list[float]] = {}
    for line in compared:
        if line.counts:
            per_method.setdefault(line.method, []).append(math.log(line.ratio))
    logs = [statistics.fmean(found) for found in per_method.values()]
    least = min(compared, key=lambda line: line.ratio, default=None)
    return {
        "methods": len(logs),
        "geometric_mean": math.exp(statistics.fmean(logs)) if logs else math.nan,
        "minimum": least.ratio if least else math.nan,
        "slowest": f"{least.method} {least.what}" if least else "",
        "missed": [f"{line.method} {line.what}" for line in compared if not line.met],
    }
