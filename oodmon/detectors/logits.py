"""Scores from the logits alone: msp, max_logit, energy, entropy. One pass serves all of them.

They are the cheapest detectors and the baseline of every report. What several of them need is
computed once per batch and shared through `Activations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Paper, Reads, Stability, State
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = [
    "MSP",
    "Energy",
    "Entropy",
    "MaxLogit",
    "confidence",
    "log_partition",
    "predicted",
    "two_sided",
]

_FAR: Final = 1e20
"""A gap between two logits that is treated as infinite: exp(-1e20) is 0 in every precision."""

_MARK: Final = 1e30
"""Stands in place of the winning logit's gap; so far above `_FAR` that the winners can be
counted in a sum of gaps: up to 1e6 gaps of `_FAR` weigh less than 1e-4 of one mark."""

_FEW: Final = 64
"""Below so many classes separate kernels beat torch's fused softmax on a CPU."""


def two_sided(acts: Activations) -> Tensor:
    """Logits (B, K), K ≥ 2, at least float32.

    One logit z of a binary model becomes (-z/2, z/2): the same probabilities, and a size that says
    how sure the model is of either class.
    """
    return acts.shared("logits", lambda: _two_sided(acts.require_logits()))


def _two_sided(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ContractError(f"logits: expected (B, C), found {tuple(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if logits.shape[1] == 1:
        half = logits / 2
        logits = torch.cat([-half, half], dim=1)
    return logits


def _top(acts: Activations) -> Tensor:
    """Largest logit (B, 1)."""
    return acts.shared("logits.top", lambda: two_sided(acts).amax(dim=1, keepdim=True))


def predicted(acts: Activations) -> Tensor:
    """Predicted class (B,) int64; of several largest logits the first."""
    return acts.shared("logits.predicted", lambda: two_sided(acts).argmax(dim=1))


def log_partition(acts: Activations, temperature: float = 1.0) -> Tensor:
    """Log-sum-exp of logits / temperature, (B,)."""

    def compute() -> Tensor:
        logits, top = two_sided(acts), _top(acts)
        if temperature != 1.0:
            logits, top = logits / temperature, top / temperature
        if logits.shape[1] < _FEW:
            total = (logits - top).exp_().sum(dim=1).log_()
            return total.add_(top[:, 0])
        # the largest log-probability is top - lse, and log_softmax is one fused kernel
        return top[:, 0] - logits.log_softmax(dim=1).amax(dim=1)

    return acts.shared(f"logits.lse@{temperature}", compute)


def confidence(acts: Activations) -> Tensor:
    """Largest softmax probability (B,), in (0, 1]."""
    return acts.shared("logits.confidence", lambda: (_top(acts)[:, 0] - log_partition(acts)).exp_())


@dataclass(frozen=True, slots=True, eq=False)
class _Others:
    """All classes but the predicted one, relative to it; exact however sure the model is.

    Attributes:
        log_odds: log of the sum of exp(z_k - z_top) over k that do not share the top, (B,).
        tied: how many classes share the top beyond the first, (B,).
        gaps: (z_top - z_k) / T, (B, K); `_MARK` at the top.
        weights: softmax over the classes that do not share the top, (B, K).
    """

    log_odds: Tensor
    tied: Tensor
    gaps: Tensor
    weights: Tensor


def _others(acts: Activations, temperature: float) -> _Others:
    """Never 1 - p: that difference is 0 in float32 from a gap of 17 on, and the order is lost."""

    def compute() -> _Others:
        gaps = _top(acts) - two_sided(acts)
        if temperature != 1.0:
            gaps /= temperature
        gaps.clamp_(max=_FAR)
        torch.threshold_(gaps, 0.0, _MARK)
        tied = (gaps.sum(dim=1) / _MARK).round_().sub_(1.0)
        nearest = gaps.amin(dim=1, keepdim=True)
        if gaps.shape[1] < _FEW:
            weights = (nearest - gaps).exp_()
            total = weights.sum(dim=1, keepdim=True)
            weights /= total
            log_odds = (total.log_() - nearest)[:, 0]
        else:
            weights = gaps.neg().softmax(dim=1)
            log_odds = -nearest[:, 0] - weights.amax(dim=1).log_()
        return _Others(log_odds, tied, gaps, weights)

    return acts.shared(f"logits.others@{temperature}", compute)


def _positive(detector: str, temperature: float) -> None:
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ContractError(f"detectors.{detector}.temperature: {temperature} is not positive")


_READS: Final = Reads(logits=True)


@detectors.register("msp")
@dataclass(frozen=True)
class MSP(Detector):
    """Maximum softmax probability: how unsure the classifier is of its own answer.

    Reads      logits (B, C); C = 1 is a binary logit
    Options    temperature divides the logits first
    Learns     nothing
    Score      log(1 - max p), < 0, no ties at saturation (scale "log_complement");
               -max p, in [-1, -1/C] (scale "prob"); both order samples the same way
    Reference  Hendrycks and Gimpel, ICLR 2017
    """

    temperature: float = 1.0
    scale: Literal["log_complement", "prob"] = "log_complement"

    paper: ClassVar[Paper | None] = Paper(
        "A Baseline for Detecting Misclassified and Out-of-Distribution Examples "
        "in Neural Networks",
        "Hendrycks and Gimpel",
        "ICLR",
        2017,
        "https://arxiv.org/abs/1610.02136",
    )
    stability: ClassVar[Stability] = "stable"

    def __post_init__(self) -> None:
        _positive("msp", self.temperature)
        if self.scale not in ("log_complement", "prob"):
            raise ContractError(
                f"detectors.msp.scale: {self.scale!r} is neither 'log_complement' nor 'prob'"
            )

    def reads(self) -> Reads:
        """Logits."""
        return _READS

    def score(self, acts: Activations, state: State) -> Tensor:
        """log of the sum of the other classes' probabilities, or minus the largest one."""
        del state
        if self.scale == "prob":
            top = _top(acts)[:, 0]
            if self.temperature != 1.0:
                top = top / self.temperature
            return (top - log_partition(acts, self.temperature)).exp_().neg_()
        others = _others(acts, self.temperature)
        return functional.logsigmoid(torch.logaddexp(others.log_odds, others.tied.log()))


@detectors.register("max_logit")
@dataclass(frozen=True)
class MaxLogit(Detector):
    """Largest logit: unlike a probability it keeps how strong the evidence is.

    Reads      logits (B, C); of one binary logit z it takes |z|/2
    Learns     nothing
    Score      -max z, unbounded
    Reference  Hendrycks et al., ICML 2022
    """

    paper: ClassVar[Paper | None] = Paper(
        "Scaling Out-of-Distribution Detection for Real-World Settings",
        "Hendrycks, Basart, Mazeika, Zou, Kwon, Mostajabi, Steinhardt and Song",
        "ICML",
        2022,
        "https://arxiv.org/abs/1911.11132",
    )
    stability: ClassVar[Stability] = "stable"

    def reads(self) -> Reads:
        """Logits."""
        return _READS

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the largest logit."""
        del state
        return _top(acts)[:, 0].neg()


@detectors.register("energy")
@dataclass(frozen=True)
class Energy(Detector):
    """Free energy of the logits: a smooth maximum over all classes.

    Reads      logits (B, C); a binary logit z counts as (-z/2, z/2)
    Options    temperature divides the logits first
    Learns     nothing
    Score      -T log sum exp(z/T), unbounded
    Reference  Liu et al., NeurIPS 2020
    """

    temperature: float = 1.0

    paper: ClassVar[Paper | None] = Paper(
        "Energy-based Out-of-distribution Detection",
        "Liu, Wang, Owens and Li",
        "NeurIPS",
        2020,
        "https://arxiv.org/abs/2010.03759",
    )
    stability: ClassVar[Stability] = "stable"

    def __post_init__(self) -> None:
        _positive("energy", self.temperature)

    def reads(self) -> Reads:
        """Logits."""
        return _READS

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the temperature times the log partition."""
        del state
        return log_partition(acts, self.temperature) * -self.temperature


@detectors.register("entropy")
@dataclass(frozen=True)
class Entropy(Detector):
    """Entropy of the softmax probabilities.

    Reads      logits (B, C); C = 1 is a binary logit
    Options    temperature divides the logits first
    Learns     nothing
    Score      -sum p log p, in [0, log C]; exact near 0, where 1 - max p is lost in float32
    Reference  Hendrycks and Gimpel, ICLR 2017
    """

    temperature: float = 1.0

    paper: ClassVar[Paper | None] = MSP.paper
    stability: ClassVar[Stability] = "stable"

    def __post_init__(self) -> None:
        _positive("entropy", self.temperature)

    def reads(self) -> Reads:
        """Logits."""
        return _READS

    def score(self, acts: Activations, state: State) -> Tensor:
        """With n top classes and odds t of the others: log(n + t) + t/(n + t) · mean gap.

        The mean gap of the others is taken over their own softmax, so nothing cancels.
        """
        del state
        others = _others(acts, self.temperature)
        odds = others.log_odds.exp()
        # a marked gap has weight 0, except where all classes are tied: there the odds are 0
        mean_gap = (others.gaps * others.weights).sum(dim=1)
        return torch.log1p(others.tied + odds) + odds * mean_gap / (1.0 + others.tied + odds)
