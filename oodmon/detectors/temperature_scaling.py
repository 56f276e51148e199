"""Scores of logits divided by a temperature that was learnt from labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.odds import Answer, answer_of, two_sided
from oodmon.detectors.reference import gather
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["TemperatureScaling", "best_temperature"]

_SCORES: Final[Mapping[str, Callable[[Answer], Tensor]]] = {
    "msp": lambda answer: answer.log_wrong(),
    "entropy": lambda answer: answer.entropy(),
    "energy": lambda answer: answer.log_partition().neg_(),
}

_COLDEST: Final = 0.05
_WARMEST: Final = 100.0
"""Temperatures that are looked at. Where every answer is right the likelihood rises for ever."""

_STEPS: Final = 60
_CLOSE: Final = 1e-9
"""Newton's method ends when the bracket or a step is this small, relative to 1 / temperature."""

_ROWS_AT_ONCE: Final = 1 << 20
"""Logits that are worked on at once."""


@detectors.register("temperature_scaling")
@dataclass(frozen=True)
class TemperatureScaling(Detector):
    """A score of calibrated logits: their temperature maximises the likelihood of the labels.

    Reads      logits (B, C); labels while learning
    Options    score_of: "msp", "entropy" or "energy", of logits / T; rows: reference rows used
    Learns     temperature (): T in [0.05, 100]
    Score      as the detector of that name at temperature T; "energy" without the factor T
    Reference  Guo, Pleiss, Sun and Weinberger, ICML 2017

    Trap: on data that it was trained on a model is right too often, and T comes out too small; give
    held-out data. Where every answer in it is right T is the least value looked at.
    """

    score_of: Literal["msp", "entropy", "energy"] = "msp"
    rows: int = 20_000

    paper: ClassVar[Paper | None] = Paper(
        "On Calibration of Modern Neural Networks",
        "Guo, Pleiss, Sun and Weinberger",
        "ICML",
        2017,
        "https://arxiv.org/abs/1706.04599",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "C"

    def __post_init__(self) -> None:
        if self.score_of not in _SCORES:
            raise ContractError(
                f"detectors.temperature_scaling.score_of: {self.score_of!r} is none of "
                f"{sorted(_SCORES)}"
            )
        if self.rows < 1:
            raise ContractError(f"detectors.temperature_scaling.rows: {self.rows} is not positive")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"score_of": "entropy"}, {"score_of": "energy"})

    def reads(self) -> Reads:
        """Logits, and labels while learning."""
        return Reads(logits=True, labels=True)

    def learn(self, reference: Reference) -> State:
        """The temperature of at most `rows` rows, a uniform sample of them where there are more."""
        logits, labels = gather(reference, _labelled, self.rows)
        found = best_temperature(logits, labels)
        return {"temperature": torch.tensor(found, dtype=torch.float32, device=logits.device)}

    def check(self, state: State) -> None:
        """temperature ()."""
        if set(state) != {"temperature"}:
            raise StateError(
                f"temperature_scaling: state: expected temperature, found {sorted(state)}"
            )
        if state["temperature"].numel() != 1:
            shape = tuple(state["temperature"].shape)
            raise StateError(
                f"temperature_scaling: state 'temperature': expected (), found {shape}"
            )

    def score(self, acts: Activations, state: State) -> Tensor:
        """The chosen score of the logits at the learnt temperature."""
        return _SCORES[self.score_of](answer_of(two_sided(acts) / state["temperature"]))


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [0.05, 100] that maximises the likelihood of labels (N,) under softmax(logits / T).

    The negative log-likelihood is convex in b = 1 / T, with slope mean(E_p z - z_label) and
    curvature mean(Var_p z): Newton's method in float64, kept inside a bracket.
    """
    low, high = 1.0 / _WARMEST, 1.0 / _COLDEST
    b = 1.0
    for step in range(_STEPS):
        slope, curvature = _slope(logits, labels, b)
        if slope == 0.0 and curvature > 0.0:
            break
        # a flat end is one where every answer is right: the likelihood still rises
        low, high = (b, high) if slope <= 0.0 else (low, b)
        after = b - slope / curvature if curvature > 0.0 else math.inf
        # on the exponential flank of sure data Newton's steps are short
        if not low < after < high or step % 4 == 3:
            after = math.sqrt(low * high)
        if abs(after - b) <= _CLOSE * b or high - low <= _CLOSE * low:
            b = after
            break
        b = after
    return 1.0 / b


def _slope(logits: Tensor, labels: Tensor, b: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood by b."""
    slope = curvature = 0.0
    size = max(1, _ROWS_AT_ONCE // logits.shape[1])
    for start in range(0, len(logits), size):
        z, label = logits[start : start + size].double(), labels[start : start + size]
        z = z - z.amax(dim=1, keepdim=True)
        p = (z * b).softmax(dim=1)
        mean = (p * z).sum(dim=1)
        slope += float((mean - z.gather(1, label[:, None]).squeeze(1)).sum())
        curvature += float(((p * z.square()).sum(dim=1) - mean.square()).sum())
    return slope / len(logits), curvature / len(logits)


def _labelled(acts: Activations) -> tuple[Tensor, Tensor]:
    logits = two_sided(acts)
    if acts.labels is None:
        raise ContractError("temperature_scaling: the reference has no labels")
    labels = acts.labels
    known = (labels >= 0) & (labels < logits.shape[1])
    return logits[known], labels[known]
