"""gmm: densities per class and by EM, against float64 oracles."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oodmon.detectors import Reference, Scorer, mixture
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.blobs import blobs, strange
from tests.peers import pytorch_ood, rank_agreement

WIDTH = 8
FRESH = torch.cat([blobs(100, WIDTH, seed=1)[0], 1.5 * strange(100, WIDTH)])


def learnt(rows: Tensor, labels: Tensor | None, **options: Any) -> Scorer:
    given = Reference.from_arrays({"f": rows}, labels=labels)
    return Scorer.learn(detectors.create("gmm", layer="f", **options), given)


def scores(scorer: Scorer, rows: Tensor = FRESH) -> Tensor:
    return scorer.score(Activations({"f": rows}))


def shrunk(spread: np.ndarray, rows: float) -> np.ndarray:
    """Oracle approximating shrinkage."""
    p, trace, squares = len(spread), np.trace(spread), np.trace(spread @ spread)
    rho = ((1 - 2 / p) * squares + trace**2) / ((rows + 1 - 2 / p) * (squares - trace**2 / p))
    rho = min(1.0, rho)
    found: np.ndarray = (1 - rho) * spread + rho * trace / p * np.eye(p)
    return found


def density(x: np.ndarray, labels: np.ndarray, z: np.ndarray, kind: str) -> np.ndarray:
    """Minus log-density, directly: one Gaussian after the other."""
    counts = np.bincount(labels)
    means = np.array([x[labels == c].mean(axis=0) for c in range(len(counts))])
    scatter = [
        (x[labels == c] - means[c]).T @ (x[labels == c] - means[c]) for c in range(len(counts))
    ]
    pooled = np.sum(scatter, axis=0) / len(x)
    total = np.zeros(len(z))
    for c, count in enumerate(counts):
        if kind == "shared":
            spread = shrunk(pooled, len(x))
        elif kind == "diagonal":
            spread = np.diag(np.diag(scatter[c] + pooled) / (count + 1))
        else:
            spread = shrunk((scatter[c] + pooled) / (count + 1), count + 1)
        away = z - means[c]
        distance = (away * np.linalg.solve(spread, away.T).T).sum(axis=1)
        log = np.log(count / len(x)) - 0.5 * np.linalg.slogdet(spread)[1] - 0.5 * distance
        total = log if c == 0 else np.logaddexp(total, log)
    return -np.asarray(total)


@pytest.mark.parametrize("kind", ["shared", "diagonal", "full"])
def test_density_per_class_is_its_formula(kind: str) -> None:
    rows, labels = blobs(700, WIDTH)
    expected = density(rows.double().numpy(), labels.numpy(), FRESH.double().numpy(), kind)
    found = scores(learnt(rows, labels, covariance=kind))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_far_from_zero_and_between_components_no_digit_is_lost() -> None:
    rows, labels = blobs(700, WIDTH)
    near = scores(learnt(rows, labels))
    far = scores(learnt(rows + 1e3, labels), FRESH + 1e3)
    np.testing.assert_allclose(far, near, rtol=1e-3, atol=0.05)
    # of two equal components that fit alike, the density is that of both
    twin = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(200, 1)
    twin = twin + 0.1 * torch.randn(twin.shape, generator=torch.Generator().manual_seed(0))
    scorer = learnt(twin, torch.arange(400) % 2, covariance="diagonal")
    at = scores(scorer, torch.tensor([[0.0, 0.0]]))
    expected = density(twin.double().numpy(), np.arange(400) % 2, np.zeros((1, 2)), "diagonal")
    np.testing.assert_allclose(at, expected, rtol=1e-3)


def test_full_ranks_as_pytorch_ood_does() -> None:
    rows, labels = blobs(20_000, 6)
    fresh = torch.cat([blobs(150, 6, seed=1)[0], strange(150, 6)])
    fresh, rows = fresh + torch.rand(300, 6) * 0.1, rows + torch.rand(20_000, 6) * 0.1
    peer = pytorch_ood().GMM(None).fit_features(rows, labels)
    # theirs is not shrunk: with so many rows it hardly matters
    found = scores(learnt(rows, labels, covariance="full"), fresh)
    assert rank_agreement(found, peer.predict_features(fresh)) >= 0.999


@pytest.mark.parametrize("kind", ["shared", "diagonal", "full"])
def test_steps_find_components_that_lie_apart(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (900,), generator=draw)
    centres = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]])
    rows = centres[labels] + torch.randn(900, 2, generator=draw)
    scorer = learnt(rows, None, covariance=kind, components=3)
    by_class = learnt(rows, labels, covariance=kind)
    fresh = torch.cat([rows[:50] + 0.5, 40 * torch.rand(50, 2, generator=draw)])
    np.testing.assert_allclose(scores(scorer, fresh), scores(by_class, fresh), rtol=1e-2, atol=2e-2)


def test_steps_never_lower_the_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = blobs(500, WIDTH)[0]
    monkeypatch.setattr(mixture, "_CONVERGED", 0.0)
    means = [
        float(scores(learnt(rows, None, components=4, steps=steps), rows).mean())
        for steps in (1, 2, 4, 8)
    ]
    # all but never: the prior on the variances moves with the components
    assert all(after < before + 1e-3 for before, after in itertools.pairwise(means))
    assert means[0] > means[-1] + 0.05


def test_more_components_than_kinds_of_rows_stay_finite() -> None:
    rows = torch.eye(3).repeat(20, 1)
    for kind in ("shared", "diagonal", "full"):
        found = scores(learnt(rows, None, components=6, covariance=kind), torch.rand(4, 3))
        assert bool(found.isfinite().all())


def test_components_of_different_width_are_told_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (2000,), generator=draw)
    wide = torch.where(labels == 0, 0.1, 5.0)[:, None]
    rows = torch.randn(2000, 4, generator=draw) * wide + 20.0 * labels[:, None]
    # 1 away from the narrow class is strange, 5 away from the wide one is not
    strange_rows = torch.randn(100, 4, generator=draw) * 0.1 + 1.0
    usual = torch.randn(100, 4, generator=draw) * 5.0 + 20.0
    for kind in ("diagonal", "full"):
        scorer = learnt(rows, labels, covariance=kind)
        assert auroc(scores(scorer, usual).numpy(), scores(scorer, strange_rows).numpy()) > 0.99


def test_what_would_take_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = blobs(100, WIDTH)
    monkeypatch.setattr(mixture, "_FULL_BYTES", 4 * WIDTH**2 * 8)
    for options in ({}, {"components": 5}):
        with pytest.raises(ContractError, match=r"gmm\.covariance: full ones of 5 components"):
            learnt(rows, labels, covariance="full", **options)
    assert scores(learnt(rows, labels % 4, covariance="full")).shape == (200,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"covariance": "round"}, r"\.covariance: 'round'"),
        ({"labels": "none"}, r"\.labels: 'none'"),
        ({"components": -1}, ": components must not be negative"),
        ({"steps": 0}, ": components must not be negative, rows and steps must be positive"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError, match=f"detectors.gmm{said}"):
        detectors.create("gmm", **options)


def test_more_components_than_rows_and_foreign_states_are_said() -> None:
    rows, labels = blobs(5, WIDTH)
    with pytest.raises(ContractError, match=r"gmm\.components: 6 are wanted.* 5 rows"):
        learnt(rows, None, components=6)
    shared = learnt(rows, labels)
    with pytest.raises(StateError, match="spread"):
        Scorer(detectors.create("gmm", layer="f", covariance="full"), shared.state)
