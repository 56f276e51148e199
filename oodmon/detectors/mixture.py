"""Density of the features under Gaussians: one per class, or a mixture found by EM.

Everything is in the log domain, and relative to the component that fits best, whose distance is a
sum of squares: far from all components nothing cancels, and nothing under- or overflows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Self

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.features import Labels, choose, features, labels_of, reads_of, width_of
from oodmon.detectors.mahalanobis import squared_length
from oodmon.detectors.moments import Moments, covariance, moments, rows_in_blocks, whitener
from oodmon.detectors.reference import gather
from oodmon.detectors.states import expect
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["GMM"]

_FULL_BYTES: Final = 1 << 30
"""Covariances of all classes may take so much while learning; beyond, the error says what to do."""

_PRIOR: Final = 1.0
"""A component's variance is that of its rows and of so many more with the variance of all."""

_FLOOR: Final = 1e-6
"""A variance is at least this share of the mean variance of all features."""

_CHUNK: Final = 1 << 23
"""Numbers held at once while the components are compared: 32 MB."""

_FEWEST: Final = 1e-3
"""Rows that a component has at least: one that lost all of them is not divided by zero."""

Parts = tuple[Tensor, Tensor, Tensor]
"""Counts (K,), means (K, D) and scatters (D, D), (K, D) or (K, D, D) of components, float64."""

_CONVERGED: Final = 1e-5
"""EM stops when a step changes the mean log-likelihood by less than this share of its size."""


@detectors.register("gmm")
@dataclass(frozen=True)
class GMM(Detector):
    """Minus the log-density of the features under a mixture of Gaussians.

    Reads      layers[layer] (B, D), maps averaged over their places; labels while learning, unless
               the components are found by EM
    Learns     center (D,); weight (K,): log share less half the log-determinant; means (K, D) less
               the center; spread: precision (K, D) of "diagonal", whiteners (K, D, D) of "full",
               whitener (D, D) of "shared", whose means are whitened
    Score      -log sum_k share_k N(x; mean_k, covariance_k), without the constant D/2 log 2π
    Reference  Mukhoti et al., CVPR 2023 (one Gaussian per class on features)

    Options: `layer`, empty for the penultimate features. `covariance`: "shared" by all components,
    "diagonal", or "full" (K·D² numbers; refused where they would take more than a GiB).
    `components`: 0 for one per class, else so many, found by EM without labels on at most `rows`
    reference rows, in at most `steps` steps. `labels`: "true", or "predicted" where there are none.

    With "shared" it orders samples nearly as `mahalanobis` does, and costs the same. "full" needs
    several times D rows per class to be worth its cost: the covariances are shrunk by the oracle
    approximating estimate, and a class of few rows ends up round. Shrunk or not, a component of
    fewer rows than features is narrow, and new samples of its class look strange.
    """

    layer: str = ""
    covariance: Literal["shared", "diagonal", "full"] = "shared"
    components: int = 0
    rows: int = 20_000
    steps: int = 50
    labels: Labels = "true"

    paper: ClassVar[Paper | None] = Paper(
        "Deep Deterministic Uncertainty: A New Simple Baseline",
        "Mukhoti, Kirsch, van Amersfoort, Torr and Gal",
        "CVPR",
        2023,
        "https://arxiv.org/abs/2102.11582",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "D² + C·D; full: C·D²"

    def __post_init__(self) -> None:
        for option, allowed in (
            ("covariance", ("shared", "diagonal", "full")),
            ("labels", ("true", "predicted")),
        ):
            if getattr(self, option) not in allowed:
                raise ContractError(
                    f"detectors.gmm.{option}: {getattr(self, option)!r} is none of {allowed}"
                )
        if self.components < 0 or min(self.rows, self.steps) < 1:
            raise ContractError(
                "detectors.gmm: components must not be negative, rows and steps must be positive"
            )

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return (
            {},
            {"covariance": "diagonal", "components": 3},
            {"covariance": "full", "labels": "predicted"},
        )

    def pin(self, layers: Sequence[str]) -> Self:
        """The penultimate features, else the last layer, where none was named."""
        return self if self.layer else dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """One layer; the logits where they give the labels."""
        if self.components:
            return reads_of(self.layer)
        given = self.labels == "true"
        return reads_of(self.layer, logits=not given, labels=given)

    def learn(self, reference: Reference) -> State:
        """One pass per kind of covariance, or EM on a sample."""
        if not self.layer:
            raise ContractError("detectors.gmm.layer is empty, and no layer was tapped")
        with torch.inference_mode(mode=False), torch.no_grad():
            parts = self._by_steps(reference) if self.components else self._by_class(reference)
            found = _state(parts, self.covariance)
        reference.progress(1.0, "gmm: done")
        names = ("center", "weight", "means", "spread")
        return {name: one.float().contiguous() for name, one in zip(names, found, strict=True)}

    def check(self, state: State) -> None:
        """Center (D,), weight (K,), means (K, D), and spread as the kind of covariance has it."""
        spread = {"shared": "D D", "diagonal": "K D", "full": "K D D"}[self.covariance]
        expect("gmm", state, {"center": "D", "weight": "K", "means": "K D", "spread": spread})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus log-density."""
        center = state["center"]
        rows = width_of(self, self.layer, features(acts, self.layer), len(center)) - center
        means, weight, spread = state["means"], state["weight"], state["spread"]
        if self.covariance == "full":
            return _keys_of_full(rows, means, weight, spread).logsumexp(dim=1).neg()
        if self.covariance == "shared":
            rows = rows @ spread
            key = torch.addmm(weight - means.square().sum(dim=1) / 2.0, rows, means.T)
            best = key.argmax(dim=1)
            away = squared_length(rows - means[best])
        else:
            scaled = means * spread
            key = torch.addmm(weight - (scaled * means).sum(dim=1) / 2.0, rows, scaled.T)
            key = torch.addmm(key, rows.square(), spread.T, alpha=-0.5)
            best = key.argmax(dim=1)
            away = squared_length((rows - means[best]) * spread[best].sqrt())
        # a key is a component's log-density but for what all of them have in common
        others = (key - key.gather(1, best[:, None])).logsumexp(dim=1)
        return away / 2.0 - weight[best] - others

    def _read(self, acts: Activations) -> tuple[Tensor, Tensor]:
        return features(acts, self.layer), labels_of(self, acts, self.labels)

    def _by_class(self, reference: Reference) -> Parts:
        if self.covariance == "full":
            return self._full_by_class(reference)
        if self.covariance == "shared":
            (found,) = moments(reference, self._read, note="gmm: moments")
            present = found.present
            return found.counts[present], found.means[present], found.within

        def squares(acts: Activations) -> tuple[Tensor, Tensor, Tensor]:
            rows, labels = self._read(acts)
            return rows, rows.double().square(), labels

        plain, square = moments(reference, squares, scatter=False, note="gmm: moments")
        counts, means = plain.counts[plain.present], plain.means[plain.present]
        spread = (square.means[plain.present] - means.square()).clamp(min=0.0)
        return counts, means, spread * counts[:, None]

    def _full_by_class(self, reference: Reference) -> Parts:
        """One scatter for each class."""
        found: dict[int, Moments] = {}
        reference.progress(0.0, "gmm: moments per class")
        for rows, labels in rows_in_blocks(reference, self._read):
            for label in torch.unique(labels).tolist():
                if label not in found:
                    _afford(len(found) + 1, rows.shape[1])
                    found[label] = Moments(rows.shape[1], rows.device)
                own = rows[labels == label]
                found[label].add(own, torch.zeros_like(labels[: len(own)]))
        if not found:
            raise ContractError("the reference holds no row that is finite; nothing to learn from")
        parts = [found[label] for label in sorted(found)]
        counts = torch.cat([part.counts for part in parts])
        means = torch.cat([part.means for part in parts])
        return counts, means, torch.stack([part.within for part in parts])

    def _by_steps(self, reference: Reference) -> Parts:
        """Expectation and maximisation in turn, from seeds that lie apart (k-means++)."""
        reference.progress(0.0, "gmm: sampling the reference")
        (rows,) = gather(reference, lambda acts: (features(acts, self.layer),), self.rows)
        if len(rows) < self.components:
            raise ContractError(
                f"detectors.gmm.components: {self.components} are wanted, and the reference has "
                f"{len(rows)} rows that are finite"
            )
        if self.covariance == "full":
            _afford(self.components, rows.shape[1])
        exact = rows.double()
        member = torch.nn.functional.one_hot(_seeds(exact, self.components, reference))
        shares = member.to(exact.dtype)
        last = -math.inf
        for step in range(self.steps):
            parts = _maximised(exact, shares, self.covariance)
            center, weight, means, spread = _state(parts, self.covariance)
            keys = _log_densities(exact - center, weight, means, spread, self.covariance)
            mean = float(keys.logsumexp(dim=1).mean())
            reference.progress((step + 1) / self.steps, f"gmm: log-likelihood {mean:.4g}")
            if abs(mean - last) <= _CONVERGED * abs(mean):
                break
            last, shares = mean, keys.softmax(dim=1)
        return parts


def _afford(components: int, width: int) -> None:
    wanted = components * width**2 * 8
    if wanted > _FULL_BYTES:
        raise ContractError(
            f"detectors.gmm.covariance: full ones of {components} components of {width} features "
            f"take {wanted >> 20} MiB, at most {_FULL_BYTES >> 20} MiB are allowed; take shared or "
            "diagonal"
        )


def _state(parts: Parts, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Center, weight, means and spread of a score, from counts, means and scatters."""
    counts, means, scatter = parts
    rows = float(counts.sum())
    center = counts @ means / rows
    means = means - center
    share = (counts / rows).log()
    if kind == "shared":
        white = whitener(covariance(scatter, rows, "oas"))
        return center, share + torch.linalg.slogdet(white)[1], means @ white, white
    pooled = scatter.sum(dim=0) / rows
    own = (scatter + _PRIOR * pooled) / (counts + _PRIOR).reshape(-1, *[1] * pooled.ndim)
    if kind == "diagonal":
        floor = _FLOOR * float(pooled.mean())
        precision = own.clamp(min=floor if floor > 0.0 else 1.0).reciprocal()
        return center, share + precision.log().sum(dim=1) / 2.0, means, precision
    whites = [
        whitener(covariance(one * count, count, "oas"))
        for one, count in zip(own, (counts + _PRIOR).tolist(), strict=True)
    ]
    spread = torch.stack(whites)
    return center, share + torch.linalg.slogdet(spread)[1], means, spread


def _log_densities(
    rows: Tensor, weight: Tensor, means: Tensor, spread: Tensor, kind: str
) -> Tensor:
    """Of each component, share included, (B, K)."""
    if kind == "full":
        return _keys_of_full(rows, means, weight, spread)
    if kind == "shared":
        rows = rows @ spread
        return weight - torch.cdist(rows, means).square() / 2.0
    keys = torch.addmm(weight, rows.square(), spread.T, alpha=-0.5)
    scaled = means * spread
    return torch.addmm(keys, rows, scaled.T) - (scaled * means).sum(dim=1) / 2.0


def _keys_of_full(rows: Tensor, means: Tensor, weight: Tensor, spread: Tensor) -> Tensor:
    """Log-densities (B, K); components are taken a few at a time, so that memory is bounded."""
    step = max(1, _CHUNK // max(1, rows.numel()))
    found = []
    for start in range(0, len(means), step):
        some = slice(start, start + step)
        white = (rows - means[some, None]) @ spread[some]
        length = white.square().sum(dim=2).clamp_(max=torch.finfo(white.dtype).max)
        found.append(weight[some] - length.T / 2.0)
    return torch.cat(found, dim=1)


def _seeds(rows: Tensor, count: int, reference: Reference) -> Tensor:
    """Component (N,) of each row: the nearest of seeds drawn in proportion to squared distance."""
    draw = reference.generator()
    chosen = [int(torch.randint(len(rows), (1,), generator=draw))]
    apart = (rows - rows[chosen[0]]).square().sum(dim=1)
    nearest = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    while len(chosen) < count:
        total = float(apart.sum())
        # where all rows are copies of the seeds, any row will do
        odds = (apart if total > 0.0 else torch.ones_like(apart)).cpu()
        chosen.append(int(torch.multinomial(odds, 1, generator=draw)))
        other = (rows - rows[chosen[-1]]).square().sum(dim=1)
        nearest = torch.where(other < apart, len(chosen) - 1, nearest)
        apart = torch.minimum(apart, other)
    # a last row of its own for every component, so that none starts without any
    nearest[torch.tensor(chosen, device=rows.device)] = torch.arange(count, device=rows.device)
    return nearest


def _maximised(rows: Tensor, shares: Tensor, kind: str) -> Parts:
    """Counts, means and scatters of rows (N, D) that belong to components by shares (N, K)."""
    counts = shares.sum(dim=0).clamp(min=_FEWEST)
    means = shares.T @ rows / counts[:, None]
    if kind == "full":
        away = (rows - mean for mean in means)
        scatter = [
            (one * share[:, None]).T @ one for one, share in zip(away, shares.T, strict=True)
        ]
        return counts, means, torch.stack(scatter)
    center = rows.mean(dim=0)
    rows, moved = rows - center, means - center
    if kind == "diagonal":
        spread = shares.T @ rows.square() - counts[:, None] * moved.square()
        return counts, means, spread.clamp(min=0.0)
    return counts, means, rows.T @ rows - moved.T @ (counts[:, None] * moved)
