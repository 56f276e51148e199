"""Scores from the logits alone: msp, max_logit, energy, entropy. One pass serves all of them.

They are the cheapest detectors and the baseline of every report. What several of them need is
computed once per batch (`odds`) and shared through `Activations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Stability, State
from oodmon.detectors.odds import answer, largest, predicted, shares, two_sided
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


def confidence(acts: Activations) -> Tensor:
    """Largest softmax probability (B,), in (0, 1]."""
    return answer(acts).log_sure().exp_()


def log_partition(acts: Activations, temperature: float = 1.0) -> Tensor:
    """Log-sum-exp of logits / temperature, (B,)."""
    return answer(acts, temperature).log_partition()


def log_odds(acts: Activations, temperature: float = 1.0) -> Tensor:
    """log((1 - p) / p) of the largest probability p, (B,): exact where p is 1 in float32."""
    return answer(acts, temperature).log_odds()


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

    Trap: a multi-label model, with a sigmoid for each class, has no softmax, and no score of one
    means anything for it. `max_logit` is that of its surest label; or read its features.
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
            return shares(logits).amax(dim=1).neg_()
        return answer(acts, self.temperature).log_wrong()


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
        return largest(acts).neg_()


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
        """Summed over the classes but the predicted one, so that nothing cancels."""
        del state
        return answer(acts, self.temperature).entropy()
