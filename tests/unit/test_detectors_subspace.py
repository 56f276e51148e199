"""residual, vim and pca: what lies outside of the reference's principal space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oodmon.detectors import Scorer
from oodmon.detectors.subspace import Residual
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.blobs import blobs, head, logits, reference, strange
from tests.peers import pytorch_ood, rank_agreement

WIDTH = 20
ROWS, LABELS = blobs(900, WIDTH)
FRESH = torch.cat([blobs(150, WIDTH, seed=1)[0], strange(150, WIDTH)])


def learnt(name: str, *, known: bool = True, **options: Any) -> Scorer:
    detector = detectors.create(name, layer="f", **options)
    return Scorer.learn(detector, reference(ROWS, LABELS, known=known))


def scores(scorer: Scorer, rows: Tensor = FRESH) -> Tensor:
    return scorer.score(Activations({"f": rows}, logits(rows)))


def outside(center: np.ndarray, dimensions: int, rows: Tensor) -> np.ndarray:
    """Length of what the first right singular vectors of the centred reference leave over."""
    _, _, axes = np.linalg.svd(ROWS.double().numpy() - center)
    away = rows.double().numpy() - center
    principal = axes[:dimensions]
    found: np.ndarray = np.linalg.norm(away - away @ principal.T @ principal, axis=1)
    return found


def origin() -> np.ndarray:
    weight, bias = (tensor.double().numpy() for tensor in head(WIDTH))
    found: np.ndarray = -np.linalg.pinv(weight, rcond=1e-5) @ bias
    return found


def mean() -> np.ndarray:
    found: np.ndarray = ROWS.double().numpy().mean(axis=0)
    return found


@pytest.mark.parametrize("where", ["mean", "head"])
def test_residual_is_its_formula(where: str) -> None:
    found = scores(learnt("residual", dimensions=6, origin=where))
    center = mean() if where == "mean" else origin()
    np.testing.assert_allclose(found, outside(center, 6, FRESH), rtol=1e-4)


def vim(dimensions: int) -> np.ndarray:
    z, given = logits(FRESH).double().numpy(), logits(ROWS).double().numpy()
    alpha = given.max(axis=1).mean() / outside(origin(), dimensions, ROWS).mean()
    energy = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
    found: np.ndarray = alpha * outside(origin(), dimensions, FRESH) - energy
    return found


def test_vim_is_its_formula() -> None:
    np.testing.assert_allclose(scores(learnt("vim", dimensions=6)), vim(6), rtol=1e-4, atol=1e-3)


def test_vim_finds_a_head_that_it_was_not_told() -> None:
    found = scores(learnt("vim", dimensions=6, known=False))
    np.testing.assert_allclose(found, vim(6), rtol=1e-3, atol=1e-2)


def test_vim_ranks_as_pytorch_ood_does() -> None:
    weight, bias = head(WIDTH)
    peer = pytorch_ood().ViM(None, d=8, w=weight, b=bias).fit_features(ROWS, LABELS)
    found = scores(learnt("vim", dimensions=8))
    assert rank_agreement(found, peer.predict_features(FRESH)) >= 0.9999


def test_pca_is_the_share_that_is_not_reconstructed() -> None:
    scorer = learnt("pca", share=0.7)
    spread = np.linalg.svd(ROWS.double().numpy() - mean(), compute_uv=False) ** 2
    count = int((spread.cumsum() / spread.sum() < 0.7).sum()) + 1
    assert scorer.state["complement"].shape == (WIDTH, WIDTH - count)
    expected = outside(mean(), count, FRESH) / np.linalg.norm(FRESH.double().numpy(), axis=1)
    np.testing.assert_allclose(scores(scorer), expected, rtol=1e-4)


def test_features_of_nothing_have_a_finite_share() -> None:
    found = scores(learnt("pca"), torch.zeros(1, WIDTH))
    assert bool(found.isfinite().all())
    assert float(found) > float(scores(learnt("pca")).max())


def test_the_papers_rule_for_dimensions() -> None:
    rule = Residual()._principal
    assert [rule(width) for width in (2, 10, 767, 768, 2047, 2048)] == [1, 5, 383, 512, 512, 1000]
    assert Residual(dimensions=3)._principal(10) == 3


def test_a_reference_without_residual_leaves_vim_finite() -> None:
    flat = ROWS.clone()
    flat[:, WIDTH // 2 :] = 0.0
    detector = detectors.create("vim", layer="f", dimensions=WIDTH // 2)
    scorer = Scorer.learn(detector, reference(flat, LABELS))
    assert bool(scorer.state["alpha"].isfinite())
    assert bool(scores(scorer).isfinite().all())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("residual", {"dimensions": -1}, "dimensions: -1 is negative"),
        ("residual", {"origin": "zero"}, "origin: 'zero'"),
        ("pca", {"share": 1.0}, "share: 1.0 is not in"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError, match=rf"detectors\.{name}\.{said}"):
        detectors.create(name, **options)


def test_what_cannot_be_learnt_is_said() -> None:
    with pytest.raises(ContractError, match=r"vim\.dimensions: 20 of 20 features"):
        learnt("vim", dimensions=20)
    with pytest.raises(ContractError, match=r"residual\.origin: the reference does not know"):
        learnt("residual", known=False, origin="head")
