"""Detectors that break their contract in one way each, keyed by the check that must notice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oodmon.checks import detectors as checks
from oodmon.checks.detectors import learning, probing, telling
from oodmon.contracts import Detector, Reads, Reference, State
from oodmon.errors import StateError
from oodmon.records import Activations


@dataclass(frozen=True)
class Honest(Detector):
    """Distance to the mean of the features: what the broken ones are made of.

    Reads      layers[layer] (B, D)
    Learns     mean (D,)
    Score      |x - mean|, >= 0
    Reference  no paper, a test
    """

    layer: str = "features"

    cost: ClassVar[str] = "D"

    def reads(self) -> Reads:
        return Reads(layers=(self.layer,))

    def learn(self, reference: Reference) -> State:
        return {"mean": torch.cat([acts.layer(self.layer) for acts in reference]).mean(dim=0)}

    def check(self, state: State) -> None:
        if set(state) != {"mean"}:
            raise StateError(f"expected 'mean', found {sorted(state)}")

    def score(self, acts: Activations, state: State) -> Tensor:
        return self.measure(acts.layer(self.layer).float(), state["mean"])

    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return torch.linalg.vector_norm(features - mean, dim=1)  # type: ignore[no-any-return]


class TwoColumns(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return (features - mean)[:, :2].abs()


class WholeNumbers(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return super().measure(features, mean).long()


class Overflows(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return (features - mean).pow(10).sum(dim=1)


class UndefinedAtZero(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return super().measure(features / features.sum(dim=1, keepdim=True), mean)


class CentresTheBatch(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return super().measure(features - features.mean(dim=0), mean * 0.0)


class SpareTheFirst(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        found = super().measure(features, mean)
        return torch.cat([found[:1] * 0.5, found[1:]])


class CountsRows(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return super().measure(features, mean) + 0.5 * torch.arange(len(features))


class NeedsARow(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        found = super().measure(features, mean)
        return found if len(found) else found.new_zeros(1)


class WritesToTheLayer(Honest):
    def score(self, acts: Activations, state: State) -> Tensor:
        return torch.linalg.vector_norm(acts.layer(self.layer).sub_(state["mean"]), dim=1)  # type: ignore[no-any-return]


class MovesItsMean(Honest):
    def score(self, acts: Activations, state: State) -> Tensor:
        found = super().score(acts, state)
        state["mean"].mul_(0.9).add_(acts.layer(self.layer).mean(dim=0), alpha=0.1)
        return found


class ScoresNaN(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return super().measure(features.nan_to_num(nan=0.0), mean)


class SpreadsNaN(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        found = super().measure(features, mean)
        return found + 0.0 * found.sum()


class SquaresInHalf(Honest):
    def score(self, acts: Activations, state: State) -> Tensor:
        features = acts.layer(self.layer)
        return (features - state["mean"].to(features.dtype)).pow(4).sum(dim=1)


class TakesAGradient(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        features = features.requires_grad_()
        (slope,) = torch.autograd.grad(super().measure(features, mean).sum(), features)
        return slope.norm(dim=1)  # type: ignore[no-any-return]


class WrongSign(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return -super().measure(features, mean)


class Blind(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return features[:, 0] * 0.0


class LearnsAtRandom(Honest):
    def learn(self, reference: Reference) -> State:
        mean = super().learn(reference)["mean"]
        return {"mean": mean + 0.01 * torch.rand_like(mean)}


class ThrowsDice(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return super().measure(features, mean) + random.random()


class UsesTheBatchBefore(Honest):
    before: ClassVar[list[Tensor]] = []

    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        found = super().measure(features, mean)
        last = self.before[-1] if self.before else found
        self.before[:] = [found.clone()]
        return found + last.mean()


class SharesABuffer(Honest):
    """Hands the features from one method to the other through the class."""

    buffer: ClassVar[dict[str, Tensor]] = {}

    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        self.buffer["features"] = features
        time.sleep(0.002)  # the other thread comes in between
        return super().measure(self.buffer["features"], mean)


class Impostor(Honest):
    """Goes by the name of another, and so is loaded as that other."""

    name = "max_logit"


class ReadsMemory(Honest):
    """Takes the tensor's memory for its values."""

    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        if not features.is_contiguous():
            features = torch.as_strided(features, features.shape, (features.shape[1], 1))
        return super().measure(features, mean)


class FillsIn(Honest):
    def score(self, acts: Activations, state: State) -> Tensor:
        features = acts.layers.get(self.layer, state["mean"].expand(acts.rows, -1))
        return self.measure(features.float(), state["mean"])


class Mumbles(Honest):
    def score(self, acts: Activations, state: State) -> Tensor:
        if self.layer not in acts.layers:
            from oodmon.errors import ContractError

            raise ContractError("something is missing")
        return super().score(acts, state)


class TakesAnyState(Honest):
    def check(self, state: State) -> None:
        return None


class Undocumented(Honest):
    """Says nothing."""


class Hoards(Honest):
    seen: ClassVar[list[Tensor]] = []

    def score(self, acts: Activations, state: State) -> Tensor:
        self.seen.append(acts.layer(self.layer))
        return super().score(acts, state)


class AsksTheHost(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        found = super().measure(features, mean)
        return found if float(found.sum()) >= 0.0 else -found


class PicksByMask(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        found = super().measure(features, mean)
        found[found < 0.0] = 0.0
        return found + found[found > 0.0].sum() * 0.0


class ReturnsNumbers(Honest):
    def measure(self, features: Tensor, mean: Tensor) -> Tensor:
        return torch.tensor(super().measure(features, mean).tolist())


@dataclass(frozen=True)
class OnProbe(Detector):
    """Largest logit of another pass: what the broken ones that read the model are made of.

    Reads      inputs, the model
    Learns     nothing
    Score      -max z
    Reference  a test
    """

    def reads(self) -> Reads:
        return Reads(inputs=True, model=True)

    def score(self, acts: Activations, state: Any) -> Tensor:
        found = acts.require_probe().run(acts.require_inputs())
        return found.require_logits().amax(dim=1).neg()


class DropsByPlace(OnProbe):
    """Dropout as a module does it: masks for the rows of this batch, from the global generator."""

    def score(self, acts: Activations, state: Any) -> Tensor:
        inputs = torch.nn.functional.dropout(acts.require_inputs().float(), 0.5)
        return acts.require_probe().run(inputs).require_logits().amax(dim=1).neg()


class SeedsTheWorld(OnProbe):
    def score(self, acts: Activations, state: Any) -> Tensor:
        torch.manual_seed(0)
        return super().score(acts, state)


class CallsTheModel(OnProbe):
    """Past the probe, to what is served."""

    def score(self, acts: Activations, state: Any) -> Tensor:
        model: Any = acts.require_probe()._model()  # type: ignore[attr-defined]
        found: Tensor = model(acts.require_inputs()).amax(dim=1)
        return found.neg()


class SwitchesTheMode(OnProbe):
    def score(self, acts: Activations, state: Any) -> Tensor:
        acts.require_probe()._model().train(mode=False)  # type: ignore[attr-defined]
        return super().score(acts, state)


class LeavesAGradient(OnProbe):
    def score(self, acts: Activations, state: Any) -> Tensor:
        model: Any = acts.require_probe()._model()  # type: ignore[attr-defined]
        model.guess.grad = model.guess.detach().clone()
        return super().score(acts, state)


class PassesNothing(OnProbe):
    def reads(self) -> Reads:
        return Reads(model=True)


class DoesWithoutTheModel(OnProbe):
    def score(self, acts: Activations, state: Any) -> Tensor:
        if acts.probe is None:
            return acts.require_logits()[:, 0]
        return super().score(acts, state)


class CostsNobodyKnows(Honest):
    """Reference  no paper, and no cost"""

    cost: ClassVar[str] = ""


class FromNowhere(Honest):
    """Reference  Someone, somewhere"""


Check = Callable[[Detector], None]

BROKEN: dict[Check, tuple[Detector, ...]] = {
    checks.check_scores_are_a_finite_column: (
        TwoColumns(),
        WholeNumbers(),
        Overflows(),
        UndefinedAtZero(),
    ),
    checks.check_rows_are_independent: (CentresTheBatch(), CountsRows(), DropsByPlace()),
    checks.check_permuting_rows_permutes_scores: (CountsRows(), SpareTheFirst()),
    checks.check_empty_batch: (NeedsARow(),),
    checks.check_inputs_and_state_are_unchanged: (WritesToTheLayer(), MovesItsMean()),
    checks.check_nan_stays_in_its_row: (ScoresNaN(), SpreadsNaN()),
    checks.check_half_precision: (SquaresInHalf(),),
    checks.check_no_gradient: (TakesAGradient(),),
    checks.check_higher_is_more_ood: (WrongSign(), Blind()),
    learning.check_same_reference_same_state: (LearnsAtRandom(),),
    checks.check_same_answer_twice: (ThrowsDice(), UsesTheBatchBefore(), DropsByPlace()),
    checks.check_threads_do_not_mix: (SharesABuffer(),),
    learning.check_save_and_load: (Impostor(),),
    checks.check_any_memory_layout: (ReadsMemory(),),
    telling.check_what_is_missing_is_named: (FillsIn(), Mumbles(), DoesWithoutTheModel()),
    learning.check_foreign_state_is_refused: (TakesAnyState(),),
    telling.check_docstring_block: (Undocumented(),),
    telling.check_cost_and_paper_are_told: (CostsNobodyKnows(), FromNowhere()),
    checks.check_nothing_is_kept: (Hoards(),),
    checks.check_nothing_waits_for_the_device: (AsksTheHost(), PicksByMask(), ReturnsNumbers()),
    probing.check_the_model_is_left_alone: (
        CallsTheModel(),
        SwitchesTheMode(),
        LeavesAGradient(),
        PassesNothing(),
    ),
    probing.check_no_global_generator_is_touched: (DropsByPlace(), SeedsTheWorld()),
}
