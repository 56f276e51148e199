"""The probability that the model's answer is wrong: accuracy can be estimated without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.logits import log_odds, two_sided
from oodmon.detectors.reference import gather
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["ExpectedError"]

_KINDS: Final = ("calibrated", "threshold")
_LEAST_SLOPE: Final = 0.05
"""Where doubt says nothing about errors, scores must still not fall as it rises."""
_SUREST: Final = 60.0
"""Log odds beyond this tell no more: the error is below 1e-26 there."""
_STEPS: Final = 100
_CLOSE: Final = 1e-10
_PRIOR: Final = 1.0
"""Weight of the prior (slope 1, offset 0: the softmax taken at its word), in squared logits."""


@detectors.register("expected_error")
@dataclass(frozen=True)
class ExpectedError(Detector):
    """Calibrated probability of a wrong answer; one minus its mean is the estimated accuracy.

    Reads      logits (B, C); labels while learning
    Options    kind "calibrated" or "threshold"; rows: reference rows used
    Learns     "calibrated": slope () and offset (), "threshold": threshold ()
    Score      with u = log((1 - p) / p), p the largest softmax probability;
               "calibrated": sigmoid(slope u + offset), in (0, 1);
               "threshold": 1 where u > threshold, else 0
    Reference  Garg, Balakrishnan, Lipton, Neyshabur and Sedghi, ICLR 2022 (threshold, section 4);
               calibrated: logistic calibration (Platt 1999) of the log odds

    "calibrated" is what NannyML calls CBPE: slope and offset maximise the likelihood of right and
    wrong answers, so on the data that it learnt from the mean of the score is the error rate.
    "threshold" is average thresholded confidence (ATC): as many learnt samples are above the
    threshold as are wrong. The daemon takes the score for what it is: windows then hold the sum of
    expected errors, and the estimated accuracy is published, stored and told in alerts.

    Trap: both suppose that doubt means the same after a change as before. Where it does they follow
    the accuracy under covariate drift. They are blind to concept drift (other labels for the same
    inputs) and to inputs on which the model is wrong and sure. Estimates of several changes differ
    in which is nearer; labels that come late tell.

    Trap: give held-out labelled data. On data that it was trained on a model is right too often.
    """

    kind: Literal["calibrated", "threshold"] = "calibrated"
    rows: int = 50_000

    paper: ClassVar[Paper | None] = Paper(
        "Leveraging Unlabeled Data to Predict Out-of-Distribution Performance",
        "Garg, Balakrishnan, Lipton, Neyshabur and Sedghi",
        "ICLR",
        2022,
        "https://arxiv.org/abs/2201.04234",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "C"
    measures: ClassVar[str] = "expected_error"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ContractError(
                f"detectors.expected_error.kind: {self.kind!r} is none of {', '.join(_KINDS)}"
            )
        if self.rows < 1:
            raise ContractError(f"detectors.expected_error.rows: {self.rows} is not positive")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"kind": "threshold"})

    def reads(self) -> Reads:
        """Logits, and labels while learning."""
        return Reads(logits=True, labels=True)

    def learn(self, reference: Reference) -> State:
        """From at most `rows` rows, a uniform sample of them where there are more."""
        doubt, wrong = gather(reference, _answers, self.rows)
        device = doubt.device
        found = (
            dict(zip(("slope", "offset"), _logistic(doubt, wrong), strict=True))
            if self.kind == "calibrated"
            else {"threshold": _threshold(doubt, int(wrong.sum()))}
        )
        return {
            name: torch.tensor(value, dtype=torch.float64, device=device)
            for name, value in found.items()
        }

    def check(self, state: State) -> None:
        """slope () and offset (), or threshold ()."""
        wanted = {"slope", "offset"} if self.kind == "calibrated" else {"threshold"}
        if set(state) != wanted:
            raise StateError(
                f"expected_error: state: expected {sorted(wanted)}, found {sorted(state)}"
            )
        for name, tensor in state.items():
            if tensor.numel() != 1:
                raise StateError(
                    f"expected_error: state {name!r}: expected (), found {tuple(tensor.shape)}"
                )

    def score(self, acts: Activations, state: State) -> Tensor:
        """The probability of a wrong answer, (B,) in [0, 1]."""
        doubt = _doubt(acts)
        if self.kind == "calibrated":
            return torch.sigmoid(doubt * state["slope"] + state["offset"])
        return torch.where(doubt.isnan(), doubt, (doubt > state["threshold"]).to(doubt.dtype))


def _doubt(acts: Activations) -> Tensor:
    """log((1 - p) / p), float64 (B,), within what tells."""
    return log_odds(acts).double().clamp(-_SUREST, _SUREST)


def _answers(acts: Activations) -> tuple[Tensor, Tensor]:
    """Doubt (B,) and whether the answer is wrong (B,), of rows with a known label."""
    logits = two_sided(acts)
    if acts.labels is None:
        raise ContractError("expected_error: the reference has no labels")
    known = (acts.labels >= 0) & (acts.labels < logits.shape[1])
    wrong = logits.argmax(dim=1) != acts.labels
    return _doubt(acts)[known], wrong[known]


def _logistic(doubt: Tensor, wrong: Tensor) -> tuple[float, float]:
    """Slope >= 0.05 and offset of P(wrong) = sigmoid(slope u + offset), by Newton's method.

    The loss is convex; the prior makes it strictly so where nothing or everything is wrong.
    """
    target = wrong.double()
    slope, offset = _newton(doubt, target, free_slope=True)
    if slope < _LEAST_SLOPE:
        slope, offset = _newton(doubt, target, free_slope=False)
    return slope, offset


def _newton(doubt: Tensor, target: Tensor, *, free_slope: bool) -> tuple[float, float]:
    design = torch.stack([doubt, torch.ones_like(doubt)], dim=1)
    prior = torch.tensor([1.0, 0.0], dtype=doubt.dtype, device=doubt.device)
    weights = prior if free_slope else prior * _LEAST_SLOPE
    moves = torch.tensor([float(free_slope), 1.0], dtype=doubt.dtype, device=doubt.device)
    ridge = _PRIOR * torch.eye(2, dtype=doubt.dtype, device=doubt.device)

    def loss(at: Tensor) -> float:
        z = design @ at
        misfit = functional.softplus(z).sum() - target @ z
        return float(misfit + 0.5 * _PRIOR * (at - prior).square().sum())

    now = loss(weights)
    for _ in range(_STEPS):
        p = torch.sigmoid(design @ weights)
        slope = (design.T @ (p - target) + _PRIOR * (weights - prior)) * moves
        curve = design.T @ (design * (p * (1.0 - p))[:, None]) + ridge
        # a slope that is held has no part in the step
        curve = curve * moves[:, None] * moves[None, :] + torch.diag(1.0 - moves)
        step = torch.linalg.solve(curve, slope)
        size = 1.0
        while size > _CLOSE and (after := loss(weights - size * step)) > now:
            size /= 2.0
        if size <= _CLOSE or float((size * step).abs().max()) <= _CLOSE:
            break
        weights, now = weights - size * step, after
    return float(weights[0]), float(weights[1])


def _threshold(doubt: Tensor, errors: int) -> float:
    """So that `errors` of the samples are above it, where no two are alike: between two of them."""
    ordered = doubt.sort(descending=True).values
    if errors == 0:
        return float(ordered[0])
    if errors == len(ordered):
        return float(ordered[-1]) - 1.0
    return float((ordered[errors - 1] + ordered[errors]) / 2.0)
