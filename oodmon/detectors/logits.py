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
    "log_odds",
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

_CHUNK: Final = 1 << 16
"""Logits that are worked on at once where there are many: their temporaries stay in the cache."""

_A_FEW_ROWS: Final = 16
"""Up to so many rows the number of calls counts, not their work."""


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


def _top(acts: Activations) -> Tensor:
    """Largest logit (B, 1)."""
    if two_sided(acts).shape[1] < _FEW:
        return _top_and_class(acts)[0]
    return acts.shared("logits.top", lambda: two_sided(acts).amax(dim=1, keepdim=True))


def _top_and_class(acts: Activations) -> tuple[Tensor, Tensor]:
    """Largest logit (B, 1) and its class (B, 1); of several the first."""
    return acts.shared("logits.max", lambda: two_sided(acts).max(dim=1, keepdim=True))


def predicted(acts: Activations) -> Tensor:
    """Predicted class (B,) int64; of several largest logits the first."""
    return _top_and_class(acts)[1].squeeze(1)


def log_partition(acts: Activations, temperature: float = 1.0) -> Tensor:
    """Log-sum-exp of logits / temperature, (B,)."""

    def compute() -> Tensor:
        logits, top = two_sided(acts), _top(acts)
        if temperature != 1.0:
            logits, top = logits / temperature, top / temperature
        return _log_sum_exp(logits, top)

    return acts.shared(f"logits.lse@{temperature}", compute)


def _log_sum_exp(values: Tensor, top: Tensor) -> Tensor:
    """(B,), given the largest value of each row (B, 1)."""
    if values.shape[1] < _FEW and len(values) > 1:
        return (values - top).exp_().sum(dim=1).log_().add_(top.squeeze(1))
    # the largest log-probability is top - lse, and log_softmax is one fused kernel
    return top.squeeze(1) - values.log_softmax(dim=1).amax(dim=1)


def confidence(acts: Activations) -> Tensor:
    """Largest softmax probability (B,), in (0, 1]."""
    return acts.shared(
        "logits.confidence", lambda: (_top(acts).squeeze(1) - log_partition(acts)).exp_()
    )


def _gaps(acts: Activations, temperature: float) -> Tensor:
    """(z_k - z_top) / T, (B, K) for few classes, with -`_MARK` in the place of the predicted one.

    What is wanted of the others is computed from them, never as 1 - p: that difference is 0 in
    float32 from a gap of 17 on, and the order is lost.
    """

    def compute() -> Tensor:
        top, label = _top_and_class(acts)
        gaps = two_sided(acts) - top
        if temperature != 1.0:
            gaps /= temperature
        # added to its gap of 0, so that a row with an infinite logit stays NaN
        return gaps.scatter_(1, label, -_MARK, reduce="add")

    return acts.shared(f"logits.gaps@{temperature}", compute)


def _marked(logits: Tensor, top: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As `_gaps` for many classes, but every class that shares the top logit is marked.

    Finding a class costs ten times what finding the value does. Also how many share it beyond the
    first, (B,).
    """
    gaps = top - logits
    if temperature != 1.0:
        gaps /= temperature
    torch.threshold_(gaps.clamp_(max=_FAR), 0.0, _MARK)
    tied = (gaps.sum(dim=1) / _MARK).round_().sub_(1.0)
    return gaps.neg_(), tied


def log_odds(acts: Activations, temperature: float = 1.0) -> Tensor:
    """log((1 - p) / p) of the largest probability p, (B,): exact where p is 1 in float32."""
    return _others(acts, temperature)[0]


def _others(acts: Activations, temperature: float) -> tuple[Tensor, Tensor]:
    """Of all classes but the predicted one: log of their odds, and the sum of odds times gap.

    Odds are against the predicted class, exp(gap), and gaps (z_k - z_top) / T; both (B,).
    """
    return acts.shared(f"logits.others@{temperature}", lambda: _sums(acts, temperature))


def _sums(acts: Activations, temperature: float) -> tuple[Tensor, Tensor]:
    logits, top = two_sided(acts), _top(acts)
    if logits.shape[1] < _FEW:
        gaps = _gaps(acts, temperature)
        near = gaps.amax(dim=1, keepdim=True)
        odds = (gaps - near).exp_()
        log_sum = odds.sum(dim=1).log_()
        # of a marked class and of one with logit -inf both are 0: exp(-1e20), and 1e20 times that
        weighted = odds.mul_(gaps.clamp(min=-_FAR)).sum(dim=1)
        near = near.squeeze(1)
        return log_sum.add_(near), weighted.mul_(near.exp())
    size = max(1, _CHUNK // logits.shape[1])
    if logits.device.type != "cpu" or len(logits) <= size:
        return _sums_of_many(logits, top, temperature)
    starts = range(0, len(logits), size)
    parts = [_sums_of_many(logits[i : i + size], top[i : i + size], temperature) for i in starts]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _sums_of_many(logits: Tensor, top: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    gaps, tied = _marked(logits, top, temperature)
    shares = gaps.softmax(dim=1)  # one fused kernel
    log_sum = gaps.amax(dim=1).sub_(shares.amax(dim=1).log_())
    weighted = shares.mul_(gaps).sum(dim=1).mul_(log_sum.exp())
    return torch.logaddexp(log_sum, tied.log_()), weighted


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
        logits = two_sided(acts)
        if self.scale == "prob":
            if self.temperature != 1.0:
                logits = logits / self.temperature
            return logits.softmax(dim=1).amax(dim=1).neg_()
        if len(logits) <= _A_FEW_ROWS and logits.shape[1] < _FEW:
            return _log_complement(logits / self.temperature)
        return functional.logsigmoid(log_odds(acts, self.temperature))


def _log_complement(logits: Tensor) -> Tensor:
    """log(1 - max p), (B,), in half as many calls as by `log_odds`, of which each costs more."""
    shares = logits.double().log_softmax(dim=1)
    others = shares.topk(logits.shape[1] - 1, largest=False).values.clamp_(min=-_MARK)
    # their log-sum-exp: each is its own share of them plus that
    return others[:, -1] - others.log_softmax(dim=1)[:, -1]


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
        found = log_partition(acts, self.temperature).neg()
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
        """log(1 + odds) - (sum of odds times gap) / (1 + odds), so that nothing cancels."""
        del state
        log_sum, weighted = _others(acts, self.temperature)
        odds = log_sum.exp()
        return odds.log1p().sub_(weighted / odds.add_(1.0))
