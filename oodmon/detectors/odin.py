"""ODIN: a softmax that is cooled down, of inputs that are moved towards the predicted class.

The step along the input's gradient (`stepped`) also serves the DeConf heads of `generalized_odin`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from oodmon.contracts import Detector, Paper, Reads, Reference, Stability, State
from oodmon.detectors.logits import MSP, two_sided
from oodmon.detectors.states import expect
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

__all__ = ["ODIN", "GeneralizedODIN"]

_STEP: Final[Mapping[str, str]] = {"step": ""}
"""The state where the step was chosen on the reference: a scalar."""


def stepped(inputs: Tensor, slope: Tensor, step: float | Tensor, scale: Sequence[float]) -> Tensor:
    """Inputs moved by `step` along the sign of the slope, per channel divided by its `scale`."""
    # a step of 0.001 is nothing to a half-precision input near 1; the probe brings it back
    wide = inputs if inputs.dtype == torch.float64 else inputs.float()
    move = torch.sign(slope).to(wide.dtype).mul_(step)
    if scale:
        if inputs.ndim < 2 or inputs.shape[1] != len(scale):
            raise ContractError(
                f"input_scale: {len(scale)} channels, the inputs have shape {tuple(inputs.shape)}"
            )
        per_channel = torch.tensor(scale, dtype=move.dtype).reshape(-1, *[1] * (inputs.ndim - 2))
        # pinned, so that the copy to a device is queued and not waited for
        if move.is_cuda:
            per_channel = per_channel.pin_memory()
        move.div_(per_channel.to(move.device, non_blocking=True))
    return move.add_(wide)


def best_step(
    reference: Reference,
    choices: Sequence[float],
    confidence: Callable[[Activations, float], Tensor],
) -> State:
    """The choice of the largest mean confidence over the reference; of equals the smallest."""
    totals = torch.zeros(len(choices), dtype=torch.float64)
    for acts in reference:
        for place, step in enumerate(choices):
            found = confidence(acts, step).double()
            totals[place] += found[found.isfinite()].sum().cpu()
    chosen = max(range(len(choices)), key=lambda i: (float(totals[i]), -choices[i]))
    return {"step": torch.tensor(choices[chosen], device=reference.device)}


def _check_options(
    name: str, epsilon: float, choices: Sequence[float], scale: Sequence[float]
) -> None:
    for option, values in (("epsilon", (epsilon,)), ("choices", choices)):
        for value in values:
            if not (value >= 0.0 and math.isfinite(value)):
                raise ContractError(f"detectors.{name}.{option}: {value} is not at least 0")
    if not all(value > 0.0 and math.isfinite(value) for value in scale):
        raise ContractError(f"detectors.{name}.input_scale: {scale} are not all positive")


@detectors.register("odin")
@dataclass(frozen=True)
class ODIN(Detector):
    """Softmax at a high temperature, of inputs moved a little towards the predicted class.

    Reads      inputs (B, …), floating; logits (B, C); the model: two passes and a gradient.
               With `epsilon` 0 and no `choices` the logits alone
    Options    temperature T; epsilon ε, the step in units of the raw input; `choices` lets `learn`
               pick ε among them from the reference alone; `input_scale`, per channel, is what a
               normalised input was divided by
    Learns     step (), with `choices`: of the largest mean max p on the reference; else nothing
    Score      with p = max softmax(z(x̃)/T), x̃ = x + ε sign(∇ log softmax(z/T)_ŷ): log(1 - p) spread
               by T around u = log(1 - 1/C), the value of a uniform p: u + T (log(1 - p) - u).
               T = 1, ε = 0 is the score of `msp`
    Reference  Liang, Li and Srikant, ICLR 2018

    Runs in the shadow worker. At T = 1000 every p is close to 1/C: in float32 the order would sit
    in the last digits, hence the spreading. Traps: the rule behind `choices` picks large steps that
    may hurt, so offer none above 0.005 on inputs in [0, 1]; on some training recipes ODIN ranks
    worse than `msp`. Token ids have no gradient and cannot be moved.
    """

    temperature: float = 1000.0
    epsilon: float = 0.001
    choices: tuple[float, ...] = ()
    input_scale: tuple[float, ...] = ()

    paper: ClassVar[Paper | None] = Paper(
        "Enhancing the Reliability of Out-of-distribution Image Detection in Neural Networks",
        "Liang, Li and Srikant",
        "ICLR",
        2018,
        "https://arxiv.org/abs/1706.02690",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "2 passes + gradient"

    def __post_init__(self) -> None:
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ContractError(f"detectors.odin.temperature: {self.temperature} is not positive")
        _check_options("odin", self.epsilon, self.choices, self.input_scale)

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Option sets that the conformity checks run."""
        return ({}, {"temperature": 1.0, "epsilon": 0.0}, {"choices": (0.0, 0.002, 0.005)})

    def reads(self) -> Reads:
        """Inputs and model, unless nothing is to be moved."""
        moves = bool(self.epsilon or self.choices)
        return Reads(logits=True, inputs=moves, model=moves)

    def learn(self, reference: Reference) -> State:
        """The step, where there is a choice."""
        if not self.choices:
            return {}
        return best_step(
            reference,
            sorted(self.choices),
            lambda acts, step: self._cooled(self._moved(acts, step)).neg(),
        )

    def check(self, state: State) -> None:
        """A scalar step, or nothing."""
        expect("odin", state, _STEP if self.choices else {})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Of the moved inputs."""
        if not self.reads().model:
            return self._cooled(acts)
        return self._cooled(self._moved(acts, state.get("step", self.epsilon)))

    def _moved(self, acts: Activations, step: float | Tensor) -> Activations:
        inputs, probe = acts.require_inputs(), acts.require_probe()
        slope = acts.shared(
            f"odin.slope@{self.temperature}",
            lambda: probe.slope(inputs, self._confidence),
        )
        return probe.run(stepped(inputs, slope, step, self.input_scale))

    def _confidence(self, acts: Activations) -> Tensor:
        """Log probability of the predicted class, (B,), times T so that no slope underflows."""
        logits = two_sided(acts)
        # the top is that of the logits: cooled ones are equal in float32 where these are not
        total = (logits / self.temperature).logsumexp(dim=1)
        return logits.amax(dim=1) - self.temperature * total

    def _cooled(self, acts: Activations) -> Tensor:
        plain = MSP(temperature=self.temperature)
        if self.temperature == 1.0:
            return plain.score(acts, {})
        logits = acts.require_logits().double()
        found = plain.score(Activations(logits=logits), {})
        uniform = math.log1p(-1.0 / max(logits.shape[1], 2))
        return found.sub_(uniform).mul_(self.temperature).add_(uniform)


@detectors.register("generalized_odin")
@dataclass(frozen=True)
class GeneralizedODIN(Detector):
    """The similarity to the classes of a DeConf head, whose logits are h(x) / g(x).

    Reads      layers[layer]: h (B, C), or g (B, 1) with part "g"; with `epsilon` or `choices` also
               inputs (B, …) and the model: two passes and a gradient
    Options    epsilon, choices and input_scale as of `odin`; `layer` is where the head
               (`recipes.deconf.DeConfHead`) gives the part, h or g: ``head.similarity`` and
               ``head.scale`` of a model that calls its head `head`
    Learns     step (), with `choices`: of the largest mean max h on the reference; else nothing
    Score      -max h(x̃), or -g(x̃), with x̃ = x + ε sign(∇ max h) (or ∇ g)
    Reference  Hsu, Shen, Jin and Kira, CVPR 2020

    Needs a model that was trained with the head (`recipes.deconf`). Without a step it reads one
    layer and runs beside the tap; with one it runs in the shadow worker. The rule that chooses the
    step is the paper's and may lower the AUROC: measure before you use it.
    """

    layer: str = ""
    part: Literal["h", "g"] = "h"
    epsilon: float = 0.0
    choices: tuple[float, ...] = ()
    input_scale: tuple[float, ...] = ()

    paper: ClassVar[Paper | None] = Paper(
        "Generalized ODIN: Detecting Out-of-distribution Image without Learning from "
        "Out-of-distribution Data",
        "Hsu, Shen, Jin and Kira",
        "CVPR",
        2020,
        "https://arxiv.org/abs/2002.11297",
    )
    stability: ClassVar[Stability] = "beta"
    cost: ClassVar[str] = "C, or 2 passes + gradient with a step"

    def __post_init__(self) -> None:
        if self.part not in ("h", "g"):
            raise ContractError(
                f"detectors.generalized_odin.part: {self.part!r} is neither 'h' nor 'g'"
            )
        _check_options("generalized_odin", self.epsilon, self.choices, self.input_scale)

    @classmethod
    def examples(cls) -> Sequence[Mapping[str, Any]]:
        """Option sets that the conformity checks run."""
        return (
            {"layer": "faint"},
            {"layer": "faint", "part": "g", "epsilon": 0.001},
            {"layer": "faint", "choices": (0.0, 0.002)},
        )

    def pin(self, layers: Sequence[str]) -> GeneralizedODIN:
        """The last layer that is tapped, where none was named."""
        if self.layer or not layers:
            return self
        return dataclasses.replace(self, layer=layers[-1])

    def reads(self) -> Reads:
        """The head's part; to move inputs also these and the model."""
        moves = bool(self.epsilon or self.choices)
        layers = (self.layer,) if self.layer else ()
        return Reads(layers=() if moves else layers, inputs=moves, model=moves)

    def learn(self, reference: Reference) -> State:
        """The step, where there is a choice."""
        if not self.choices:
            return {}
        return best_step(
            reference,
            sorted(self.choices),
            lambda acts, step: self._part(self._moved(acts, step)),
        )

    def check(self, state: State) -> None:
        """A scalar step, or nothing."""
        expect("generalized_odin", state, _STEP if self.choices else {})

    def score(self, acts: Activations, state: State) -> Tensor:
        """Minus the largest similarity, or minus g."""
        if self.reads().model:
            acts = self._moved(acts, state.get("step", self.epsilon))
        return self._part(acts).neg()

    def _moved(self, acts: Activations, step: float | Tensor) -> Activations:
        inputs, probe = acts.require_inputs(), acts.require_probe()
        slope = probe.slope(inputs, self._part, (self.layer,))
        return probe.run(stepped(inputs, slope, step, self.input_scale), (self.layer,))

    def _part(self, acts: Activations) -> Tensor:
        """Max h, or g, (B,) float32."""
        found = acts.layer(self.layer)
        if found.ndim != 2 or not found.shape[1]:
            raise ContractError(
                f"layer {self.layer!r}: expected (B, C) of a DeConf head, found "
                f"{tuple(found.shape)}"
            )
        return found.float().amax(dim=1)
