"""Scores from the logits alone: msp, max_logit, energy, entropy. One pass serves all of them.

They are the cheapest detectors and the baseline of every report. What several of them need is
computed once per batch and shared through `Activations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, NamedTuple

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
    "Others",
    "confidence",
    "gaps",
    "log_confidence",
    "log_odds",
    "log_partition",
    "others",
    "predicted",
    "two_sided",
]

_MARK: Final = 1e30
"""Stands in place of the winning logit's gap, and is the widest that there can be: exp(-1e30) is 0,
and 0 times it is as well."""

_FEW: Final = 64
"""Below so many classes the fused softmax is several times as fast across the rows as along
them, on a CPU. And finding the winner of so few is no work."""


class Others(NamedTuple):
    """All classes but the predicted one, by their odds against it, exp((z_k - z_top) / T); (B,).

    log_odds: of their sum. gap: mean of (z_k - z_top) / T over them, weighted by their odds, <= 0.
    """

    log_odds: Tensor
    gap: Tensor


def two_sided(acts: Activations) -> Tensor:
    """Logits (B, K), K ≥ 2, at least float32.

    One logit z of a binary model becomes (-z/2, z/2): the same probabilities, and a size that says
    how sure the model is of either class.
    """
    return acts.shared("logits", lambda: _two_sided(acts.require_logits()))


def _two_sided(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ContractError(f"logits: expected (B, C), found {tuple(logits.shape)}")
    if logits.dtype is not torch.float32 and logits.dtype is not torch.float64:
        logits = logits.float()
    if logits.shape[1] == 1:
        half = logits / 2
        logits = torch.cat([-half, half], dim=1)
    return logits


def _softmax(logits: Tensor) -> Tensor:
    return logits.T.softmax(dim=0).T if logits.shape[1] < _FEW else logits.softmax(dim=1)


def _winner(acts: Activations) -> tuple[Tensor, Tensor]:
    """Largest logit (B, 1) and its class (B, 1); of several the first."""

    def compute() -> tuple[Tensor, Tensor]:
        logits = two_sided(acts)
        if logits.device.type != "cpu" or logits.shape[1] < _FEW:
            top, label = logits.max(dim=1, keepdim=True)
            return top, label
        # NumPy's is vectorised, which is ten times as fast
        label = torch.from_numpy(logits.detach().numpy().argmax(axis=1)).unsqueeze(1)
        return logits.gather(1, label), label

    return acts.shared("logits.winner", compute)


def predicted(acts: Activations) -> Tensor:
    """Predicted class (B,) int64; of several largest logits the first."""
    return _winner(acts)[1].squeeze(1)


def log_confidence(acts: Activations, temperature: float = 1.0) -> Tensor:
    """Log of the largest softmax probability (B,), <= 0."""

    def compute() -> Tensor:
        logits = two_sided(acts)
        if temperature != 1.0:
            logits = logits / temperature
        few = logits.shape[1] < _FEW
        log_p = logits.T.log_softmax(dim=0).T if few else logits.log_softmax(dim=1)
        return log_p.amax(dim=1)

    return acts.shared(f"logits.confidence@{temperature}", compute)


def confidence(acts: Activations) -> Tensor:
    """Largest softmax probability (B,), in (0, 1]."""
    return log_confidence(acts).exp()


def log_partition(acts: Activations, temperature: float = 1.0) -> Tensor:
    """Log-sum-exp of logits / temperature, (B,): the top less its log-probability."""
    top = two_sided(acts).amax(dim=1)
    if temperature != 1.0:
        top /= temperature
    return top - log_confidence(acts, temperature)


def gaps(acts: Activations, temperature: float = 1.0) -> Tensor:
    """(z_k - z_top) / T, (B, K), <= 0, with -1e30 in the place of the predicted class.

    What is wanted of the others is computed from them, never as 1 - p: that difference is 0 in
    float32 from a gap of 17 on, and the order is lost.
    """
    top, label = _winner(acts)
    found = two_sided(acts) - top
    if temperature != 1.0:
        found /= temperature
    # added to its gap of 0, so that a row with an infinite logit stays NaN
    return found.scatter_(1, label, -_MARK, reduce="add").clamp_(min=-_MARK)


def others(acts: Activations, temperature: float = 1.0) -> Others:
    """Of all classes but the predicted one; what is larger than (B,) is not kept."""

    def compute() -> Others:
        found = gaps(acts, temperature)
        shares = _softmax(found)
        log_odds = found.amax(dim=1).sub_(shares.amax(dim=1).log_())
        return Others(log_odds, shares.mul_(found).sum(dim=1))

    return acts.shared(f"logits.others@{temperature}", compute)


def log_odds(acts: Activations, temperature: float = 1.0) -> Tensor:
    """log((1 - p) / p) of the largest probability p, (B,): exact where p is 1 in float32."""
    return others(acts, temperature).log_odds


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
    cost: ClassVar[str] = "C"

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
            logits = two_sided(acts)
            if self.temperature != 1.0:
                logits = logits / self.temperature
            return _softmax(logits).amax(dim=1).neg_()
        return functional.logsigmoid(log_odds(acts, self.temperature))


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
    cost: ClassVar[str] = "C"

    def reads(self) -> Reads:
        """Logits."""
        return _READS

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the largest logit."""
        del state
        return two_sided(acts).amax(dim=1).neg_()


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
    cost: ClassVar[str] = "C"

    def __post_init__(self) -> None:
        _positive("energy", self.temperature)

    def reads(self) -> Reads:
        """Logits."""
        return _READS

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the temperature times the log partition."""
        del state
        found = log_partition(acts, self.temperature).neg_()
        return found if self.temperature == 1.0 else found.mul_(self.temperature)


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
    cost: ClassVar[str] = "C"

    def __post_init__(self) -> None:
        _positive("entropy", self.temperature)

    def reads(self) -> Reads:
        """Logits."""
        return _READS

    def score(self, acts: Activations, state: State) -> Tensor:
        """log(1 + odds) - (1 - p) (mean gap of the others), so that nothing cancels."""
        del state
        odds, gap = others(acts, self.temperature)
        return functional.softplus(odds).addcmul_(odds.sigmoid(), gap, value=-1.0)
