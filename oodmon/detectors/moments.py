"""Counts, means and scatter of features per class: one pass, mergeable, in bounded memory.

All sums are float64 and about the mean of their own block, so that neither many rows nor a mean
far from zero costs digits. The state is K·D + D² numbers whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal

import torch
from torch import Tensor

from oodmon.contracts import Reference
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = ["Moments", "Shrinkage", "covariance", "moments", "rows_in_blocks", "whitener"]

Shrinkage = Literal["oas", "none"]

BLOCK: Final = 1024
"""Rows that are summed at once: enough for a fast product, few enough to be held in float64."""

_FLOOR: Final = 1e-7
"""An eigenvalue counts as at least this share of the largest. Features are float32, so what lies
lower is rounding, and dividing by it would make noise the loudest direction."""


class Moments:
    """Sufficient statistics of Gaussians per class; two of them add (Chan et al., 1983).

    Args:
        width: D.
        device: where they are kept.
        scatter: False keeps counts and means alone.

    Attributes:
        counts: (K,) rows per class, float64.
        means: (K, D) per class, 0 where a class has no row.
        within: (D, D) sum over the rows of (x - mean of its class)(x - mean of its class)ᵀ.
    """

    def __init__(self, width: int, device: torch.device, scatter: bool = True) -> None:
        exact = {"dtype": torch.float64, "device": device}
        self.counts: Tensor = torch.zeros(0, **exact)  # type: ignore[call-overload]
        self.means: Tensor = torch.zeros((0, width), **exact)  # type: ignore[call-overload]
        size = width if scatter else 0
        self.within: Tensor = torch.zeros((size, size), **exact)  # type: ignore[call-overload]
        self._scatter = scatter

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Take rows (R, D), finite, of these classes (R,) int64."""
        if len(rows) and int(labels.min()) < 0:
            raise ContractError(f"labels: {int(labels.min())} is no class; they count from 0")
        for part, own in zip(torch.split(rows, BLOCK), torch.split(labels, BLOCK), strict=True):
            present, place, counts = torch.unique(own, return_inverse=True, return_counts=True)
            exact = part.double()
            count = counts.double()
            mean = _sums(exact, place, len(present)) / count[:, None]
            if self._scatter:
                exact = exact - mean[place]
                self.within.addmm_(exact.T, exact)
            self._take(present, count, mean)

    def merge(self, other: Moments) -> None:
        """Take what another one has seen, as if its rows had come here."""
        present = other.counts.nonzero().flatten()
        if self._scatter:
            self.within += other.within
        self._take(present, other.counts[present], other.means[present])

    @property
    def rows(self) -> float:
        """N."""
        return float(self.counts.sum())

    @property
    def present(self) -> Tensor:
        """Classes that have a row, ascending."""
        return self.counts.nonzero().flatten()

    @property
    def mean(self) -> Tensor:
        """Of all rows, (D,)."""
        return self.counts @ self.means / self.counts.sum()

    def total(self) -> Tensor:
        """Scatter about the mean of all rows, (D, D)."""
        away = (self.means - self.mean) * self.counts.sqrt()[:, None]
        return self.within + away.T @ away

    def _take(self, present: Tensor, count: Tensor, mean: Tensor) -> None:
        """The parallel step: the scatter between two means of one class, and the mean of both."""
        missing = int(present.max()) + 1 - len(self.counts) if len(present) else 0
        if missing > 0:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
            zeros = self.means.new_zeros((missing, self.means.shape[1]))
            self.means = torch.cat([self.means, zeros])
        before = self.counts[present]
        both = before + count
        away = mean - self.means[present]
        if self._scatter:
            known = before > 0.0
            apart = away[known]
            weighted = apart * (before * count / both)[known, None]
            self.within.addmm_(apart.T, weighted)
        self.means[present] += away * (count / both)[:, None]
        self.counts[present] = both


def moments(
    reference: Reference,
    read: Callable[[Activations], tuple[Tensor, ...]],
    scatter: bool = True,
    note: str = "moments",
) -> list[Moments]:
    """Of each column of features that `read` takes, in one pass over the reference.

    Args:
        reference: what to learn from.
        read: gives rows (B, D) of one or several layers, and last the classes (B,) int64.
        scatter: False keeps counts and means alone.
        note: for the progress shown.

    Rows that are not finite in one of the columns are left out. `ContractError` where none is left.
    """
    found: list[Moments] = []
    reference.progress(0.0, note)
    with torch.inference_mode(mode=False), torch.no_grad():
        for *columns, labels in rows_in_blocks(reference, read):
            if not found:
                found = [Moments(rows.shape[1], rows.device, scatter) for rows in columns]
            for one, rows in zip(found, columns, strict=True):
                one.add(rows, labels)
    if not found:
        raise ContractError("the reference holds no row that is finite; nothing to learn from")
    for one in found:
        # symmetric but for the last digits, in which the order of a product's sums shows
        one.within = (one.within + one.within.T) / 2
    return found


def rows_in_blocks(
    reference: Reference, read: Callable[[Activations], tuple[Tensor, ...]]
) -> Iterator[tuple[Tensor, ...]]:
    """What `read` takes, in blocks of `BLOCK` rows whatever the size of the reference's batches.

    So the sums, and with them every last bit of a state, do not depend on the batch size. Rows that
    hold a value that is not finite are left out.
    """
    waiting: list[tuple[Tensor, ...]] = []
    held = 0
    for acts in reference:
        columns = read(acts)
        finite = torch.ones(len(columns[0]), dtype=torch.bool, device=columns[0].device)
        for column in columns:
            if column.is_floating_point():
                sound = column.isfinite()
                finite &= sound.flatten(1).all(dim=1) if sound.ndim > 1 else sound
        if not bool(finite.all()):
            columns = tuple(column[finite] for column in columns)
        waiting.append(columns)
        held += len(columns[0])
        if held < BLOCK:
            continue
        whole = _side_by_side(waiting)
        for start in range(0, held - BLOCK + 1, BLOCK):
            yield tuple(column[start : start + BLOCK] for column in whole)
        rest = held % BLOCK
        # a copy, because a view would keep the whole block alive
        waiting = [tuple(column[held - rest :].clone() for column in whole)]
        held = rest
    if held:
        yield _side_by_side(waiting)


def _side_by_side(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def _sums(rows: Tensor, place: Tensor, classes: int) -> Tensor:
    """Sum of the rows of each class, (K, D)."""
    if rows.device.type == "cpu":
        return rows.new_zeros((classes, rows.shape[1])).index_add_(0, place, rows)
    # elsewhere index_add_ adds in any order, and a product does not
    member = torch.nn.functional.one_hot(place, classes).to(rows.dtype)
    return member.T @ rows


def covariance(scatter: Tensor, rows: float, shrinkage: Shrinkage) -> Tensor:
    """Scatter / N, shrunk towards its mean eigenvalue times the identity.

    "oas" is the oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero, IEEE TSP 2010, eq.
    23), which needs no more than the scatter itself. With few rows for many features it is what
    makes the inverse worth anything; with many it all but disappears.
    """
    found = scatter / max(rows, 1.0)
    if shrinkage == "none":
        return found
    width = float(len(found))
    trace, squares = float(found.trace()), float(found.square().sum())
    if trace <= 0.0:
        return found
    above = (1.0 - 2.0 / width) * squares + trace**2
    below = (rows + 1.0 - 2.0 / width) * (squares - trace**2 / width)
    share = 1.0 if below <= above else above / below
    found = (1.0 - share) * found
    found.diagonal().add_(share * trace / width)
    return found


def whitener(covariance: Tensor) -> Tensor:
    """W (D, D) with W Wᵀ = the inverse covariance, so |x W|² is a squared Mahalanobis distance.

    Eigenvalues have a floor relative to the largest, so rank-deficient features, duplicated and
    dead units give large distances, never negative or infinite ones. Features that never varied
    at all are left as they are: their distance is the Euclidean one.
    """
    values, vectors = torch.linalg.eigh(covariance)
    largest = float(values[-1])
    if not largest > 0.0:
        return torch.eye(len(values), dtype=values.dtype, device=values.device)
    whitened: Tensor = vectors / values.clamp(min=_FLOOR * largest).sqrt()
    return whitened
