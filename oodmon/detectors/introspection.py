"""A small network that tells right answers from wrong ones by the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.features import LOGITS, SOFTMAX, features
from oodmon.detectors.reference import gather
from oodmon.detectors.states import expect
from oodmon.detectors.training import Plan, train
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["Introspection"]

_FEWEST: Final = 32
"""So many wrong rows are learnt from at least; what is missing is made up."""

_RATE: Final = 1e-3
_FLOOR: Final = 1e-6
"""A coordinate's standard deviation is at least this share of the largest one."""


@detectors.register("introspection")
@dataclass(frozen=True)
class Introspection(Detector):
    """How much the logits look like those of wrong answers and known outliers.

    Reads      logits (B, C), and their labels while learning
    Options    space: "logits" or their "softmax"; width of both hidden layers; epochs over at most
               `rows` reference rows
    Learns     mean and scale (C,), weights of a network C → width → width → 1
    Score      log-odds of "wrong", unbounded
    Reference  Aigrain and Detyniecki, 2020 (openreview Byx55pVKDB), "introspection" of logits

    Wrong are rows whose largest logit is not at the label, and rows with the label -1: known
    outliers. Both classes weigh the same. Where fewer than 32 are wrong, rows are made up whose
    logits come from different samples. Trap: without outliers it learns what errors look like, not
    what is strange; on data that the model was trained on there are few errors.
    """

    space: Literal["logits", "softmax"] = "logits"
    width: int = 64
    epochs: int = 20
    rows: int = 20_000

    outliers: ClassVar[bool] = True
    paper: ClassVar[Paper | None] = Paper(
        "How the Softmax Activation Hinders the Detection of Adversarial and "
        "Out-of-Distribution Examples in Neural Networks",
        "Aigrain and Detyniecki",
        "openreview",
        2020,
        "https://openreview.net/forum?id=Byx55pVKDB",
    )
    stability: ClassVar[Stability] = "experimental"
    cost: ClassVar[str] = "network"

    def __post_init__(self) -> None:
        if self.space not in (LOGITS, SOFTMAX):
            raise ContractError(
                f"detectors.introspection.space: {self.space!r} is neither 'logits' nor 'softmax'"
            )
        if min(self.width, self.epochs, self.rows) < 1:
            raise ContractError("detectors.introspection: width, epochs and rows must be positive")

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"space": "softmax", "width": 16})

    def reads(self) -> Reads:
        """Logits, and labels while learning."""
        return Reads(logits=True, labels=True)

    def learn(self, reference: Reference) -> State:
        """Adam on the cross-entropy, both classes weighing the same."""
        with torch.inference_mode(mode=False), torch.no_grad():
            rows, labels = gather(reference, self._labelled, self.rows)
            draw = reference.generator()
            wrong = (rows.argmax(dim=1) != labels).to(rows.dtype)
            missing = _FEWEST - int(wrong.sum())
            if missing > 0:
                made = _mixed(rows, max(missing, len(rows) // 2), draw)
                rows = torch.cat([rows, made])
                wrong = torch.cat([wrong, wrong.new_ones(len(made))])
            mean, scale = rows.mean(dim=0), rows.std(dim=0, correction=0)
            scale = scale.clamp(min=max(_FLOOR * float(scale.max()), torch.finfo(rows.dtype).tiny))
            known = (rows - mean) / scale
            share = wrong.mean()
            balance = torch.where(wrong > 0, 0.5 / share, 0.5 / (1.0 - share).clamp(min=1e-9))

            def loss(weights: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
                odds = _forward(known[chosen], weights)
                each = functional.binary_cross_entropy_with_logits(
                    odds, wrong[chosen], reduction="none"
                )
                return each * balance[chosen]

            plan = Plan(epochs=self.epochs, rate=_RATE)
            start = self._start(rows.shape[1], draw, rows.device)
            found = train(start, len(rows), loss, plan, draw, reference, self.name)
        return {**found, "mean": mean, "scale": scale}

    def check(self, state: State) -> None:
        """The network's shapes, mean and scale."""
        expect(
            self.name,
            state,
            {
                "mean": "C",
                "scale": "C",
                "first.weight": f"{self.width} C",
                "first.bias": f"{self.width}",
                "second.weight": f"{self.width} {self.width}",
                "second.bias": f"{self.width}",
                "last.weight": f"1 {self.width}",
                "last.bias": "1",
            },
        )

    def score(self, acts: Activations, state: State) -> Tensor:
        """The network's log-odds."""
        rows, mean = features(acts, self.space), state["mean"]
        if rows.shape[1] != len(mean):
            raise ContractError(
                f"introspection: logits: learnt with {len(mean)} classes, found {rows.shape[1]}"
            )
        # a logit of -inf rules a class out: any value far below the others says the same
        rows = rows.clamp(min=torch.finfo(rows.dtype).min / 1e20)
        return _forward((rows - mean) / state["scale"], state)

    def _labelled(self, acts: Activations) -> tuple[Tensor, Tensor]:
        if acts.labels is None:
            raise ContractError("introspection: the reference has no labels")
        return features(acts, self.space), acts.labels

    def _start(self, classes: int, draw: torch.Generator, device: torch.device) -> State:
        """He's initialisation."""
        shapes = (("first", self.width, classes), ("second", self.width, self.width))
        weights = {}
        for name, out, fan_in in (*shapes, ("last", 1, self.width)):
            drawn = torch.randn((out, fan_in), generator=draw) * (2.0 / fan_in) ** 0.5
            weights[f"{name}.weight"] = drawn.to(device)
            weights[f"{name}.bias"] = torch.zeros(out, device=device)
        return weights


def _forward(rows: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    for name in ("first", "second"):
        rows = functional.linear(rows, weights[f"{name}.weight"], weights[f"{name}.bias"]).relu()
    return functional.linear(rows, weights["last.weight"], weights["last.bias"]).squeeze(1)


def _mixed(rows: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Each coordinate from a row of its own: the same values, but nothing that holds together."""
    chosen = torch.randint(len(rows), (count, rows.shape[1]), generator=draw).to(rows.device)
    return rows.gather(0, chosen)
