"""CSI: the contrastive loss, the views, the bank and its weights, and the score."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.csi import CSI, contrast, draw_views, look
from oodmon.errors import StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations

SMALL = {"epochs": 6, "width": 4, "learning_rate": 3e-3, "bank": 40, "views": 2}


def ramps(rows: int, seed: int = 0, *, lying: bool = False) -> Tensor:
    """Brighter to the right, by random amounts, or (lying) downwards."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.linspace(0, 1, 8) * (0.5 + torch.rand(rows, 1, 1, 1, generator=draw))
    found = found.expand(rows, 1, 8, 8) + 0.05 * torch.randn(rows, 1, 8, 8, generator=draw)
    return found.mT if lying else found


def learnt(**options: object) -> Scorer:
    detector = CSI(**{**SMALL, **options})  # type: ignore[arg-type]
    return Scorer.learn(detector, Reference.from_arrays(inputs=ramps(200)))


def test_the_contrast_of_every_row_with_its_other_view() -> None:
    embedding = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    unit = [row / row.norm() for row in embedding]
    expected = []
    for i in range(6):
        like = {j: float(unit[i] @ unit[j]) / 0.5 for j in range(6) if j != i}
        expected.append(math.log(sum(map(math.exp, like.values()))) - like[(i + 3) % 6])
    torch.testing.assert_close(contrast(embedding), torch.tensor(expected))


def test_views_show_parts_that_lie_within_the_image() -> None:
    views = draw_views(200, torch.Generator().manual_seed(0))
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, 1]])
    assert float((views @ corners.T).abs().max()) <= 1.0 + 1e-6
    assert 0.6 <= float(views[:, 0, 0].min()) < 0.65
    assert torch.equal(views[:, 0, 0], views[:, 1, 1])
    images = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(3, 2, 3)
    torch.testing.assert_close(look(images, whole), images)
    half = torch.tensor([[0.5, 0, 0.5], [0, 1, 0]]).expand(3, 2, 3)
    right = look(images, half)
    torch.testing.assert_close(right[..., 7], images[..., 7] * 0.75 + images[..., 7] * 0.25)
    assert look(images[:0], whole[:0]).shape == (0, 2, 8, 8)


def test_the_bank_is_of_unit_length_and_the_weights_balance_the_terms() -> None:
    scorer = learnt()
    state = scorer.state
    assert state["bank"].shape == (4, 40, 128)
    torch.testing.assert_close(state["bank"].norm(dim=2), torch.ones(4, 40))
    assert torch.equal(state["views"][0], torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    assert bool((state["shift_weight"] > 0).all())
    # on the reference each of the two terms is 1 in the mean, if every sample were in the bank
    mean = float(scorer.score(Activations(inputs=ramps(200))).mean())
    assert mean == pytest.approx(-2.0, abs=0.2)


def test_what_is_turned_is_seen() -> None:
    scorer = learnt()
    inside = scorer.score(Activations(inputs=ramps(100, seed=1))).numpy()
    outside = scorer.score(Activations(inputs=ramps(100, seed=2, lying=True))).numpy()
    assert auroc(inside, outside) > 0.9


def test_an_untrained_turn_is_left_out() -> None:
    scorer = learnt(epochs=1, learning_rate=1e-9)
    weight = scorer.state["shift_weight"]
    assert bool((weight >= 0).all())
    assert bool((weight == 0).any())  # by chance, some turn's margin is negative
    assert bool(scorer.score(Activations(inputs=ramps(5))).isfinite().all())


def test_a_bank_that_does_not_fit_is_named() -> None:
    scorer = learnt(epochs=1)
    for bank in (torch.zeros(4, 41, 128), torch.zeros(4, 0, 128), torch.zeros(3, 5, 128)):
        with pytest.raises(StateError, match=r"'bank': expected float32 \(4, 1 to 40, 128\)"):
            Scorer(scorer.detector, {**scorer.state, "bank": bank})
    with pytest.raises(StateError, match="'views'"):
        Scorer(scorer.detector, {**scorer.state, "views": torch.zeros(3, 2, 3)})
