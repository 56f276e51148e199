"""Random network distillation that was also shown altered copies: blurred, turned, moved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from oodmon.contracts import Paper, Reference, Stability, State
from oodmon.detectors.blurs import blur_of, just_visible
from oodmon.detectors.networks import Shapes, encode, initial
from oodmon.detectors.rnd import error, network_shapes
from oodmon.detectors.training import BATCH, Plan, Trained, train, whiten
from oodmon.detectors.transformations import shifted, shifts
from oodmon.errors import ContractError
from oodmon.registry import detectors

__all__ = ["SVDRND"]

Change = Callable[[Tensor], Tensor]


@detectors.register("svd_rnd")
@dataclass(frozen=True)
class SVDRND(Trained):
    """Error of a predictor of one random network on sharp images and of others on blurred ones.

    The predictor is trained to give the output of the target g_0 on the reference, and that of
    another random target g_i on each kind of altered copy, so that what is blurred scores high.
    `rnd` on inputs cannot see it: there, a blurred image is easier to predict than a sharp one.

    Reads      inputs (B, C, H, W) or (B, H, W)
    Learns     mean, scale of each element; target.*, predictor.*: weights and biases
    Score      mean over the outputs of (predictor(x) - g_0(x))², >= 0
    Reference  Choi and Chung, ICLR 2020

    Options: `blur` "gaussian", "dct" (the paper's DCT-RND), "svd" (SVD-RND) or "none"; `strength`:
    the Gaussian's σ in pixels, the frequencies kept in each direction, or the number of singular
    values removed; 0 takes the mildest that is visible, whose mean squared change is 15 % of the
    mean pixel variance. `rotations` also learns the copies turned by 90°, 180° and 270°,
    `translations` those moved by a quarter of the image in each direction: a copy of either kind
    costs as much training as the reference itself. `outputs`, `width`, `epochs`, `rows`,
    `learning_rate`, `training_seconds` and `side` as in `rnd`.

    "svd" also sees milder blurs and costs most on far-out samples; "gaussian" and "dct" see smooth
    images and hardly cost any. Too few epochs make it worse than `rnd`: the one predictor has to
    tell sharp from blurred.
    """

    epochs: int = 30
    outputs: int = 64
    blur: Literal["gaussian", "dct", "svd", "none"] = "gaussian"
    strength: float = 0.0
    rotations: bool = False
    translations: bool = False

    may_be_zero: ClassVar[tuple[str, ...]] = ("strength",)
    paper: ClassVar[Paper | None] = Paper(
        "Novelty Detection Via Blurring",
        "Choi and Chung",
        "ICLR",
        2020,
        "https://arxiv.org/abs/1911.11943",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "2 networks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blur == "none" and not (self.rotations or self.translations):
            raise ContractError(
                "detectors.svd_rnd.blur: with 'none', no rotations and no translations nothing is "
                "altered; use rnd"
            )
        if self.blur in ("dct", "svd") and self.strength != int(self.strength):
            raise ContractError(
                f"detectors.svd_rnd.strength: {self.strength} is no whole number, and "
                f"{self.blur!r} counts"
            )

    @classmethod
    def examples(cls) -> Sequence[dict[str, Any]]:
        """Option sets that the conformity checks run."""
        return (
            {"epochs": 3, "width": 4},
            {"epochs": 2, "width": 4, "blur": "svd", "strength": 3.0, "rotations": True},
            {"epochs": 2, "width": 4, "blur": "dct", "translations": True},
        )

    def _weights(self, row: tuple[int, ...]) -> Shapes:
        return {
            **network_shapes("target", row, self.width, self.outputs),
            **network_shapes("predictor", row, self.width, self.outputs),
        }

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if not self.rotations:
            return super()._size(height, width)
        # turned by 90°, an image must have the shape that it had
        side = min(height, width, self.side)
        return side, side

    def _fit(
        self,
        values: Tensor,
        state: dict[str, Tensor],
        draw: torch.Generator,
        reference: Reference,
    ) -> State:
        kinds = [whiten(values, state)]
        if self.blur != "none":
            strength = self.strength or just_visible(values, self.blur)
            reference.progress(0.0, f"svd_rnd: {self.blur} blur of strength {strength:g}")
            kinds.append(whiten(blur_of(values, self.blur, strength), state))
        del values
        # every kind as it is, and the sharp ones turned or moved
        copies: list[tuple[Tensor, Change]] = [(kind, _as_it_is) for kind in kinds]
        copies += [(kinds[0], change) for change in self._changes(kinds[0])]
        aims = [
            self._aim(kind, change, state if number == 0 else self._target(state, draw))
            for number, (kind, change) in enumerate(copies)
        ]

        def loss(weights: Mapping[str, Tensor], rows: Tensor) -> Tensor:
            white = torch.cat([change(kind[rows]) for kind, change in copies])
            found = encode(white, weights, "predictor")
            aim = torch.cat([aim[rows] for aim in aims])
            # a mean over the copies, so that the rate means the same however many there are
            return (found - aim).square().mean(dim=1).reshape(len(copies), -1).mean(dim=0)

        predictor = {key: state[key] for key in state if key.startswith("predictor.")}
        plan = Plan(
            self.epochs,
            self.learning_rate,
            batch=max(1, BATCH // len(copies)),
            seconds=self.training_seconds,
        )
        learnt = train(predictor, len(kinds[0]), loss, plan, draw, reference, self.name)
        return {**state, **learnt}

    def _target(self, state: State, draw: torch.Generator) -> State:
        """Another random target, which is only needed while learning."""
        shapes = network_shapes("target", tuple(state["mean"].shape), self.width, self.outputs)
        device = state["mean"].device
        return {name: tensor.to(device) for name, tensor in initial(shapes, draw).items()}

    def _changes(self, white: Tensor) -> list[Change]:
        """What is done to sharp copies."""
        found: list[Change] = []
        if self.rotations:
            found += [functools.partial(torch.rot90, k=turn, dims=(2, 3)) for turn in (1, 2, 3)]
        if self.translations:
            height, width = white.shape[2:]
            found += [
                functools.partial(shifted, down=down, right=right)
                for down, right in shifts(height, width)
                if down or right
            ]
        return found

    def _aim(self, white: Tensor, change: Change, target: State) -> Tensor:
        return torch.cat(
            [encode(change(part), target, "target") for part in torch.split(white, BATCH)]
        )

    def _measure(self, white: Tensor, state: State) -> Tensor:
        return error(white, state)


def _as_it_is(images: Tensor) -> Tensor:
    return images
