"""Distance to the centre of a learnt hypersphere: Deep SVDD, and Deep SAD with known outliers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from oodmon.contracts import Paper, Reads, Reference, Stability, State
from oodmon.detectors.networks import (
    Shapes,
    decode,
    decoder_shapes,
    encode,
    encoder_shapes,
    initial,
)
from oodmon.detectors.outliers import gather_outliers, is_outlier
from oodmon.detectors.training import BATCH, Plan, TrainedAnywhere, train, whiten_
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["DeepSAD", "DeepSVDD", "centre_of", "check_spread"]

_AWAY: Final = 0.1
"""Each coordinate of the centre is at least so far from 0: the origin is where all collapse."""

_SPREAD: Final = 1e-8
"""An embedding of a smaller variance than this has collapsed."""

_NEAREST: Final = 1e-6
"""Added to an outlier's squared distance before it is inverted (the authors')."""

_WEIGHT_DECAY: Final = 5e-7
_CLIP: Final = 1.0
"""Of the gradient's norm: an outlier that lies at the centre pushes without bound."""

_PATIENCE: Final = 5


@detectors.register("deep_svdd")
@dataclass(frozen=True)
class DeepSVDD(TrainedAnywhere):
    """Squared distance of a learnt embedding from the centre of the reference.

    An autoencoder is trained first; its encoder, which has no bias anywhere, is then trained to
    draw the reference together around the mean embedding.

    Reads      on "features": layers[layer] (B, D), maps (B, C, H, W) averaged over their places;
               on "inputs": inputs (B, C, H, W) or (B, H, W), or vectors (B, D)
    Learns     mean, scale of each element; encoder.*: weights; centre (outputs,)
    Score      |encoder(x) - centre|², >= 0
    Reference  Ruff et al., ICML 2018

    Options: `outputs` of the encoder; `pretraining` epochs of the autoencoder; `epochs` of the
    hypersphere; `width`, `rows`, `learning_rate`, `training_seconds`, `side`, `on` and `layer` as
    in `rnd`. An encoder that maps everything to one point would find nothing: learning then ends in
    an error.
    """

    epochs: int = 20
    outputs: int = 32
    pretraining: int = 10

    may_be_zero: ClassVar[tuple[str, ...]] = ("pretraining",)
    paper: ClassVar[Paper | None] = Paper(
        "Deep One-Class Classification",
        "Ruff, Vandermeulen, Görnitz, Deecke, Siddiqui, Binder, Müller and Kloft",
        "ICML",
        2018,
        "http://proceedings.mlr.press/v80/ruff18a.html",
    )
    stability: ClassVar[Stability] = "beta"

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return (
            {"epochs": 2, "pretraining": 2, "outputs": 8},
            {"on": "inputs", "epochs": 2, "pretraining": 1, "width": 4},
        )

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        hidden = [] if len(row) == 3 else [8 * self.width]
        return encoder_shapes("encoder", row, self.width, hidden, self.outputs, bias=False)

    def _kept(self, row: tuple[int, ...]) -> Shapes:
        return {**self._weights(row), "centre": (self.outputs,)}

    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        white = whiten_(values, state)
        encoder = {key: state[key] for key in state if key.startswith("encoder.")}
        if self.pretraining:
            encoder = self._pretrained(white, encoder, draw, reference)
        centre = centre_of(_embedding(white, encoder))
        inside = len(white)
        outliers = self._outliers(reference)
        if outliers is not None:
            white = torch.cat([white, whiten_(outliers, state)])

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            distance = (encode(white[rows], weights, "encoder") - centre).square().sum(dim=1)
            away = self._weight() / (distance + _NEAREST)
            return torch.where(rows < inside, distance, away)

        plan = Plan(
            self.epochs,
            self.learning_rate,
            clip=_CLIP,
            decay=_WEIGHT_DECAY,
            patience=_PATIENCE,
            start=0.5 if self.pretraining else 0.0,
            seconds=self.training_seconds,
        )
        learnt = train(encoder, len(white), loss, plan, draw, reference, self.name)
        check_spread(_embedding(white[:inside], learnt), self.name)
        return {**state, **learnt, "centre": centre}

    def _pretrained(
        self,
        white: Tensor,
        encoder: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> dict[str, Tensor]:
        """The encoder of an autoencoder."""
        row = tuple(white.shape[1:])
        hidden = [] if len(row) == 3 else [8 * self.width]
        shapes = decoder_shapes("decoder", row, self.width, hidden, self.outputs)
        decoder = {name: part.to(white.device) for name, part in initial(shapes, draw).items()}

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            batch = white[rows]
            back = decode(encode(batch, weights, "encoder"), weights, "decoder", row)
            return (back - batch).square().flatten(1).mean(dim=1)

        plan = Plan(self.pretraining, self.learning_rate, end=0.5, seconds=self.training_seconds)
        learnt = train({**encoder, **decoder}, len(white), loss, plan, draw, reference, self.name)
        return {name: learnt[name] for name in encoder}

    def _weight(self) -> float:
        """Of an outlier in the loss."""
        return 1.0

    def _outliers(self, reference: Reference) -> Tensor | None:
        """Rows that are known to be outliers; none here."""
        del reference
        return None

    def _measure(self, white: Tensor, state: State) -> Tensor:
        return (encode(white, state, "encoder") - state["centre"]).square_().sum(dim=1)


@detectors.register("deep_sad")
@dataclass(frozen=True)
class DeepSAD(DeepSVDD):
    """Deep SVDD that is also told of some outliers: they are pushed away from the centre.

    A reference row with the label -1 is a known outlier (an alarm that a person confirmed, say);
    the others count as in-distribution, whatever their class. Without any -1 it is `deep_svdd`.
    The whitening and the centre come from in-distribution rows alone.

    Reads      as `deep_svdd`; labels while learning
    Learns     mean, scale of each element; encoder.*: weights; centre (outputs,)
    Score      |encoder(x) - centre|², >= 0
    Reference  Ruff et al., ICLR 2020, equation 7

    Options: `outlier_weight` η of a known outlier beside another row; `outputs`, `pretraining`,
    `width`, `epochs`, `rows`, `learning_rate`, `training_seconds`, `side`, `on` and `layer` as in
    `deep_svdd`. Samples
    that are used as outliers here must not be used to judge it.
    """

    outlier_weight: float = 1.0

    outliers: ClassVar[bool] = True
    paper: ClassVar[Paper | None] = Paper(
        "Deep Semi-Supervised Anomaly Detection",
        "Ruff, Vandermeulen, Görnitz, Binder, Müller, Müller and Kloft",
        "ICLR",
        2020,
        "https://arxiv.org/abs/1906.02694",
    )

    def reads(self) -> Reads:
        """What `deep_svdd` reads, and labels."""
        reads = super().reads()
        return Reads(layers=reads.layers, inputs=reads.inputs, labels=True)

    def _learnt_from(self, acts: Activations) -> Tensor:
        return self._values(acts)[~is_outlier(acts, self.name)]

    def _weight(self) -> float:
        return self.outlier_weight

    def _outliers(self, reference: Reference) -> Tensor | None:
        return gather_outliers(reference, self._values, self.rows, self.name)


def centre_of(embedding: Tensor) -> Tensor:
    """Mean embedding, with every coordinate at least `_AWAY` from 0, on the side where it is."""
    centre = embedding.mean(dim=0)
    moved = torch.where(centre < 0.0, -_AWAY, _AWAY).to(centre)
    return torch.where(centre.abs() < _AWAY, moved, centre)


def check_spread(embedding: Tensor, name: str) -> None:
    """`ContractError` where the in-distribution embeddings have collapsed to a point."""
    spread = float(embedding.var(dim=0, correction=0).mean())
    if not spread >= _SPREAD:
        raise ContractError(
            f"{name}: the embedding has collapsed to a point (variance {spread:.2g}); it cannot "
            "tell samples apart: fewer epochs, a lower learning_rate, or a reference that varies"
        )


def _embedding(white: Tensor, encoder: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([encode(part, encoder, "encoder") for part in torch.split(white, BATCH)])
