"""What every detector's state has to hold to: the same each time, whole in a file, else refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from oodmon.checks.detectors.samples import each, learnt, reference, samples
from oodmon.contracts import Detector
from oodmon.detectors.scorer import Scorer
from oodmon.errors import OodmonError, StateError

__all__ = [
    "check_foreign_state_is_refused",
    "check_same_reference_same_state",
    "check_save_and_load",
]


def check_same_reference_same_state(detector: Detector) -> None:
    """Learning twice gives one state, bit for bit, whatever global generators do."""
    first = Scorer.learn(detector, reference(detector))
    torch.rand(3)
    second = Scorer.learn(detector, reference(detector))
    assert set(first.state) == set(second.state), "two runs learnt different tensors"
    for name, tensor in first.state.items():
        assert torch.equal(tensor, second.state[name]), f"two runs learnt different {name!r}"
    assert first.digest == second.digest, "two runs have different digests"


def check_save_and_load(detector: Detector) -> None:
    """What is loaded is what was saved: options, state, digest and scores, bit for bit."""
    scorer, acts = learnt(detector), samples(detector, 24)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scorer.safetensors"
        try:
            scorer.save(path)
            loaded = Scorer.load(path)
        except (OodmonError, RuntimeError, TypeError) as error:
            raise AssertionError(f"what was learnt cannot be stored: {error}") from error
    assert loaded.detector == scorer.detector, f"{loaded.detector} is not {scorer.detector}"
    assert loaded.digest == scorer.digest, "the digest changed on the way through a file"
    assert torch.equal(loaded.score(acts), scorer.score(each(acts, Tensor.clone))), (
        "a loaded scorer scores differently"
    )


def check_foreign_state_is_refused(detector: Detector) -> None:
    """A state that lacks a tensor is a `StateError` when the scorer is made, not a wrong score."""
    state = learnt(detector).state
    for name in state:
        rest = {other: tensor for other, tensor in state.items() if other != name}
        try:
            Scorer(detector, rest)
        except StateError:
            continue
        raise AssertionError(f"a state without {name!r} was taken; `check` must refuse it")
