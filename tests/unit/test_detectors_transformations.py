"""Geom: the transformations, the Dirichlet fit, the two statistics, and what they see."""

from __future__ import annotations

import pytest
import torch

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.networks import encode
from oodmon.detectors.transformations import Geom, dirichlet, rotated, transformed
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations


def ramps(rows: int, seed: int = 0, *, lying: bool = False) -> torch.Tensor:
    """Brighter to the right, by random amounts, or (lying) downwards."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.linspace(0, 1, 8) * (0.5 + torch.rand(rows, 1, 1, 1, generator=draw))
    found = found.expand(rows, 1, 8, 8) + 0.05 * torch.randn(rows, 1, 8, 8, generator=draw)
    return found.mT if lying else found


def learnt(**options: object) -> Scorer:
    detector = Geom(**{"epochs": 8, "width": 4, "learning_rate": 3e-3, **options})  # type: ignore[arg-type]
    return Scorer.learn(detector, Reference.from_arrays(inputs=ramps(300)))


def test_all_transformations_differ_and_the_first_is_none() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for found, count in ((rotated(images), 4), (transformed(images), 72)):
        assert found.shape == (count, 2, 3, 8, 8)
        assert torch.equal(found[0], images)
        flat = found.flatten(1)
        assert len(torch.unique(flat, dim=0)) == count
    assert torch.equal(rotated(images)[1], images.rot90(1, (2, 3)))
    # shifted by two pixels, the border mirrored: 2 1 | 0 1 2 3 4 5
    shifted = transformed(images)[24:]
    assert any(torch.equal(one[..., 2:, :], images[..., :-2, :]) for one in shifted)


def test_the_likeliest_dirichlet() -> None:
    truth = torch.tensor([[3.0, 0.5, 1.5], [0.2, 8.0, 0.9]], dtype=torch.float64)
    expected_logs = torch.digamma(truth) - torch.digamma(truth.sum(1, keepdim=True))
    torch.testing.assert_close(dirichlet(expected_logs), truth, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("statistic", ["mean", "dirichlet"])
def test_what_is_turned_is_seen(statistic: str) -> None:
    scorer = learnt(statistic=statistic)
    inside = scorer.score(Activations(inputs=ramps(100, seed=1))).numpy()
    outside = scorer.score(Activations(inputs=ramps(100, seed=2, lying=True))).numpy()
    assert auroc(inside, outside) > 0.95


def test_the_statistics_are_those_of_the_paper() -> None:
    rows = ramps(3, seed=4)
    for statistic in ("mean", "dirichlet"):
        scorer = learnt(statistic=statistic, epochs=1)
        white = ((rows - scorer.state["mean"]) / scorer.state["scale"]).clamp(-5, 5)
        expected = torch.zeros(3)
        for j in range(4):
            turned = white.rot90(j, (2, 3))
            logs = encode(turned, scorer.state, "classifier").log_softmax(1)
            if statistic == "mean":
                expected -= logs[:, j] / 4
            else:
                expected -= ((scorer.state["concentration"][j] - 1) * logs).sum(1) / 4
        torch.testing.assert_close(scorer.score(Activations(inputs=rows)), expected)


def test_images_are_made_square_and_what_does_not_fit_is_named() -> None:
    reference = Reference.from_arrays(inputs=torch.rand(30, 3, 9, 6))
    scorer = Scorer.learn(Geom(epochs=1, width=2), reference)
    assert scorer.state["mean"].shape == (3, 6, 6)
    with pytest.raises(ContractError, match="'rotations', 'all'"):
        Geom(transformations="flips")  # type: ignore[arg-type]
    with pytest.raises(StateError, match="concentration"):
        Scorer(Geom(width=2, statistic="dirichlet"), scorer.state)
