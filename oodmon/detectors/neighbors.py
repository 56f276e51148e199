"""Nearest stored reference features: how far the k-th is (knn), how alike several are (nnguide).

The search (`nearest`) is exact: one product with the bank, and the k best without sorting them. The
bank is bounded: a seeded uniform sample of the reference, or a coreset of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, Self

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.cellindex import available, learn_cells, search
from oodmon.detectors.coresets import coreset
from oodmon.detectors.features import choose, features, reads_of, unit, width_of
from oodmon.detectors.logits import log_partition
from oodmon.detectors.nearest import best, distance, half_squares
from oodmon.detectors.reference import gather
from oodmon.detectors.states import expect
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["KNN", "NNGuide", "coreset"]

_PAPERS: Final = 50
"""Which neighbour counts in a large bank (the paper's, for CIFAR-10)."""

_A_SHARE: Final = 100
"""In a smaller bank it is that of one row in so many: still of the sample's own class."""

_FEW: Final = 5
"""And in a coreset, whose points are no measure of density."""

_INDEX: Final = "detectors.knn.index"

_HELD_OUT: Final = 0.1
_HELD_OUT_ROWS: Final = 1000
"""Rows, as a share and at most, that a coreset's recall is measured on; they are in no bank."""

_TAIL: Final = 0.05
"""Recall is over this share of the held-out rows, those that the whole bank scores highest."""


@detectors.register("knn")
@dataclass(frozen=True)
class KNN(Detector):
    """Distance to the k-th nearest reference sample in feature space.

    Reads      layers[layer] (B, D), maps averaged over their places
    Learns     bank (N, D): features of a uniform sample of the reference, at length 1 if
               `normalize`; half (N,): half their squared lengths; recall (): of the coreset or
               the index; with an index cells (M, D): the centres of its cells
    Score      |x - b_(k)|, >= 0; at most 2 if `normalize`
    Reference  Sun et al., ICML 2022

    Options: `layer`, empty for the penultimate features ("logits" are features too). `k`; 0 is the
    paper's 50 for a bank of 5,000 and more, a hundredth of a smaller one, and at most 5 of a
    coreset: a k-th neighbour must come from the sample's own class, and with more neighbours than a
    class has samples, sure samples are farther from it than doubtful ones: the score turns upside
    down. `normalize`: features are scaled to length 1, as in the paper. `rows` of the bank at most:
    above, a seeded uniform sample. `coreset`: 0, or so many points of that sample which leave no
    row far from all of them. `index`: "product" compares with the whole bank; "faiss" (`pip
    install 'oodmon[faiss]'`) searches only the `probes` cells of it that are nearest.

    The cost is that of one product with the bank: N·D per sample. A coreset covers sparse regions
    as well as dense ones, so its points are no measure of density: take a small k with it (1 to 5).
    Its recall is measured while learning, on held-out rows: of the 5 % that the whole bank scores
    highest, the share that the coreset scores highest too. It is kept in the state. On a small
    network's features of FashionMNIST 2,000 points of 9,000 had a recall of 0.82, and separated
    MNIST as well as the whole bank.

    An index is for large banks and single samples on a CPU. Of 10,000 rows of 512 features it took
    a twentieth of the time for one sample and 0.7 for 256 of them, at a recall of 0.98 (the share
    of the k nearest that it finds, kept in the state); of 50,000 rows a fiftieth and 0.35, at 0.84.
    What it misses makes distances larger. It holds a second copy of the bank. On other devices, and
    for rows that it finds too few for, the whole bank is compared.
    """

    layer: str = ""
    k: int = 0
    normalize: bool = True
    rows: int = 10_000
    coreset: int = 0
    index: Literal["product", "faiss"] = "product"
    probes: int = 32

    paper: ClassVar[Paper | None] = Paper(
        "Out-of-Distribution Detection with Deep Nearest Neighbors",
        "Sun, Ming, Zhu and Li",
        "ICML",
        2022,
        "https://arxiv.org/abs/2204.06507",
    )
    stability: ClassVar[Stability] = "stable"
    cost: ClassVar[str] = "N·D"

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ContractError(f"detectors.knn.rows: {self.rows} is not positive")
        if self.k < 0:
            raise ContractError(f"detectors.knn.k: {self.k} is negative")
        if self.rows < self.k:
            raise ContractError(f"detectors.knn.rows: {self.rows} is less than k, {self.k}")
        if self.coreset and self.coreset < self.k:
            raise ContractError(f"detectors.knn.coreset: {self.coreset} is less than k, {self.k}")
        if self.index not in ("product", "faiss"):
            raise ContractError(
                f"detectors.knn.index: {self.index!r} is neither 'product' nor 'faiss'"
            )
        if self.probes < 1:
            raise ContractError(f"detectors.knn.probes: {self.probes} is not positive")
        if self.coreset and self.index == "faiss":
            raise ContractError("detectors.knn.index: give 'faiss' or a coreset, not both")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        found: list[dict[str, Any]] = [
            {},
            {"k": 10},
            {"k": 5, "normalize": False, "rows": 200},
            {"k": 1, "coreset": 60},
        ]
        if available():
            found.append({"k": 5, "index": "faiss", "probes": 4})
        return found

    def pin(self, layers: Sequence[str]) -> Self:
        """The penultimate features, else the last layer, where none was named."""
        return self if self.layer else dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """One layer."""
        return reads_of(self.layer)

    def learn(self, reference: Reference) -> State:
        """One pass for the sample; the coreset and its recall from that."""
        if not self.layer:
            raise ContractError("detectors.knn.layer is empty, and no layer was tapped")
        reference.progress(0.0, "knn: sampling the reference")
        (bank,) = gather(reference, lambda acts: (self._rows(acts),), self.rows)
        if len(bank) < self.k:
            raise ContractError(
                f"detectors.knn.k: {self.k} neighbours are wanted, and the reference has "
                f"{len(bank)} rows that are finite"
            )
        recall = 1.0
        if 0 < self.coreset < len(bank):
            with torch.inference_mode(mode=False), torch.no_grad():
                bank, recall = self._thinned(bank, reference)
        bank = bank.contiguous()
        state = {"bank": bank, "half": half_squares(bank)}
        if self.index == "faiss":
            reference.progress(0.5, f"knn: cells of {len(bank)} rows")
            state["cells"] = learn_cells(bank.cpu(), _INDEX).to(bank.device)
            recall = self._found(state)
        reference.progress(1.0, f"knn: {len(bank)} rows, recall {recall:.2f}")
        return {**state, "recall": torch.tensor(recall, device=bank.device)}

    def check(self, state: State) -> None:
        """Bank (N, D), half (N,), recall (); with an index its cells (M, D)."""
        cells = {"cells": "M D"} if self.index == "faiss" else {}
        expect("knn", state, {"bank": "N D", "half": "N", "recall": "", **cells})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Distance to the k-th nearest."""
        bank = state["bank"]
        rows = width_of(self, self.layer, self._rows(acts), bank.shape[1])
        k = self._neighbour(len(bank))
        if self.index == "faiss" and bank.device.type == "cpu":
            return self._by_cells(rows, state, k)
        return distance(rows, bank, state["half"], k)

    def _by_cells(self, rows: Tensor, state: State, k: int) -> Tensor:
        """To the k-th nearest in the cells that are searched, else in the whole bank."""
        bank = state["bank"]
        last = search(rows, bank, state["cells"], k, self.probes, _INDEX)[:, k - 1]
        found: Tensor = torch.linalg.vector_norm(rows - bank[last.clamp(min=0)], dim=1)
        found.clamp_(max=torch.finfo(found.dtype).max)
        missed = last < 0
        if bool(missed.any()):
            found[missed] = distance(rows[missed], bank, state["half"], k)
        return found

    def _found(self, state: State) -> float:
        """The share of the nearest of some of the bank's own rows that the index finds."""
        bank, half = state["bank"].cpu(), state["half"].cpu()
        rows = bank[:: max(1, len(bank) // _HELD_OUT_ROWS)]
        k = self._neighbour(len(bank))
        exact = best(rows, bank, half, k)[1]
        found = search(rows, bank, state["cells"].cpu(), k, self.probes, _INDEX)
        return float((found[:, :, None] == exact[:, None, :]).any(dim=2).double().mean())

    def _neighbour(self, size: int, whole: bool = False) -> int:
        """Which neighbour counts in a bank of this size."""
        most = _FEW if self.coreset and not whole else _PAPERS
        return min(self.k or min(most, max(1, size // _A_SHARE)), size)

    def _rows(self, acts: Activations) -> Tensor:
        return unit(acts, self.layer) if self.normalize else features(acts, self.layer)

    def _thinned(self, bank: Tensor, reference: Reference) -> tuple[Tensor, float]:
        """A coreset of all rows but the held-out ones, and its recall on those."""
        held = min(_HELD_OUT_ROWS, int(_HELD_OUT * len(bank)))
        order = torch.randperm(len(bank), generator=reference.generator()).to(bank.device)
        aside, rest = bank[order[:held]], bank[order[held:].sort().values]
        chosen = coreset(rest, self.coreset, reference, "knn: choosing the coreset")
        few = rest[chosen.sort().values]
        tail = int(_TAIL * held)
        if not tail or len(few) < self.k or len(rest) < self.k:
            return few, 0.0
        exact = (
            distance(aside, rest, half_squares(rest), self._neighbour(len(rest), whole=True))
            .topk(tail)
            .indices
        )
        found = (
            distance(aside, few, half_squares(few), self._neighbour(len(few))).topk(tail).indices
        )
        return few, float(torch.isin(found, exact).double().mean())


@detectors.register("nnguide")
@dataclass(frozen=True)
class NNGuide(Detector):
    """Energy of the logits, guided by how alike the features are to those of sure samples.

    Reads      layers[layer] (B, D), maps averaged over their places; logits (B, K)
    Learns     bank (N, D): features of a uniform sample of the reference at length 1, times the
               sample's log-sum-exp of logits
    Score      -lse(z) · mean of the k largest x·b / |x|; any sign
    Reference  Park et al., ICCV 2023

    Options: `layer`, empty for the penultimate features. `k`. `rows` of the bank at most: above, a
    seeded uniform sample (the paper takes 1 % of ImageNet).

    Both factors change their sign together where the log-sum-exp is negative, which a model's
    logits may all be; then the order is lost. Watch `energy` beside it.
    """

    layer: str = ""
    k: int = 10
    rows: int = 10_000

    paper: ClassVar[Paper | None] = Paper(
        "Nearest Neighbor Guidance for Out-of-Distribution Detection",
        "Park, Jung and Teoh",
        "ICCV",
        2023,
        "https://arxiv.org/abs/2309.14888",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "N·D"

    def __post_init__(self) -> None:
        for option in ("k", "rows"):
            if getattr(self, option) < 1:
                raise ContractError(
                    f"detectors.nnguide.{option}: {getattr(self, option)} is not positive"
                )
        if self.rows < self.k:
            raise ContractError(f"detectors.nnguide.rows: {self.rows} is less than k, {self.k}")

    def pin(self, layers: Sequence[str]) -> Self:
        """The penultimate features, else the last layer, where none was named."""
        return self if self.layer else dataclasses.replace(self, layer=choose(layers))

    def reads(self) -> Reads:
        """One layer and the logits."""
        return reads_of(self.layer, logits=True)

    def learn(self, reference: Reference) -> State:
        """One pass."""
        if not self.layer:
            raise ContractError("detectors.nnguide.layer is empty, and no layer was tapped")
        reference.progress(0.0, "nnguide: sampling the reference")
        (bank,) = gather(reference, lambda acts: (self._guides(acts),), self.rows)
        if len(bank) < self.k:
            raise ContractError(
                f"detectors.nnguide.k: {self.k} neighbours are wanted, and the reference has "
                f"{len(bank)} rows that are finite"
            )
        reference.progress(1.0, f"nnguide: {len(bank)} rows")
        return {"bank": bank.contiguous()}

    def check(self, state: State) -> None:
        """Bank (N, D)."""
        expect("nnguide", state, {"bank": "N D"})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus guidance times log-sum-exp."""
        bank = state["bank"]
        rows = width_of(self, self.layer, unit(acts, self.layer), bank.shape[1])
        guidance = best(rows, bank, None, min(self.k, len(bank)))[0].mean(dim=1)
        return -(guidance * log_partition(acts).float())

    def _guides(self, acts: Activations) -> Tensor:
        return unit(acts, self.layer) * log_partition(acts).float()[:, None]
