"""Detectors made of others: several detectors, or one on several layers, as a single score.

Scores of different kinds are brought to one unit first, the tail probability against reference
samples that no member has learnt from. What is added up is the evidence, -log p.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.expressions import detector_of, text_of
from oodmon.detectors.outliers import Inside, suited, takes_outliers
from oodmon.detectors.reference import Reference as Part
from oodmon.detectors.reference import gather, part_of
from oodmon.detectors.states import expect
from oodmon.detectors.tails import RULES, evidence, joined, ranked
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["Combine", "PerLayer"]

Rule = Literal["fisher", "max", "mean"]

_FISHER: Final = Paper(
    "Statistical Methods for Research Workers", "Fisher", "Oliver and Boyd", 1925
)


def _check_options(name: str, by: str, learn_share: float, rows: int) -> None:
    if by not in RULES:
        raise ContractError(f"detectors.{name}.by: {by!r} is none of {RULES}")
    if not 0.0 < learn_share < 1.0:
        raise ContractError(f"detectors.{name}.learn_share: {learn_share} is not in (0, 1)")
    if rows < 2:
        raise ContractError(f"detectors.{name}.rows: {rows} is less than 2")


def _reads(members: Sequence[Detector]) -> Reads:
    """What all members together read."""
    reads = [member.reads() for member in members]
    return Reads(
        layers=tuple(dict.fromkeys(layer for each in reads for layer in each.layers)),
        logits=any(each.logits for each in reads),
        inputs=any(each.inputs for each in reads),
        labels=any(each.labels for each in reads),
        model=any(each.model for each in reads),
    )


def _learn(
    name: str, members: Sequence[Detector], reference: Reference, learn_share: float, rows: int
) -> State:
    """Each member's state from one part of the reference, and its scores of the other part."""

    def rows_of_part(learnt: bool) -> Iterator[Activations]:
        draw = reference.generator()
        for acts in reference:
            chosen = torch.rand(acts.rows, generator=draw) < learn_share
            if bool((chosen == learnt).any()):
                yield part_of(acts, (chosen == learnt).to(reference.device))

    def told(done: float, note: str, number: int) -> None:
        reference.progress((number + done) / (len(members) + 1), note)

    states: list[State] = []
    for number, member in enumerate(members):
        part = Part.from_batches(
            lambda: rows_of_part(learnt=True),
            head=reference.head,
            seed=reference.generator().initial_seed(),
            device=reference.device,
            progress=lambda done, note, number=number: told(  # type: ignore[misc]
                done, f"{members[number].name}: {note}", number
            ),
        )
        try:
            learnt = member.learn(suited(member, part))
        except ContractError as error:
            raise ContractError(f"detectors.{name}: {error}") from error
        states.append({key: tensor.detach().contiguous() for key, tensor in learnt.items()})
    held = Part.from_batches(
        lambda: rows_of_part(learnt=False),
        seed=reference.generator().initial_seed(),
        device=reference.device,
    )
    told(0.0, "ranking", len(members))
    try:
        (scores,) = gather(Inside(held), lambda acts: (_columns(members, states, acts).T,), rows)
    except ContractError as error:
        raise ContractError(
            f"detectors.{name}: of the part of the reference that is ranked against: {error}"
        ) from error
    ranks, scale = ranked(scores.T)
    return {
        "ranks": ranks,
        "scale": scale,
        **{
            f"{number}/{key}": tensor
            for number, state in enumerate(states)
            for key, tensor in state.items()
        },
    }


def _columns(members: Sequence[Detector], states: Sequence[State], acts: Activations) -> Tensor:
    """The members' scores, (M, B) float32; what they share is computed once."""
    return torch.stack(
        [member.score(acts, state).float() for member, state in zip(members, states, strict=True)]
    )


def _apart(count: int, state: State) -> list[dict[str, Tensor]]:
    """The state of each of so many members."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for key, tensor in state.items():
        number, slash, rest = key.partition("/")
        if slash and number.isdigit() and int(number) < count:
            parts[int(number)][rest] = tensor
    return parts


def _check(name: str, members: Sequence[Detector], state: State) -> None:
    """The ranks, the scales, and each member's own state; nothing else."""
    own = {key: tensor for key, tensor in state.items() if "/" not in key}
    expect(name, own, {"ranks": f"{len(members)} n", "scale": f"{len(members)} 1"})
    parts = _apart(len(members), state)
    if len(own) + sum(map(len, parts)) != len(state):
        raise StateError(f"{name}: state: holds more than its {len(members)} members learnt")
    for number, (member, part) in enumerate(zip(members, parts, strict=True)):
        try:
            member.check(part)
        except StateError as error:
            raise StateError(f"{name}: member {number}: {error}") from error


def _score(members: Sequence[Detector], by: str, acts: Activations, state: State) -> Tensor:
    scores = _columns(members, _apart(len(members), state), acts)
    return joined(evidence(scores, state["ranks"], state["scale"]), by)


@detectors.register("combine")
@dataclass(frozen=True)
class Combine(Detector):
    """Several detectors as one, by their tail probabilities.

    Reads      what its members read
    Options    of: the members, by name or as name(option=value), such as
               ``[energy, "gram(powers=(1, 2))", "cosine(layer=penultimate)"]``; by "fisher", "max"
               or "mean"; learn_share of the reference is learnt from, the rest ranks the scores;
               rows of it at most are kept for that
    Learns     per member m "m/…", its own state; ranks (M, n): its scores on the other part of the
               reference, ascending; scale (M, 1): how far their tail reaches
    Score      of the tail probabilities p_m: -2 sum log p_m (fisher), >= 0; -log min p_m (max); or
               -log mean p_m (mean)
    Reference  Fisher, Oliver and Boyd, 1925; for detectors, Magesh et al., "Principled OOD
               Detection via Multiple Testing", JMLR 2023

    No member's tail probabilities come from samples that it learnt from: those it scores lower
    than fresh ones. "fisher" adds evidence up, and is best where several members see a little;
    "max" follows whichever is surest; "mean" needs most members to agree. Members that are alike
    count twice in a sum: `oodmon advise` tells which are. The score is calibrated
    like any other, so their dependence does not break a promise. Beyond the largest reference
    score p goes on falling as 1 / excess. A row that one member cannot score is NaN. A member that
    reads the model moves the whole into the shadow worker. Paths in members' options are relative
    to the working folder.
    """

    of: tuple[str, ...] = ("energy", "mahalanobis")
    by: Rule = "fisher"
    learn_share: float = 0.7
    rows: int = 20_000

    paper: ClassVar[Paper | None] = _FISHER
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "its members"

    def __post_init__(self) -> None:
        _check_options("combine", self.by, self.learn_share, self.rows)
        if not self.of:
            raise ContractError("detectors.combine.of: names no detector")
        if len(set(self.of)) < len(self.of):
            raise ContractError(f"detectors.combine.of: {list(self.of)} names one twice")
        self.members()

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Option sets that the conformity checks run."""
        return (
            {},
            {"of": ("msp", "gram(powers=(1, 2), layers=(stage,))"), "by": "max"},
            {"of": ("energy", "cosine", "residual"), "by": "mean", "learn_share": 0.5},
        )

    @property
    def outliers(self) -> bool:
        """Whether a member learns from known outliers."""
        return any(map(takes_outliers, self.members()))

    def members(self) -> tuple[Detector, ...]:
        """The detectors that `of` names; `ContractError` tells what cannot be read."""
        try:
            return tuple(detector_of(text) for text in self.of)
        except ContractError as error:
            raise ContractError(f"detectors.combine.of: {error}") from error

    def pin(self, layers: Sequence[str]) -> Combine:
        """Its members with their layers, written out."""
        pinned = tuple(text_of(member.pin(layers)) for member in self.members())
        return dataclasses.replace(self, of=pinned)

    def reads(self) -> Reads:
        """What its members read."""
        return _reads(self.members())

    def learn(self, reference: Reference) -> State:
        """The members' states on one part, and their scores on the other."""
        return _learn("combine", self.members(), reference, self.learn_share, self.rows)

    def check(self, state: State) -> None:
        """Ranks, scales, and each member's own state."""
        _check("combine", self.members(), state)

    def score(self, acts: Activations, state: State) -> Tensor:
        """The members' evidence together, (B,)."""
        return _score(self.members(), self.by, acts, state)


@detectors.register("per_layer")
@dataclass(frozen=True)
class PerLayer(Detector):
    """One detector on each of several layers, by their tail probabilities.

    Reads      what the detector reads, of each layer
    Options    of: the detector, as in `combine`; layers, empty for all that are tapped; by,
               learn_share and rows as in `combine`
    Learns     as `combine`, with one member per layer
    Score      as `combine`
    Reference  Fisher, Oliver and Boyd, 1925; over layers, Haroush et al., "A Statistical Framework
               for Efficient Out of Distribution Detection in Deep Neural Networks", ICLR 2022

    Any detector with an option `layer` or `layers` can be asked. Layers differ in what they see:
    early ones texture and noise, late ones content. Layers close to each other see the same, so
    name a few that are far apart; each costs as much as the detector alone.
    """

    of: str = "mahalanobis"
    layers: tuple[str, ...] = ()
    by: Rule = "fisher"
    learn_share: float = 0.7
    rows: int = 20_000

    paper: ClassVar[Paper | None] = _FISHER
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "its detector, for each layer"

    def __post_init__(self) -> None:
        _check_options("per_layer", self.by, self.learn_share, self.rows)
        if len(set(self.layers)) < len(self.layers):
            raise ContractError(f"detectors.per_layer.layers: {self.layers} names one twice")
        self._on("")

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Option sets that the conformity checks run."""
        return (
            {},
            {"of": "gram(powers=(1, 2))", "by": "max"},
            {"of": "cosine", "by": "mean", "layers": ("features", "other")},
        )

    def _on(self, layer: str) -> Detector:
        """The detector on one layer; `ContractError` where it cannot be told which to read."""
        try:
            one = detector_of(self.of)
        except ContractError as error:
            raise ContractError(f"detectors.per_layer.of: {error}") from error
        options = {field.name for field in dataclasses.fields(one)}  # type: ignore[arg-type]
        if "layer" in options:
            return dataclasses.replace(one, layer=layer)  # type: ignore[type-var]
        if "layers" in options:
            return dataclasses.replace(one, layers=(layer,) if layer else ())  # type: ignore[type-var]
        raise ContractError(
            f"detectors.per_layer.of: {one.name} reads no layer that could be named"
        )

    @property
    def outliers(self) -> bool:
        """Whether the detector learns from known outliers."""
        return takes_outliers(self._on(""))

    def members(self) -> tuple[Detector, ...]:
        """The detector on each layer."""
        return tuple(self._on(layer) for layer in self.layers)

    def pin(self, layers: Sequence[str]) -> PerLayer:
        """All layers that are tapped, where none was named."""
        return self if self.layers else dataclasses.replace(self, layers=tuple(layers))

    def reads(self) -> Reads:
        """What the detector reads, of each layer."""
        return _reads(self.members() or (self._on(""),))

    def learn(self, reference: Reference) -> State:
        """The members' states on one part, and their scores on the other."""
        if not self.layers:
            raise ContractError("detectors.per_layer.layers: names no layer, and none is tapped")
        return _learn("per_layer", self.members(), reference, self.learn_share, self.rows)

    def check(self, state: State) -> None:
        """Ranks, scales, and each layer's own state."""
        _check("per_layer", self.members(), state)

    def score(self, acts: Activations, state: State) -> Tensor:
        """The layers' evidence together, (B,)."""
        return _score(self.members(), self.by, acts, state)
