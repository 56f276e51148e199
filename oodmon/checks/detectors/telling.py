"""What every detector has to tell: what it lacks, costs and takes, where it comes from."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Final

from torch import Tensor

from oodmon.checks.detectors.samples import close, each, learnt, samples
from oodmon.contracts import Detector
from oodmon.detectors.scorer import Scorer
from oodmon.errors import ContractError
from oodmon.records import Activations

__all__ = [
    "check_cost_and_paper_are_told",
    "check_docstring_block",
    "check_what_is_missing_is_named",
]

_BLOCK: Final = ("Reads", "Learns", "Score", "Reference")


def check_what_is_missing_is_named(detector: Detector) -> None:
    """A layer, logits or inputs that it needs and that were not tapped are a `ContractError`."""
    scorer, acts = learnt(detector), samples(detector, 4)
    reads, whole = scorer.reads(), scorer.score(each(acts, Tensor.clone))
    for layer in reads.layers:
        others = {name: tensor for name, tensor in acts.layers.items() if name != layer}
        _names(scorer, dataclasses.replace(acts, layers=others), layer, whole)
    if reads.logits and acts.layers:
        _names(scorer, dataclasses.replace(acts, logits=None), "logits", whole)
    if reads.inputs:
        _names(scorer, dataclasses.replace(acts, inputs=None), "inputs", whole)
    if reads.model:
        _names(scorer, dataclasses.replace(acts, probe=None), "model", whole)


def check_docstring_block(detector: Detector) -> None:
    """The docstring says what it reads, learns, scores, and where it comes from."""
    lines = (inspect.cleandoc(type(detector).__doc__ or "")).splitlines()
    missing = [word for word in _BLOCK if not any(line.startswith(word) for line in lines)]
    assert not missing, f"the docstring of {type(detector).__name__} has no line for {missing}"


def check_cost_and_paper_are_told(detector: Detector) -> None:
    """The class says what it costs, and its paper, or in the Reference line that there is none."""
    cls = type(detector)
    assert cls.cost, f"{cls.__name__}.cost is empty: what is its cost per sample, in C, D, N or HW?"
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    none = any(line.startswith("Reference") and "no paper" in line for line in lines)
    assert (cls.paper is None) == none, (
        f"{cls.__name__} has {'a' if cls.paper else 'no'} paper; its Reference line says otherwise"
    )


def _names(scorer: Scorer, acts: Activations, what: str, whole: Tensor) -> None:
    """What is only read while learning may be missing; then the scores are the same."""
    try:
        found = scorer.score(acts)
    except ContractError as error:
        if what not in str(error):
            raise AssertionError(f"{what} is missing, and the error hides it: {error}") from error
    else:
        close(found, whole, f"without {what}, and with it")
