"""Moments in one pass, and the Mahalanobis distances that come from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.moments import Moments, covariance, moments, whitener
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.blobs import blobs
from tests.peers import pytorch_ood, rank_agreement

CPU = torch.device("cpu")


def learnt(rows: Tensor, labels: Tensor, name: str = "mahalanobis", **options: Any) -> Scorer:
    detector = detectors.create(name, layer="f", **options)
    return Scorer.learn(detector, Reference.from_arrays({"f": rows}, labels=labels))


def scores(scorer: Scorer, rows: Tensor) -> Tensor:
    return scorer.score(Activations({"f": rows}))


def oracle(
    fit: Tensor, labels: Tensor, rows: Tensor, ridge: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest-class and background distances, directly, in float64."""
    x, y, z = fit.double().numpy(), labels.numpy(), rows.double().numpy()
    means = np.array([x[y == c].mean(axis=0) for c in np.unique(y)])
    own = means[np.searchsorted(np.unique(y), y)]
    within = (x - own).T @ (x - own) / len(x) + ridge * np.eye(x.shape[1])
    total = np.cov(x.T, bias=True) + ridge * np.eye(x.shape[1])

    def distance(mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
        away = z - mean
        found: np.ndarray = (away * np.linalg.solve(spread, away.T).T).sum(axis=1)
        return found

    near = np.min([distance(mean, within) for mean in means], axis=0)
    return near, distance(x.mean(axis=0), total)


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_moments_in_chunks_are_those_of_the_whole(chunk: int) -> None:
    # far from zero: sums of squares in one go would lose most digits here
    rows, labels = blobs(1200, 8)
    rows = rows + 1e4
    whole = Moments(8, CPU)
    whole.add(rows, labels)
    parts = Moments(8, CPU)
    for start in range(0, len(rows), chunk):
        parts.add(rows[start : start + chunk], labels[start : start + chunk])
    exact = rows.double().numpy()
    own = np.array([exact[labels == c].mean(axis=0) for c in range(5)])
    away = exact - own[labels.numpy()]
    for found in (whole, parts):
        assert found.counts.tolist() == labels.bincount().tolist()
        np.testing.assert_allclose(found.means.numpy(), own, rtol=1e-12)
        np.testing.assert_allclose(found.within.numpy(), away.T @ away, rtol=1e-6, atol=1e-6)
        spread = np.cov(exact.T, bias=True) * len(exact)
        np.testing.assert_allclose(found.total().numpy(), spread, rtol=1e-6, atol=1e-6)


def test_moments_merge_also_where_one_side_lacks_a_class() -> None:
    rows, labels = blobs(600, 6)
    early = labels < 3
    left, right, whole = Moments(6, CPU), Moments(6, CPU), Moments(6, CPU)
    left.add(rows[early][:100], labels[early][:100])
    right.add(
        torch.cat([rows[early][100:], rows[~early]]),
        torch.cat([labels[early][100:], labels[~early]]),
    )
    whole.add(rows, labels)
    left.merge(right)
    left.merge(Moments(6, CPU))
    torch.testing.assert_close(left.counts, whole.counts)
    torch.testing.assert_close(left.means, whole.means, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(left.within, whole.within, rtol=1e-10, atol=1e-9)


def test_the_batch_size_of_the_reference_changes_no_bit() -> None:
    rows, labels = blobs(2600, 5)
    found = []
    for size in (1, 7, 500, 2600):
        reference = Reference.from_arrays({"f": rows}, labels=labels, batch_size=size)
        found.append(Scorer.learn(detectors.create("mahalanobis", layer="f"), reference))
    assert len({scorer.digest for scorer in found}) == 1


def test_rows_that_are_not_finite_are_left_out() -> None:
    rows, labels = blobs(300, 5)
    spoilt, bad = rows.clone(), torch.tensor([3, 150, 299])
    spoilt[bad, 2] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    kept = torch.ones(300, dtype=torch.bool)
    kept[bad] = False
    assert learnt(spoilt, labels).digest == learnt(rows[kept], labels[kept]).digest
    with pytest.raises(ContractError, match="no row that is finite"):
        learnt(torch.full((4, 2), float("nan")), torch.zeros(4, dtype=torch.int64))


def test_labels_count_from_zero_and_have_to_be_there() -> None:
    rows, labels = blobs(50, 4)
    with pytest.raises(ContractError, match="labels: -2 is no class"):
        learnt(rows, labels - 2)
    with pytest.raises(ContractError, match=r"mahalanobis: the reference has no labels"):
        Scorer.learn(detectors.create("mahalanobis", layer="f"), Reference.from_arrays({"f": rows}))


def test_oracle_approximating_shrinkage() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(12, 30)) * np.linspace(0.1, 3, 30)
    spread = np.cov(x.T, bias=True)
    p, n, trace, squares = 30, 12, np.trace(spread), np.trace(spread @ spread)
    rho = ((1 - 2 / p) * squares + trace**2) / ((n + 1 - 2 / p) * (squares - trace**2 / p))
    assert 0.1 < rho < 0.9
    found = covariance(torch.from_numpy(spread * n), n, "oas").numpy()
    np.testing.assert_allclose(found, (1 - rho) * spread + rho * trace / p * np.eye(p), rtol=1e-12)
    # one row, and rows that are all alike: the spread is unknown, and nothing is divided by zero
    for scatter in (torch.zeros(3, 3), torch.eye(3)):
        assert bool(whitener(covariance(scatter.double(), 1, "oas")).isfinite().all())


@pytest.mark.parametrize("name", ["mahalanobis", "relative_mahalanobis"])
def test_scores_are_those_of_the_formula(name: str) -> None:
    rows, labels = blobs(900, 12)
    fresh = torch.cat(
        [
            blobs(60, 12, seed=1)[0],
            40 * torch.rand(20, 12, generator=torch.Generator().manual_seed(3)),
        ]
    )
    near, background = oracle(rows, labels, fresh)
    expected = near if name == "mahalanobis" else near - background
    found = scores(learnt(rows, labels, name, shrinkage="none"), fresh).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "theirs"), [("mahalanobis", "Mahalanobis"), ("relative_mahalanobis", "RMD")]
)
def test_ranks_as_pytorch_ood_does(name: str, theirs: str) -> None:
    rows, labels = blobs(4000, 24)
    fresh = torch.cat([blobs(500, 24, seed=1)[0], blobs(500, 24, seed=2)[0] * 1.5])
    peer = getattr(pytorch_ood(), theirs)(None).fit_features(rows, labels)
    found = scores(learnt(rows, labels, name, shrinkage="none"), fresh)
    assert rank_agreement(found, peer.predict_features(fresh)) >= 0.9999


def test_fewer_rows_than_features() -> None:
    rows, labels = blobs(60, 96)
    scorer = learnt(rows, labels)
    inside = scores(scorer, blobs(200, 96, seed=1)[0])
    # a mean of the classes: ordinary in every unit, and yet of no class
    outside = scores(scorer, blobs(200, 96, seed=2)[0].roll(1, dims=1))
    assert float(inside.min()) > 0.0
    assert auroc(inside.numpy(), outside.numpy()) > 0.95
    scaled = learnt(rows * 0.01, labels)
    np.testing.assert_allclose(scores(scaled, blobs(200, 96, seed=1)[0] * 0.01), inside, rtol=2e-3)


@pytest.mark.parametrize("shrinkage", ["oas", "none"])
def test_duplicated_and_dead_units(shrinkage: str) -> None:
    rows, labels = blobs(800, 10)

    def wider(part: Tensor) -> Tensor:
        return torch.cat([part, part[:, :4], torch.zeros(len(part), 2)], dim=1)

    scorer = learnt(wider(rows), labels, shrinkage=shrinkage)
    fresh = blobs(100, 10, seed=1)[0]
    inside = scores(scorer, wider(fresh))
    plain = scores(learnt(rows, labels, shrinkage=shrinkage), fresh)
    # where nothing is shrunk, what is said twice counts once
    np.testing.assert_allclose(inside, plain, rtol=0.02 if shrinkage == "none" else 0.2)
    awake = wider(fresh)
    awake[:, -1] = 1.0
    assert float(scores(scorer, awake).min()) > 5.0 * float(inside.max())


def test_a_class_without_rows_and_labels_that_start_at_one() -> None:
    rows, labels = blobs(500, 6)
    kept = (labels != 0) & (labels != 3)
    scorer = learnt(rows[kept], labels[kept])
    assert scorer.state["means.0"].shape == (3, 6)
    inside, missing = scores(scorer, rows[kept]), scores(scorer, rows[~kept])
    assert bool(inside.isfinite().all())
    assert auroc(inside.numpy(), missing.numpy()) > 0.99


def test_reference_of_one_value_gives_finite_scores() -> None:
    scorer = learnt(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
    assert scores(scorer, torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 1.0]])).tolist() == [0.0, 1.0]


def test_hostile_rows() -> None:
    rows, labels = blobs(500, 6)
    scorer = learnt(rows, labels)
    hostile = torch.stack([rows[0], rows[0] * 1e4, rows[0] * 1e30, rows[0].clone(), rows[0]])
    hostile[3, 2] = float("nan")
    found = scores(scorer, hostile)
    assert bool(found[[0, 1, 2, 4]].isfinite().all())
    assert bool(found[3].isnan())
    assert float(found[2]) > float(found[1]) > float(found[0])
    torch.testing.assert_close(scores(scorer, hostile[:1]), found[:1])
    assert scores(scorer, hostile[:0]).shape == (0,)
    with pytest.raises(ContractError, match="'f': learnt with 6 features, found 5"):
        scores(scorer, hostile[:, :5])


def several(seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    first, labels = blobs(700, 4, seed=seed)
    return {"a": first * 100, "b": blobs(700, 6, seed=seed)[0]}, labels


def many(combine: str, layers: Sequence[str] = ("a", "b")) -> Scorer:
    detector = detectors.create(
        "mahalanobis", layers=tuple(layers), combine=combine, shrinkage="none"
    )
    tapped, labels = several()
    return Scorer.learn(detector, Reference.from_arrays(tapped, labels=labels))


def test_layers_side_by_side_are_one_gaussian() -> None:
    tapped, labels = several()
    fresh = several(1)[0]
    joint = learnt(torch.cat(list(tapped.values()), dim=1), labels, shrinkage="none")
    expected = scores(joint, torch.cat(list(fresh.values()), dim=1))
    torch.testing.assert_close(many("concat").score(Activations(fresh)), expected)


def test_layers_in_sum_are_weighed_by_what_is_usual() -> None:
    fresh = several(1)[0]
    expected = torch.zeros(700)
    for name, tensor in several()[0].items():
        alone = learnt(tensor, several()[1], shrinkage="none")
        # the mean distance of a row to its own class is the number of features
        expected += scores(alone, fresh[name]) / tensor.shape[1]
    torch.testing.assert_close(
        many("sum").score(Activations(fresh)), expected, rtol=1e-4, atol=1e-4
    )


def test_logits_as_features() -> None:
    rows, labels = blobs(500, 4, classes=4)
    reference = Reference.from_arrays(logits=rows, labels=labels)
    scorer = Scorer.learn(detectors.create("mahalanobis", layer="logits"), reference)
    assert scorer.reads().logits
    assert scorer.reads().layers == ()
    expected = scores(learnt(rows, labels), rows)
    torch.testing.assert_close(scorer.score(Activations(logits=rows)), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": "a", "layers": ("b",)}, "layers: give this or `layer`"),
        ({"layers": ("a", "a")}, "layers: .* names a layer twice"),
        ({"combine": "mean"}, "combine: 'mean'"),
        ({"shrinkage": "lw"}, "shrinkage: 'lw'"),
        ({"labels": "none"}, "labels: 'none'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError, match=f"detectors.mahalanobis.{said}"):
        detectors.create("mahalanobis", **options)


def test_a_state_of_other_shapes_is_refused() -> None:
    scorer = many("sum")
    with pytest.raises(StateError, match=r"whitener\.1"):
        Scorer(scorer.detector, {**scorer.state, "whitener.1": torch.zeros(4, 4)})
    with pytest.raises(StateError, match="state"):
        Scorer(detectors.create("mahalanobis", layers=("a", "b")), scorer.state)


def test_open_layers_need_a_tap() -> None:
    with pytest.raises(ContractError, match=r"detectors.mahalanobis.layer is empty"):
        Scorer.learn(
            detectors.create("mahalanobis"), Reference.from_arrays(logits=torch.zeros(3, 2))
        )


def test_moments_of_several_columns_share_a_pass() -> None:
    passes = []
    tapped, labels = several()

    def batches() -> Any:
        passes.append(1)
        yield Activations(tapped, labels=labels)

    reference = Reference.from_batches(batches)
    found = moments(reference, lambda acts: (acts.layer("a"), acts.layer("b"), labels))
    assert [one.within.shape[0] for one in found] == [4, 6]
    assert len(passes) == 1
