"""How badly samples come back through a bottleneck: autoencoders, with memory, with a codebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional

from oodmon.contracts import Paper, Reference, Stability, State
from oodmon.detectors.networks import (
    Shapes,
    convolution_shapes,
    decode,
    decoder_shapes,
    encode,
    encoder_shapes,
    grow,
    shrink,
)
from oodmon.detectors.training import Plan, Trained, TrainedAnywhere, train, whiten_
from oodmon.registry import detectors

__all__ = ["VQVAE", "Autoencoder", "MemoryAutoencoder", "address", "nearest"]

_SPARSE: Final = 2e-4
"""Weight of the entropy of a memory's addresses (Gong et al., section 3.4)."""

_TINY: Final = 1e-12
_COMMITMENT: Final = 0.25
"""Weight β of the encoder's distance from its code (van den Oord et al., equation 3)."""

_PATIENCE: Final = 3


@detectors.register("autoencoder")
@dataclass(frozen=True)
class Autoencoder(TrainedAnywhere):
    """Mean squared error of a trained autoencoder.

    Reads      on "features": layers[layer] (B, D), maps (B, C, H, W) averaged over their places;
               on "inputs": inputs (B, C, H, W) or (B, H, W), or vectors (B, D)
    Learns     mean, scale of each element (of each channel, for images); encoder.*, decoder.*
    Score      mean over the elements of (decoder(encoder(x)) - x)², >= 0, in units of scale²
    Reference  Sakurada and Yairi, MLSDA 2014

    Options: `code` values between encoder and decoder; `width`, `epochs`, `rows`, `learning_rate`,
    `training_seconds`, `side`, `on` and `layer` as in `rnd`. On images it also brings back what is
    simpler than the reference (blurred, darker, flat images), which then scores low: use it on
    features, or beside a detector that sees those.
    """

    code: int = 16

    each_element: ClassVar[bool] = False
    paper: ClassVar[Paper | None] = Paper(
        "Anomaly Detection Using Autoencoders with Nonlinear Dimensionality Reduction",
        "Sakurada and Yairi",
        "MLSDA",
        2014,
        "https://doi.org/10.1145/2689746.2689747",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "2 networks"

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return (
            {"epochs": 3, "code": 4},
            {"on": "inputs", "epochs": 2, "width": 4, "code": 4},
        )

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        hidden = [8 * self.width]
        return {
            **encoder_shapes("encoder", row, self.width, hidden, self.code),
            **decoder_shapes("decoder", row, self.width, hidden, self.code),
        }

    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        white = whiten_(values, state)
        row = tuple(white.shape[1:])

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            batch = white[rows]
            code, price = self._squeezed(encode(batch, weights, "encoder"), weights)
            return _error(decode(code, weights, "decoder", row), batch) + price

        weights = {key: state[key] for key in state if key not in ("mean", "scale")}
        plan = Plan(
            self.epochs, self.learning_rate, patience=_PATIENCE, seconds=self.training_seconds
        )
        learnt = train(weights, len(white), loss, plan, draw, reference, self.name)
        return {**state, **learnt}

    def _measure(self, white: Tensor, state: State) -> Tensor:
        code, _ = self._squeezed(encode(white, state, "encoder"), state)
        return _error(decode(code, state, "decoder", tuple(white.shape[1:])), white)

    def _squeezed(self, code: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the decoder gets, and what that costs beside the error."""
        del state
        return code, code.new_zeros(())


@detectors.register("memory_autoencoder")
@dataclass(frozen=True)
class MemoryAutoencoder(Autoencoder):
    """Mean squared error of an autoencoder that can only mix what it has in memory.

    A code is replaced by a sparse mixture of learnt slots, so that the decoder cannot bring back
    what the reference never looked like, even where it is simpler.

    Reads      as `autoencoder`
    Learns     mean, scale of each element (of each channel, for images); encoder.*, decoder.*;
               memory.weight (slots, code)
    Score      mean over the elements of (decoder(mixture(encoder(x))) - x)², >= 0
    Reference  Gong et al., ICCV 2019

    Options: `slots` N; `shrinkage` λ: weights of the mixture below it become 0; 0 takes 1/N (the
    paper advises 1/N to 3/N); `code`, `width`, `epochs`, `rows`, `learning_rate`,
    `training_seconds`, `side`, `on` and `layer` as in `autoencoder`.
    """

    slots: int = 100
    shrinkage: float = 0.0

    may_be_zero: ClassVar[tuple[str, ...]] = ("shrinkage",)
    paper: ClassVar[Paper | None] = Paper(
        "Memorizing Normality to Detect Anomaly: Memory-augmented Deep Autoencoder",
        "Gong, Liu, Le, Saha, Mansour, Venkatesh and van den Hengel",
        "ICCV",
        2019,
        "https://arxiv.org/abs/1904.02639",
    )

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        return {**super()._weights(row), "memory.weight": (self.slots, self.code)}

    def _squeezed(self, code: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        memory = state["memory.weight"]
        weight = address(code, memory, self.shrinkage or 1.0 / self.slots)
        return weight @ memory, -_SPARSE * (weight * (weight + _TINY).log()).sum(dim=1)


@detectors.register("vq_vae")
@dataclass(frozen=True)
class VQVAE(Trained):
    """Reconstruction error of images through a codebook: the likelihood baseline, with its flaw.

    Reads      inputs (B, C, H, W) or (B, H, W)
    Learns     mean, scale of each channel; encoder.*, decoder.*; codebook.weight (codes, depth)
    Score      mean (decoder(q) - x)² + β mean (encoder(x) - q)², q the nearest codes, >= 0
    Reference  van den Oord et al., NeurIPS 2017, as in Choi and Chung, ICLR 2020

    Options: `codes` M and their `depth`; `width`, `epochs`, `rows`, `learning_rate`,
    `training_seconds` and `side` as in `rnd`. It prefers blurred images to the reference's own (so
    do all likelihoods of pixels): see `svd_rnd`. It is here to be compared with.
    """

    codes: int = 256
    depth: int = 32

    each_element: ClassVar[bool] = False
    paper: ClassVar[Paper | None] = Paper(
        "Neural Discrete Representation Learning",
        "van den Oord, Vinyals and Kavukcuoglu",
        "NeurIPS",
        2017,
        "https://arxiv.org/abs/1711.00937",
    )
    stability: ClassVar[Stability] = "experimental"
    cost: ClassVar[str] = "2 networks"

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({"epochs": 2, "width": 4, "codes": 16, "depth": 4},)

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        width = self.width
        return {
            **convolution_shapes("encoder", (row[0], width, 2 * width, 2 * width)),
            "encoder.last.weight": (self.depth, 2 * width, 1, 1),
            "decoder.first.weight": (2 * width, self.depth, 1, 1),
            **convolution_shapes("decoder", (2 * width, width, width, row[0])),
            "codebook.weight": (self.codes, self.depth),
        }

    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        white = whiten_(values, state)
        row = tuple(white.shape[1:])
        weights = {key: state[key] for key in state if key not in ("mean", "scale")}
        weights["codebook.weight"] = self._first_codes(white, weights, draw)

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            batch = white[rows]
            found = _latent(batch, weights)
            code = _coded(found, weights["codebook.weight"])
            through = found + (code - found).detach()
            away = _error(code, found.detach()) + _COMMITMENT * _error(found, code.detach())
            return _error(_brought_back(through, weights, row), batch) + away

        # the loss rises while the latents find their scale, so a rise is no reason to stop
        plan = Plan(
            self.epochs, self.learning_rate, patience=self.epochs, seconds=self.training_seconds
        )
        return {**state, **train(weights, len(white), loss, plan, draw, reference, self.name)}

    def _first_codes(
        self, white: Tensor, weights: Mapping[str, Tensor], draw: torch.Generator
    ) -> Tensor:
        """Codes start on latents of the reference, so that none is dead from the beginning."""
        chosen = torch.randint(len(white), (self.codes,), generator=draw).to(white.device)
        latent = _latent(white[chosen], weights).flatten(2)
        place = torch.randint(latent.shape[2], (self.codes,), generator=draw).to(white.device)
        return latent[torch.arange(self.codes, device=white.device), :, place]

    def _measure(self, white: Tensor, state: State) -> Tensor:
        found = _latent(white, state)
        code = _coded(found, state["codebook.weight"])
        back = _brought_back(code, state, tuple(white.shape[1:]))
        return _error(back, white) + _COMMITMENT * _error(found, code)


def address(code: Tensor, memory: Tensor, shrinkage: float) -> Tensor:
    """Weights (B, N) of the slots (N, D) for codes (B, D): softmax of the cosines, then sparse.

    Weights below `shrinkage` become 0 and the others add to 1 (equations 4, 5 and 7).
    """
    cosine = functional.normalize(code, dim=1) @ functional.normalize(memory, dim=1).T
    weight = cosine.softmax(dim=1)
    over = weight - shrinkage
    weight = functional.relu(over) * weight / (over.abs() + _TINY)
    return weight / weight.sum(dim=1, keepdim=True).clamp(min=_TINY)


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Number (n,) of the code (M, D) that is nearest to each vector (n, D)."""
    return (codebook.square().sum(dim=1) - 2.0 * vectors @ codebook.T).argmin(dim=1)


def _coded(latent: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codes (B, D, h, w) of latents (B, D, h, w)."""
    vectors = latent.movedim(1, 3)
    found = nearest(vectors.flatten(0, 2), codebook)
    if torch.is_grad_enabled():
        # a product, because the gradient of an indexing may add in any order on CUDA
        chosen = functional.one_hot(found, len(codebook)).to(codebook.dtype) @ codebook
    else:
        chosen = codebook[found]
    return chosen.reshape(vectors.shape).movedim(3, 1)


def _latent(white: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    return functional.conv2d(shrink(white, state, "encoder"), state["encoder.last.weight"])


def _brought_back(code: Tensor, state: Mapping[str, Tensor], row: Sequence[int]) -> Tensor:
    maps = functional.leaky_relu(functional.conv2d(code, state["decoder.first.weight"]))
    return grow(maps, state, "decoder", row)


def _error(found: Tensor, expected: Tensor) -> Tensor:
    """Mean squared difference of each row, (B,)."""
    return (found - expected).square().flatten(1).mean(dim=1)
