"""The detector keeps to oodmon's contract, and its numbers are the ones of its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oodmon_example_detector import CosineMean

from oodmon import Activations
from oodmon.checks import checks_for, subjects
from oodmon.contracts import Detector
from oodmon.detectors import Reference, Scorer
from oodmon.errors import ContractError, StateError

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "check", [*checks_for("detectors"), *checks_for("config")], ids=lambda check: check.__name__
)
@pytest.mark.parametrize("detector", subjects("detectors", "cosine_mean"), ids=repr)
def test_contract(detector: Detector, check: Callable[[Detector], None]) -> None:
    check(detector)


def learnt() -> Scorer:
    features = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    reference = Reference.from_arrays(
        layers={"features": features}, labels=torch.tensor([0, 0, 2, 2]), batch_size=3
    )
    return Scorer.learn(CosineMean(layer="features"), reference)


def test_scores_are_one_minus_the_largest_cosine() -> None:
    rows = torch.tensor([[5.0, 0.0], [0.0, 0.1], [1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    scores = learnt().score(Activations(layers={"features": rows}))
    half = 0.5**0.5
    assert scores.tolist() == pytest.approx([0.0, 0.0, 1.0 - half, 1.0 + half, 1.0], abs=1e-6)


def test_a_class_without_rows_has_no_mean() -> None:
    assert learnt().state["means"].shape == (2, 2)


def test_a_reference_without_labels_is_refused() -> None:
    reference = Reference.from_arrays(layers={"features": torch.ones(4, 2)})
    with pytest.raises(ContractError, match="labels"):
        Scorer.learn(CosineMean(layer="features"), reference)


def test_a_state_of_another_detector_is_refused() -> None:
    with pytest.raises(StateError, match="means"):
        CosineMean(layer="features").check({"weight": torch.ones(2)})
