"""Bits per character of a text under a small language model of the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.networks import Shapes
from oodmon.detectors.options import check_options
from oodmon.detectors.outliers import gather_outliers, is_outlier
from oodmon.detectors.reference import gather
from oodmon.detectors.training import Plan, train
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["LanguageModel", "next_logs"]

_UNKNOWN: Final = 0
_START: Final = 1
_SPECIAL: Final = 2
"""Symbols of the model's own: for ids that the reference never held, and before the first."""

_PAD: Final = -1
_BATCH: Final = 64
_CLIP: Final = 1.0
_OUTLIER_WEIGHT: Final = 0.5
"""Of the outliers in the loss (Hendrycks et al., ICLR 2019)."""

_OUTLIER_SHARE: Final = 0.5
_SLOWER: Final = 1.0 / 3.0
"""The epochs and the rate of Adam while outliers are shown, as a share of those before."""

_DROPOUT: Final = 0.01
"""Share of the symbols that are shown as unknown while learning, so that one has a meaning."""


@detectors.register("language_model")
@dataclass(frozen=True)
class LanguageModel(Detector):
    """Bits per symbol of a text under a recurrent language model trained on the reference.

    Reads      inputs: ids (B, T), whole numbers of any dtype; labels while learning where
               `outliers` is set
    Learns     symbols (V,): ids of the reference, in order; embedding.*, recurrent.*, output.*
    Score      "bits": -(1/T) sum_t log2 p(x_t | x_<t), >= 0; "flatness": minus the cross entropy
               of a uniform symbol, (1/T) sum_t mean_v log2 p(v | x_<t), <= 0
    Reference  Hendrycks et al., ICLR 2019, section 4.5

    Options: `pad`: an id that is no symbol and is left out wherever it stands; -1 for none that is
    not negative; `length`: only so many ids of a text are read; `symbols` V at most, the most
    frequent ones (a word model's rare words are unknown to it); `embedding` and `width` of the
    network; `epochs`, `rows`, `learning_rate`, `training_seconds` as in `rnd`; `outliers`:
    reference rows with the label -1 are known outliers, which after training are made to look flat;
    `statistic`.

    What holds no symbol cannot be scored: NaN. Short texts give noisy scores: from 32 characters
    on they are of use. A text that repeats itself scores low whatever it says; `statistic:
    flatness` is of use with outliers only.
    """

    statistic: Literal["bits", "flatness"] = "bits"
    pad: int = _PAD
    length: int = 256
    symbols: int = 256
    embedding: int = 64
    width: int = 160
    epochs: int = 6
    rows: int = 20_000
    learning_rate: float = 3e-3
    training_seconds: float = 600.0
    outliers: bool = False

    paper: ClassVar[Paper | None] = Paper(
        "Deep Anomaly Detection with Outlier Exposure",
        "Hendrycks, Mazeika and Dietterich",
        "ICLR",
        2019,
        "https://arxiv.org/abs/1812.04606",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "T networks"

    def __post_init__(self) -> None:
        if self.pad < _PAD:
            raise ContractError(f"detectors.language_model.pad: {self.pad} is below {_PAD}")
        check_options(self, unchecked=("pad",))

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        small = {"epochs": 2, "embedding": 4, "width": 8, "length": 24}
        return (small, {**small, "outliers": True})

    def reads(self) -> Reads:
        """The inputs, and labels where they mark outliers."""
        return Reads(inputs=True, labels=self.outliers)

    def learn(self, reference: Reference) -> State:
        """Count the symbols, then train the model to tell each from those before it."""
        # training makes gradients, whatever mode the caller is in
        with torch.inference_mode(mode=False), torch.no_grad():
            (ids,) = gather(reference, lambda acts: (self._learnt_from(acts),), self.rows)
            symbols = self._frequent(ids)
            draw = reference.generator()
            weights = {
                name: tensor.to(reference.device)
                for name, tensor in _initial(self._weights(len(symbols)), draw).items()
            }
            text = self._text(ids, symbols)
            held = text >= 0
            text = text[held.any(dim=1)][:, : int(held.sum(dim=1).max())]
            found = None
            if self.outliers:
                found = gather_outliers(reference, self._filled, self.rows, self.name)

            def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
                shown = text[rows]
                unknown = torch.rand(shown.shape, generator=draw).to(shown.device) < _DROPOUT
                return _nats(shown.masked_fill(unknown & (shown >= 0), _UNKNOWN), weights)

            plan = Plan(
                self.epochs,
                self.learning_rate,
                batch=_BATCH,
                clip=_CLIP,
                end=1.0 if found is None else 0.5,
                seconds=self.training_seconds,
            )
            learnt = train(weights, len(text), loss, plan, draw, reference, self.name)
            if found is not None and bool((_whole(found) >= 0).any()):
                strange = self._text(found, symbols)
                strange = strange[(strange >= 0).any(dim=1)]

                def flat(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
                    chosen = torch.randint(len(strange), (len(rows),), generator=draw)
                    other = strange[chosen.to(rows.device)]
                    evenly = _flatness(other, weights).neg()
                    return loss(weights, rows) + _OUTLIER_WEIGHT * evenly

                slower = Plan(
                    math.ceil(_OUTLIER_SHARE * self.epochs),
                    _SLOWER * self.learning_rate,
                    batch=_BATCH,
                    clip=_CLIP,
                    start=0.5,
                    seconds=self.training_seconds,
                )
                learnt = train(learnt, len(text), flat, slower, draw, reference, self.name)
            return {"symbols": symbols, **learnt}

    def check(self, state: State) -> None:
        """The symbols are in order, and the network fits them."""
        symbols = state.get("symbols")
        if symbols is None:
            raise StateError(f"language_model: state: expected 'symbols' among {sorted(state)}")
        if (
            symbols.ndim != 1
            or symbols.dtype != torch.int64
            or not 0 < len(symbols) <= self.symbols
        ):
            raise StateError(
                f"language_model: state 'symbols': expected int64 (1 to {self.symbols},), "
                f"found {symbols.dtype} {tuple(symbols.shape)}"
            )
        if bool((symbols.diff() <= 0).any()):
            raise StateError("language_model: state 'symbols': expected ids that ascend")
        expected = self._weights(len(symbols))
        if set(state) != {"symbols", *expected}:
            raise StateError(
                f"language_model: state: expected {sorted({'symbols', *expected})}, "
                f"found {sorted(state)}"
            )
        for name, shape in expected.items():
            if tuple(state[name].shape) != shape or state[name].dtype != torch.float32:
                raise StateError(
                    f"language_model: state {name!r}: expected float32 {shape}, "
                    f"found {state[name].dtype} {tuple(state[name].shape)}"
                )

    def score(self, acts: Activations, state: State) -> Tensor:
        """Bits per symbol, or flatness in bits; NaN where a row has no symbol, or a NaN."""
        ids = self._ids(acts)
        text = self._text(ids, state["symbols"])
        found = (_nats if self.statistic == "bits" else _flatness)(text, state) / math.log(2.0)
        if ids.is_floating_point():
            found = found.masked_fill(ids.isnan().any(dim=1), math.nan)
        return found

    def _weights(self, symbols: int) -> Shapes:
        width = self.width
        return {
            "embedding.weight": (symbols + _SPECIAL, self.embedding),
            "recurrent.input.weight": (3 * width, self.embedding),
            "recurrent.weight": (3 * width, width),
            "recurrent.input.bias": (3 * width,),
            "recurrent.bias": (3 * width,),
            # one for what is unknown; the start never comes again
            "output.weight": (symbols + 1, width),
            "output.bias": (symbols + 1,),
        }

    def _ids(self, acts: Activations) -> Tensor:
        """(B, at most `length`); floating where the inputs are, so that a NaN is still seen."""
        ids = acts.require_inputs()
        if ids.ndim < 2:
            raise ContractError(
                f"language_model: expected ids (B, T) as inputs, found {tuple(ids.shape)}"
            )
        ids = ids.reshape(len(ids), math.prod(ids.shape[1:]))[:, : self.length]
        return ids if ids.is_floating_point() else ids.long()

    def _filled(self, acts: Activations) -> Tensor:
        """Ids (B, length), filled up, because batches may differ in their T."""
        ids = self._ids(acts)
        return functional.pad(ids, (0, self.length - ids.shape[1]), value=_PAD)

    def _learnt_from(self, acts: Activations) -> Tensor:
        ids = self._filled(acts)
        return ids[~is_outlier(acts, self.name)] if self.outliers else ids

    def _frequent(self, ids: Tensor) -> Tensor:
        ids = _whole(ids)
        values, counts = torch.unique(ids[~self._left_out(ids)], return_counts=True)
        if not len(values):
            raise ContractError("language_model: the reference holds no symbol")
        most = counts.argsort(descending=True, stable=True)[: self.symbols]
        found: Tensor = values[most].sort().values
        return found

    def _left_out(self, ids: Tensor) -> Tensor:
        return (ids < 0) | (ids == self.pad)

    def _text(self, ids: Tensor, symbols: Tensor) -> Tensor:
        """Numbers of the model's own (B, T): symbols, then -1 for what is left out."""
        ids = _whole(ids)
        # searchsorted warns about strided values, and copies them
        place = torch.searchsorted(symbols, ids.contiguous()).clamp(max=len(symbols) - 1)
        text = torch.where(symbols[place] == ids, place + _SPECIAL, _UNKNOWN)
        absent = self._left_out(ids)
        order = absent.to(torch.uint8).argsort(dim=1, stable=True)
        return text.masked_fill(absent, _PAD).gather(1, order)


def next_logs(text: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Log-probabilities (B, T, V + 1) of each symbol from those before it: unknown, then known."""
    before = functional.pad(text[:, :-1], (1, 0), value=_START).clamp(min=0)
    given = functional.embedding(before, weights["embedding.weight"])
    width = weights["recurrent.weight"].shape[1]
    parts = ("input.weight", "weight", "input.bias", "bias")
    hidden, _ = torch.gru(
        given,
        given.new_zeros((1, len(text), width)),
        [weights[f"recurrent.{part}"] for part in parts],
        has_biases=True,
        num_layers=1,
        dropout=0.0,
        train=torch.is_grad_enabled(),
        bidirectional=False,
        batch_first=True,
    )
    logits = functional.linear(hidden, weights["output.weight"], weights["output.bias"])
    return logits.log_softmax(dim=2)


def _nats(text: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """-log p a symbol, (B,); NaN where there is none."""
    # symbols come after the two special numbers, and after the one unknown among the outputs
    aim = (text - 1).clamp(min=_UNKNOWN)
    logs = next_logs(text, weights).gather(2, aim.unsqueeze(2)).squeeze(2)
    return _mean(-logs, text)


def _flatness(text: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Mean log-probability of all symbols, over a text (B,); NaN where there is none."""
    return _mean(next_logs(text, weights).mean(dim=2), text)


def _mean(values: Tensor, text: Tensor) -> Tensor:
    there = (text >= 0).to(values.dtype)
    return (values * there).sum(dim=1) / there.sum(dim=1)


def _whole(ids: Tensor) -> Tensor:
    """As int64; floating ids are rounded, because some runtimes carry nothing else."""
    if not ids.is_floating_point():
        return ids.long()
    # what is far out of range has no int64; no vocabulary is so large
    return ids.float().nan_to_num(nan=_PAD).round().clamp(-(2.0**30), 2.0**30).long()


def _initial(shapes: Shapes, draw: torch.Generator) -> dict[str, Tensor]:
    """Within ±1/√width, as recurrent networks start; embeddings are normal."""
    bound = 1.0 / math.sqrt(shapes["recurrent.weight"][1])
    return {
        name: torch.randn(shape, generator=draw)
        if name == "embedding.weight"
        else (2.0 * torch.rand(shape, generator=draw) - 1.0) * bound
        for name, shape in shapes.items()
    }
