"""What several networks make of one input: MC dropout's thinned networks, or an ensemble's members.

Both average probabilities and measure how far the networks are from one sharp answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.logits import two_sided
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["Ensemble", "MCDropout", "disagreement"]

Measure = Literal["mutual_information", "entropy", "confidence"]

_MEASURES: Final = ("mutual_information", "entropy", "confidence")
_MEMBER: Final = re.compile(r"(\d+)/(.+)")


def disagreement(answers: Iterable[Tensor], measure: str) -> Tensor:
    """The score (B,) of the answers (B, C) of several networks, as logits; one at a time.

    "entropy" is that of the mean probabilities, "mutual_information" what of it is due to the
    networks' disagreement, "confidence" minus the largest mean probability. In float64: on a sample
    that all are sure of, entropies are small differences.
    """
    count = 0
    total = own = None
    for logits in answers:
        logs = logits.double().log_softmax(dim=1)
        p = logs.exp()
        count += 1
        total = p if total is None else total + p
        if measure == "mutual_information":
            entropy = torch.special.entr(p).sum(dim=1)
            own = entropy if own is None else own + entropy
    if total is None:
        raise ContractError("a committee needs at least one network")
    mean = total / count
    if measure == "confidence":
        largest: Tensor = mean.amax(dim=1)
        return largest.neg_()
    found: Tensor = torch.special.entr(mean).sum(dim=1)
    if own is not None:
        # never below 0 but for rounding; NaN passes through clamp
        found = (found - own / count).clamp_(min=0.0)
    return found


def _check_measure(name: str, measure: str) -> None:
    if measure not in _MEASURES:
        raise ContractError(f"detectors.{name}.measure: {measure!r} is none of {_MEASURES}")


@detectors.register("mc_dropout")
@dataclass(frozen=True)
class MCDropout(Detector):
    """Disagreement of thinned copies of the model: dropout that stays on.

    Reads      inputs (B, …); the model: `passes` passes
    Options    passes; seed of the masks; rate replaces the model's own dropout rates, 0 keeps
               them; measure "entropy", "mutual_information" or "confidence"
    Learns     nothing
    Score      of the mean probabilities p̄: H[p̄], >= 0; or H[p̄] - mean H[p_t], >= 0; or -max p̄
    Reference  Gal and Ghahramani, ICML 2016

    Runs in the shadow worker. Pass t drops the same units for every row and every batch, as the
    seed decides: `passes` fixed thinned networks. So a sample scores the same however it is
    batched, and again tomorrow. Batch norms and all else stay in evaluation mode. A model without
    dropout is refused by `learn`. The dropout inside PyTorch's fused attention stays off. What
    comes before the first dropout is computed once for all networks, where the model bears it: with
    dropout before the last layers alone, 16 passes cost little more than one.
    """

    passes: int = 16
    seed: int = 0
    rate: float = 0.0
    measure: Measure = "entropy"

    paper: ClassVar[Paper | None] = Paper(
        "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning",
        "Gal and Ghahramani",
        "ICML",
        2016,
        "https://arxiv.org/abs/1506.02142",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "passes"

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ContractError(f"detectors.mc_dropout.passes: {self.passes} is not positive")
        if not 0.0 <= self.rate < 1.0:
            raise ContractError(f"detectors.mc_dropout.rate: {self.rate} is not in [0, 1)")
        _check_measure("mc_dropout", self.measure)
        if self.measure == "mutual_information" and self.passes == 1:
            raise ContractError(
                "detectors.mc_dropout.passes: one network has nobody to disagree with"
            )

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Option sets that the conformity checks run."""
        return tuple({"passes": 4, "measure": measure} for measure in _MEASURES)

    def reads(self) -> Reads:
        """Inputs, and the model."""
        return Reads(inputs=True, model=True)

    def learn(self, reference: Reference) -> State:
        """Nothing; `ContractError` where the model has no dropout."""
        for acts in reference:
            next(iter(self._networks(acts.require_inputs()[:1], acts)))
            break
        return {}

    def score(self, acts: Activations, state: State) -> Tensor:
        """Of `passes` thinned networks."""
        del state
        return disagreement(
            map(two_sided, self._networks(acts.require_inputs(), acts)), self.measure
        )

    def _networks(self, inputs: Tensor, acts: Activations) -> Iterable[Activations]:
        # Passes of one seed must not be those of the next one shifted by one.
        first = self.seed * 1_000_003
        seeds = range(first, first + self.passes)
        return acts.require_probe().thinned(inputs, seeds, self.rate)


@detectors.register("ensemble")
@dataclass(frozen=True)
class Ensemble(Detector):
    """Disagreement of several trainings of the served model's architecture.

    Reads      inputs (B, …); logits, where the served model is a member; the model: a pass for
               each other member
    Options    `weights_folder` holds one safetensors state dict per member; served counts the
               served model as a member too; measure as of `mc_dropout`
    Learns     the members' weights, "member/name" → tensor, so that the state is all there is to
               deploy, and other weights have another digest
    Score      of the mean probabilities p̄ of M members: H[p̄], >= 0; or H[p̄] - mean H[p_m], >= 0;
               or -max p̄
    Reference  Lakshminarayanan, Pritzel and Blundell, NeurIPS 2017

    Runs in the shadow worker. Members must differ in their start and in the order of their data.
    The folder is read while learning only. Nothing is unpickled: write members with
    ``safetensors.torch.save_file(model.state_dict(), …)``. The memory is M times the model's.
    """

    weights_folder: str = ""
    served: bool = True
    measure: Measure = "mutual_information"

    paper: ClassVar[Paper | None] = Paper(
        "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
        "Lakshminarayanan, Pritzel and Blundell",
        "NeurIPS",
        2017,
        "https://arxiv.org/abs/1612.01474",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "members passes"

    def __post_init__(self) -> None:
        _check_measure("ensemble", self.measure)

    def reads(self) -> Reads:
        """Inputs and model; logits where the served model is a member."""
        return Reads(logits=self.served, inputs=True, model=True)

    def learn(self, reference: Reference) -> State:
        """The weights; each member is tried on a sample, so that misfits are told now."""
        members = [_weights(path) for path in self._files()]
        for acts in reference:
            for path, weights in zip(self._files(), members, strict=True):
                there = {name: tensor.to(reference.device) for name, tensor in weights.items()}
                try:
                    acts.require_probe().run(acts.require_inputs()[:1], weights=there)
                except ContractError as error:
                    raise ContractError(f"detectors.ensemble: {path}: {error}") from error
            break
        return {
            f"{number}/{name}": tensor.to(reference.device)
            for number, weights in enumerate(members)
            for name, tensor in weights.items()
        }

    def check(self, state: State) -> None:
        """At least one member's weights, and the same names for each."""
        members = _members(state)
        fewest = 1 if self.served else 2
        if len(members) < fewest or list(members) != list(range(len(members))):
            raise StateError(
                f"ensemble: state: expected the weights of {fewest} or more members, found "
                f"{len(members)}"
            )
        for number, weights in members.items():
            odd = sorted(weights.keys() ^ members[0].keys())
            if odd:
                raise StateError(f"ensemble: state: members 0 and {number} differ in {odd[0]!r}")

    def score(self, acts: Activations, state: State) -> Tensor:
        """Of all members."""
        inputs, probe = acts.require_inputs(), acts.require_probe()

        def answers() -> Iterable[Tensor]:
            if self.served:
                yield two_sided(acts)
            for weights in _members(state).values():
                yield two_sided(probe.run(inputs, weights=weights))

        return disagreement(answers(), self.measure)

    def _files(self) -> list[Path]:
        folder = Path(self.weights_folder)
        found = sorted(folder.glob("*.safetensors")) if self.weights_folder else []
        fewest = 1 if self.served else 2
        if len(found) < fewest:
            raise ContractError(
                f"detectors.ensemble.weights_folder: expected {fewest} or more .safetensors files "
                f"in {self.weights_folder!r}, found {len(found)}"
            )
        return found


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ContractError(f"detectors.ensemble: {path}: cannot be read: {error}") from error
    return weights


def _members(state: State) -> dict[int, dict[str, Tensor]]:
    """Number of a member → its weights by name, in order."""
    members: dict[int, dict[str, Tensor]] = {}
    for key in sorted(state):
        found = _MEMBER.fullmatch(key)
        if found is None:
            raise StateError(f"ensemble: state: {key!r} is not 'member/name'")
        members.setdefault(int(found[1]), {})[found[2]] = state[key]
    return dict(sorted(members.items()))
