"""What detectors that make further passes have to hold to besides: the model does not notice."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from oodmon.checks.detectors.model import Model
from oodmon.checks.detectors.samples import each, learnt, samples
from oodmon.contracts import Detector
from oodmon.taps.twin import Twin

__all__ = ["check_no_global_generator_is_touched", "check_the_model_is_left_alone"]


def check_the_model_is_left_alone(detector: Detector) -> None:
    """Weights, gradients, buffers, modes and hooks of the served model stay as they were."""
    reads = detector.reads()
    if not reads.model:
        return
    assert reads.inputs, "it reads the model and not the inputs, so there is nothing to pass"
    model, calls = Model().train(), []
    model.drop.eval()
    model.guess.grad = torch.ones_like(model.guess)
    model.register_forward_hook(lambda *_: calls.append(1))
    before = _anatomy(model)
    acts = samples(detector, 8)
    scorer = learnt(detector)
    scorer.score(dataclasses.replace(acts, probe=Twin(model)))
    after = _anatomy(model)
    for what, was in before.items():
        same = torch.equal(was, after[what]) if isinstance(was, Tensor) else was == after[what]
        assert same, f"scoring changed {what} of the served model"
    assert before.keys() == after.keys(), "scoring added to the served model, or took from it"
    assert not calls, "scoring called the served model, and not a copy of it"


def check_no_global_generator_is_touched(detector: Detector) -> None:
    """Scoring neither draws from torch's global generator nor seeds it: the model may use it."""
    scorer, acts = learnt(detector), samples(detector, 8)
    before = torch.get_rng_state()
    scorer.score(each(acts, Tensor.clone))
    assert torch.equal(before, torch.get_rng_state()), "scoring changed the global generator"


def _anatomy(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: t.clone() for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found[f"requires_grad of {name}"] = parameter.requires_grad
        found[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
    for name, module in model.named_modules():
        found[f"mode of {name or 'model'}"] = module.training
        found[f"attributes of {name or 'model'}"] = sorted(vars(module))
        hooks = (*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks)
        found[f"hooks of {name or 'model'}"] = hooks
    return found
