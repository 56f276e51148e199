"""The softmax seen from the predicted class: how sure, how wrong, how spread; once per batch.

Everything here is exact where the largest probability is 1 in float32: what is wanted of the other
classes is summed over them, never computed as 1 - p, which is 0 from a gap of 17 on.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oodmon.detectors.gaps import MARK, Answer, Gaps
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = [
    "Answer",
    "answer",
    "answer_of",
    "largest",
    "log_partition_of",
    "predicted",
    "shares",
    "two_sided",
]

Floats = npt.NDArray[np.floating[Any]]
Places = npt.NDArray[np.int64]

_FEW: Final = 64
"""Below so many classes the fused softmax is several times as fast across the rows as along
them, on a CPU."""

_LEAST: Final = {np.dtype(np.float32): 1e-30, np.dtype(np.float64): 1e-290}
"""A sum of probabilities below this has lost digits, or all of them, to underflow."""

_NOTHING: Final = contextlib.nullcontext()

_DOT: Final = 8192
"""Up to so many values a product with ones is the fastest sum, and one that NumPy's library never
splits over threads."""


def two_sided(acts: Activations) -> Tensor:
    """Logits (B, K), K ≥ 2, at least float32.

    One logit z of a binary model becomes (-z/2, z/2): the same probabilities, and a size that says
    how sure the model is of either class.
    """
    logits = acts.require_logits()
    if logits.dtype is torch.float32 and logits.ndim == 2 and logits.shape[1] > 1:
        return logits
    return acts.shared("logits", lambda: _two_sided(logits))


def _two_sided(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ContractError(f"logits: expected (B, C), found {tuple(logits.shape)}")
    if logits.dtype is not torch.float32 and logits.dtype is not torch.float64:
        logits = logits.float()
    if logits.shape[1] == 1:
        half = logits / 2
        logits = torch.cat([-half, half], dim=1)
    return logits


def predicted(acts: Activations) -> Tensor:
    """Predicted class (B,) int64; of several largest logits the first."""
    logits = two_sided(acts)
    if not logits.is_cpu:
        return logits.argmax(dim=1)
    # NumPy's is vectorised, which is ten times as fast
    return torch.from_numpy(logits.detach().numpy().argmax(axis=1))


def largest(acts: Activations) -> Tensor:
    """Largest logit (B,), a new tensor: of the answer, where another detector asked for that."""
    found: Answer | None = acts.shared("logits.answer", lambda: None)
    return two_sided(acts).amax(1) if found is None else found.largest()


def answer(acts: Activations, temperature: float = 1.0) -> Answer:
    """Of the logits / temperature, shared between the detectors of a batch."""
    if temperature == 1.0:
        return acts.shared("logits.answer", lambda: answer_of(two_sided(acts)))
    return acts.shared(
        f"logits.answer@{temperature}", lambda: answer_of(two_sided(acts) / temperature)
    )


def answer_of(logits: Tensor) -> Answer:
    """Of logits (B, K), K >= 2, float32 or float64."""
    if not logits.is_cpu:
        return Gaps(logits)
    if logits.shape[0] != 1:
        return Odds(logits.detach())
    found = One(logits.detach())
    return found if found.whole else Gaps(logits)


def shares(logits: Tensor) -> Tensor:
    """Softmax (B, K)."""
    if logits.is_cpu and logits.shape[1] < _FEW and logits.shape[0] > 1:
        return logits.T.softmax(dim=0).T
    return logits.softmax(dim=1)


def log_partition_of(logits: Tensor) -> Tensor:
    """log sum exp (B,) of logits (B, K), K >= 1, however far apart they are."""
    if logits.is_cpu and logits.shape[0] == 1:
        found = One(logits.detach())
        if found.finite:
            return found.log_partition()
    return answer_of(logits).log_partition()


class Odds:
    """On a CPU: the odds of every other class against the predicted one, exp(z - z_top), and sums.

    A small batch costs what its calls cost, and NumPy's cost a third of PyTorch's. Rows whose sum
    underflows, or that are not finite, are computed again from their gaps.
    """

    __slots__ = (
        "_calm",
        "_each",
        "_gaps",
        "_log",
        "_logits",
        "_odd",
        "_place",
        "_sum",
        "_top",
        "_z",
    )

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._z = z = logits.numpy()
        starts, ones = _layout(z.shape, z.dtype)
        self._place = place = z.argmax(axis=1) + starts
        self._top = top = z.take(place)
        self._log: Floats | None = None
        # to look at few values costs less than to silence NumPy's warnings
        self._calm = calm = bool(len(ones)) and _calm(z, top)
        with _NOTHING if calm else np.errstate(invalid="ignore", over="ignore"):
            gaps: Floats = z - top[:, np.newaxis]
        nothing = gaps.take(place)  # but NaN in a row that is not finite
        if len(ones):
            self._gaps: Floats | None = gaps
            each = np.exp(gaps)
            each.put(place, nothing)
            total: Floats = each.dot(ones)
        else:
            # memory that is new costs as much as the difference itself
            self._gaps, each = None, np.exp(gaps, gaps)
            each.put(place, nothing)
            total = torch.from_numpy(each).sum(dim=1).numpy()
        self._each, self._sum = each, total
        # a NaN is the least there is for NumPy, and above nothing
        least = _LEAST[each.dtype]
        whole = not len(total) or total[total.argmin()] > least
        self._odd = None if whole else ~(total > least)

    def log_wrong(self) -> Tensor:
        """-log(1 + 1 / odds), which is exact where p is small as well."""
        total = self._sum
        if self._odd is not None:
            total = np.maximum(total, _LEAST[total.dtype])
        found = np.log1p(np.reciprocal(total))
        return self._mended(torch.from_numpy(np.negative(found, found)), Gaps.log_wrong)

    def log_odds(self) -> Tensor:
        """See `Answer`."""
        return self._mended(torch.from_numpy(self._sum).log(), Gaps.log_odds)

    def log_sure(self) -> Tensor:
        """See `Answer`."""
        return torch.from_numpy(np.negative(self._log_whole()))

    def log_partition(self) -> Tensor:
        """See `Answer`."""
        return torch.from_numpy(self._top + self._log_whole())

    def largest(self) -> Tensor:
        """See `Answer`."""
        return torch.from_numpy(self._top.copy())

    def entropy(self) -> Tensor:
        """log(1 + odds) - sum p (z - z_top) of the others, rounded no more than the logits are."""
        total = self._sum
        # a logit of -inf has odds of 0; their product is computed again
        with _NOTHING if self._calm else np.errstate(invalid="ignore"):
            if self._gaps is None:
                found = np.vecdot(self._each, self._z) - self._top * total
            else:
                found = np.vecdot(self._each, self._gaps)
        found /= -1.0 - total
        found += self._log_whole()
        if len(found):
            least = found[found.argmin()]
            if least != least:  # NaN
                odd = np.isnan(found) | ~(total > _LEAST[total.dtype])
                return self._mended(torch.from_numpy(found), Gaps.entropy, odd)
        return self._mended(torch.from_numpy(found), Gaps.entropy)

    def mean_other(self) -> Tensor:
        """See `Answer`."""
        total = self._sum
        squares = np.vecdot(self._each, self._each)
        squares /= (total + 1.0) * np.maximum(total, _LEAST[total.dtype])
        return torch.from_numpy(squares)

    def log_likeliest(self, count: int) -> Tensor:
        """See `Answer`."""
        found = self._z - (self._top + self._log_whole())[:, np.newaxis]
        own = np.maximum(self._sum, _LEAST[found.dtype])
        own = np.log1p(np.maximum(own, np.reciprocal(own)))
        own = self._mended(torch.from_numpy(np.negative(own, own)), Gaps.log_doubt).numpy()
        if count >= found.shape[1]:
            found.put(self._place, own)
            return torch.from_numpy(found)
        found.put(self._place, -np.inf)
        found = _largest(found, count)
        found[:, 0] = own
        return torch.from_numpy(found)

    def _log_whole(self) -> Floats:
        """log(1 + odds): what several of them need."""
        if self._log is None:
            self._log = np.log1p(self._sum)
        return self._log

    def _mended(
        self,
        found: Tensor,
        exact: Callable[[Gaps], Tensor],
        missing: npt.NDArray[np.bool_] | None = None,
    ) -> Tensor:
        odd = self._odd if missing is None else missing
        if odd is not None:
            rows = torch.from_numpy(odd)
            found[rows] = exact(Gaps(self._logits[rows]))
        return found


class One:
    """One sample on a CPU, as requests come: one row of odds, and numbers instead of arrays.

    Not `whole` where the sum of the odds underflows or a logit is not finite; then `Gaps` has to
    do it, but for the partition of what is `finite`.
    """

    __slots__ = ("_each", "_gaps", "_label", "_logits", "_sum", "_top", "finite", "whole")

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        z = logits.numpy()[0]
        self._label = label = z.argmax()
        self._top = top = z.item(label)
        self.finite = -MARK < top < MARK  # so that no difference overflows
        self.whole = False
        if self.finite:
            self._gaps = gaps = z - z[label]
            self._each = each = np.exp(gaps)
            each[label] = 0.0
            ones = _layout((1, len(z)), z.dtype)[1]
            self._sum = total = float(each.dot(ones) if len(ones) else each.sum())
            self.whole = total > _LEAST[each.dtype]

    def log_wrong(self) -> Tensor:
        """See `Answer`."""
        return self._tensor(-math.log1p(1.0 / self._sum))

    def log_odds(self) -> Tensor:
        """See `Answer`."""
        return self._tensor(math.log(self._sum))

    def log_sure(self) -> Tensor:
        """See `Answer`."""
        return self._tensor(-math.log1p(self._sum))

    def log_partition(self) -> Tensor:
        """See `Answer`."""
        return self._tensor(self._top + math.log1p(self._sum))

    def largest(self) -> Tensor:
        """See `Answer`."""
        return self._tensor(self._top)

    def entropy(self) -> Tensor:
        """log(1 + odds) - sum p (z - z_top) of the others, so that nothing cancels."""
        total = self._sum
        gaps = self._gaps
        if gaps.item(gaps.argmin()) == -math.inf:  # its odds are 0, and their product is NaN
            return Gaps(self._logits).entropy()
        return self._tensor(math.log1p(total) - float(self._each.dot(gaps)) / (1.0 + total))

    def mean_other(self) -> Tensor:
        """See `Answer`."""
        squares = float(self._each.dot(self._each))
        return self._tensor(squares / self._sum / (1.0 + self._sum))

    def log_likeliest(self, count: int) -> Tensor:
        """See `Answer`."""
        total = self._sum
        found = self._gaps - self._gaps.dtype.type(math.log1p(total))
        own = -math.log1p(max(total, 1.0 / total))
        if count >= len(found):
            found[self._label] = own
            return torch.from_numpy(found[np.newaxis])
        found[self._label] = -np.inf
        found = _largest(found[np.newaxis], count)
        found[0, 0] = own
        return torch.from_numpy(found)

    def _tensor(self, value: float) -> Tensor:
        found = np.empty(1, self._gaps.dtype)
        found[0] = value
        return torch.from_numpy(found)


def _calm(z: Floats, top: Floats) -> bool:
    """Whether every logit is finite, and no difference overflows; of a NaN all this is false."""
    return z.size > 0 and z.item(z.argmin()) > -MARK and top.item(top.argmax()) < MARK


def _largest(values: Floats, count: int) -> Floats:
    """The `count` largest of each row (B, K), the least of them first."""
    # as fast as NumPy's selection, and not slowed a hundredfold by many logits of -inf as that is
    start = values.shape[1] - count
    found: Floats = np.sort(values, axis=1)[:, start:]
    return found


@functools.lru_cache(maxsize=16)
def _small(rows: int, classes: int, dtype: np.dtype[Any]) -> tuple[Places, Floats]:
    return np.arange(0, rows * classes, classes), np.ones(classes, dtype)


def _layout(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Places, Floats]:
    """Where each row starts in the flat array; and ones to sum a row with, or none for many."""
    rows, classes = shape
    if rows * classes <= _DOT:
        return _small(rows, classes, dtype)
    return np.arange(0, rows * classes, classes), np.empty(0, dtype)
