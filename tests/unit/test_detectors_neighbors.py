"""knn and nnguide: exact search, bounded banks, coresets and their recall."""

from __future__ import annotations

import functools
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oodmon.detectors import Reference, Scorer, cellindex, nearest
from oodmon.detectors.coresets import coreset
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.blobs import blobs, head, logits, reference, strange
from tests.peers import pytorch_ood, rank_agreement

WIDTH = 12


def learnt(name: str, rows: Tensor, **options: Any) -> Scorer:
    given = reference(rows, torch.zeros(len(rows), dtype=torch.int64))
    return Scorer.learn(detectors.create(name, layer="f", **options), given)


def scores(scorer: Scorer, rows: Tensor) -> Tensor:
    return scorer.score(Activations({"f": rows}, logits(rows)))


def oracle(bank: Tensor, rows: Tensor, k: int, *, normalize: bool) -> np.ndarray:
    """Every distance, sorted."""
    a, b = rows.double().numpy(), bank.double().numpy()
    if normalize:
        a = a / np.linalg.norm(a, axis=1, keepdims=True)
        b = b / np.linalg.norm(b, axis=1, keepdims=True)
    found: np.ndarray = np.sort(np.linalg.norm(a[:, None] - b[None], axis=2), axis=1)[:, k - 1]
    return found


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 7])
def test_knn_is_exact(k: int, normalize: bool) -> None:
    rows, fresh = blobs(500, WIDTH)[0], blobs(60, WIDTH, seed=1)[0]
    found = scores(learnt("knn", rows, k=k, normalize=normalize), fresh)
    np.testing.assert_allclose(found, oracle(rows, fresh, k, normalize=normalize), rtol=2e-6)


def test_a_stored_row_is_at_distance_zero() -> None:
    # |a|² + |b|² - 2ab would leave rounding here
    rows = blobs(300, WIDTH)[0] + 100.0
    found = scores(learnt("knn", rows, k=1, normalize=False), rows[:40])
    assert found.tolist() == [0.0] * 40


def test_chunks_of_bank_and_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fresh = blobs(500, WIDTH)[0], blobs(60, WIDTH, seed=1)[0]
    whole = [learnt(name, rows, k=4) for name in ("knn", "nnguide")]
    expected = [scores(scorer, fresh) for scorer in whole]
    monkeypatch.setattr(nearest, "_ROWS", 25)
    monkeypatch.setattr(nearest, "_LIKENESSES", 25 * 33)
    for scorer, column in zip(whole, expected, strict=True):
        torch.testing.assert_close(scores(scorer, fresh), column)


@pytest.mark.parametrize("size", [1, 64, 300, 1024, 1337])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_best_by_blocks_are_the_best(size: int, k: int) -> None:
    draw = torch.Generator().manual_seed(size)
    bank = torch.randn((size, 3), generator=draw).mul_(4.0).round_()  # many ties
    rows = torch.randn((20, 3), generator=draw)
    half = nearest.half_squares(bank)
    for taken in (None, half):
        alike = rows @ bank.T - (0.0 if taken is None else taken)
        value, place = nearest.best(rows, bank, taken, min(k, size))
        expected = alike.sort(dim=1, descending=True).values[:, :k]
        torch.testing.assert_close(value.sort(dim=1, descending=True).values, expected)
        torch.testing.assert_close(alike.gather(1, place), value)
        assert all(len(set(row)) == len(row) for row in place.tolist()), "a place taken twice"


def test_a_row_that_is_not_finite_spoils_no_search_but_its_own() -> None:
    bank, rows = blobs(1000, WIDTH)[0], blobs(6, WIDTH, seed=1)[0]
    expected = nearest.best(rows, bank, None, 3)[0]
    rows[2, 5] = torch.nan
    found = nearest.best(rows, bank, None, 3)[0]
    assert found[2].isnan().all()
    keep = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(found[keep], expected[keep])


def test_the_bank_is_bounded_by_a_uniform_sample() -> None:
    rows = torch.arange(5000.0)[:, None] + 1.0
    scorer = learnt_flat(rows, rows=200)
    bank = scorer.state["bank"].flatten()
    assert len(bank) == len(set(bank.tolist())) == 200
    assert 2000 < float(bank.mean()) < 3000
    assert set(bank.tolist()) <= set(rows.flatten().tolist())
    assert learnt_flat(rows, rows=200).digest == scorer.digest


def learnt_flat(features: Tensor, **options: Any) -> Scorer:
    detector = detectors.create("knn", layer="f", k=1, normalize=False, **options)
    return Scorer.learn(detector, Reference.from_arrays({"f": features}))


def test_a_coreset_leaves_no_row_far_from_it() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(600, 3, generator=draw)
    given = Reference.from_arrays({"f": rows})
    chosen = coreset(rows, 60, given)
    assert len(set(chosen.tolist())) == 60
    radius = float(torch.cdist(rows, rows[chosen]).amin(dim=1).max())
    samples = [torch.randperm(600, generator=draw)[:60] for _ in range(20)]
    random = [float(torch.cdist(rows, rows[some]).amin(dim=1).max()) for some in samples]
    assert radius < min(random)
    # greedy: every point was at least the final radius away from those before it
    apart = torch.cdist(rows[chosen], rows[chosen]) + 9 * torch.eye(60)
    assert float(apart.min()) >= radius - 1e-6


def test_a_coreset_of_copies_has_no_point_twice() -> None:
    rows = torch.eye(4).repeat(50, 1)
    assert len(coreset(rows, 20, Reference.from_arrays({"f": rows}))) == 4


def test_recall_is_what_it_says() -> None:
    rows, _ = blobs(1000, WIDTH)
    rows[::50] = 3 * strange(20, WIDTH)
    exact = learnt("knn", rows, k=1)
    assert float(exact.state["recall"]) == 1.0
    large, small = (learnt("knn", rows, k=1, coreset=size) for size in (700, 5))
    assert len(large.state["bank"]) == 700
    assert float(large.state["recall"]) >= 0.6
    assert float(small.state["recall"]) < float(large.state["recall"]) <= 1.0
    inside, outside = (
        scores(large, blobs(200, WIDTH, seed=1)[0]),
        scores(large, strange(200, WIDTH)),
    )
    assert auroc(inside.numpy(), outside.numpy()) > 0.85


def test_knn_ranks_as_pytorch_ood_does() -> None:
    rows, labels = blobs(2000, WIDTH)
    fresh = torch.cat([blobs(200, WIDTH, seed=1)[0], strange(200, WIDTH)])
    peer = pytorch_ood().KNN(None, k=20).fit_features(rows, labels)
    assert (
        rank_agreement(scores(learnt("knn", rows, k=20), fresh), peer.predict_features(fresh))
        >= 0.9999
    )


def test_nnguide_is_its_formula_and_ranks_as_pytorch_ood_does() -> None:
    rows, labels = blobs(800, WIDTH)
    fresh = torch.cat([blobs(100, WIDTH, seed=1)[0], strange(100, WIDTH)])
    found = scores(learnt("nnguide", rows, k=5), fresh)
    x, b = fresh.double(), rows.double()
    bank = b / b.norm(dim=1, keepdim=True) * logits(rows).double().logsumexp(1, keepdim=True)
    guidance = ((x / x.norm(dim=1, keepdim=True)) @ bank.T).sort(dim=1).values[:, -5:].mean(dim=1)
    expected = -guidance * logits(fresh).double().logsumexp(1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    linear = torch.nn.Linear(WIDTH, 5)
    with torch.no_grad():
        linear.weight.copy_(head(WIDTH)[0])
        linear.bias.copy_(head(WIDTH)[1])
    peer = pytorch_ood().NNGuide(None, linear, k=5).fit_features(rows, labels)
    assert rank_agreement(found, peer.predict_features(fresh).detach()) >= 0.9999


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("knn", {"k": -1}, "k: -1 is negative"),
        ("knn", {"k": 9, "rows": 8}, "rows: 8 is less than k, 9"),
        ("knn", {"k": 9, "coreset": 8}, "coreset: 8 is less than k, 9"),
        ("nnguide", {"rows": 0}, "rows: 0 is not positive"),
        ("nnguide", {"k": 9, "rows": 8}, "rows: 8 is less than k, 9"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ContractError, match=rf"detectors\.{name}\.{said}"):
        detectors.create(name, **options)


@pytest.mark.parametrize("name", ["knn", "nnguide"])
def test_more_neighbours_than_rows(name: str) -> None:
    with pytest.raises(ContractError, match=rf"detectors\.{name}\.k: 30 .* 20 rows"):
        learnt(name, blobs(20, WIDTH)[0], k=30)


def test_a_state_of_other_shapes_is_refused() -> None:
    scorer = learnt("knn", blobs(100, WIDTH)[0])
    with pytest.raises(StateError, match="half"):
        Scorer(scorer.detector, {**scorer.state, "half": torch.zeros(3)})


@pytest.mark.parametrize(
    ("count", "options", "k"),
    [(90, {}, 1), (1000, {}, 10), (6000, {}, 50), (1000, {"k": 3}, 3), (2000, {"coreset": 900}, 5)],
)
def test_the_neighbour_that_counts_follows_the_bank(
    count: int, options: dict[str, int], k: int
) -> None:
    rows, _ = blobs(count, WIDTH)
    fresh, _ = blobs(20, WIDTH, seed=2)
    scorer = learnt("knn", rows, normalize=False, **options)
    apart = torch.cdist(fresh, scorer.state["bank"]).sort(dim=1).values
    assert scores(scorer, fresh) == pytest.approx(apart[:, k - 1].numpy(), rel=1e-4)


def test_few_samples_per_class_do_not_turn_it_upside_down() -> None:
    """With the paper's 50th of 8 samples per class, doubtful samples would score lower."""
    tight = blobs(80, WIDTH, classes=10)[0]
    fresh, other = blobs(300, WIDTH, classes=10, seed=2)[0], strange(300, WIDTH, classes=10, seed=3)
    found, paper = (learnt("knn", tight, k=k) for k in (0, 50))
    assert auroc(scores(found, fresh), scores(found, other)) > 0.9
    assert auroc(scores(paper, fresh), scores(paper, other)) < 0.8


def test_an_index_that_searches_every_cell_finds_the_same_neighbours() -> None:
    pytest.importorskip("faiss")
    rows, fresh = blobs(900, WIDTH)[0], blobs(80, WIDTH, seed=1)[0]
    whole = learnt("knn", rows, k=7)
    indexed = learnt("knn", rows, k=7, index="faiss", probes=10_000)
    assert len(indexed.state["cells"]) == 120
    assert float(indexed.state["recall"]) == 1.0
    torch.testing.assert_close(scores(indexed, fresh), scores(whole, fresh))
    few = learnt("knn", rows, k=7, index="faiss", probes=2)
    assert 0.2 < float(few.state["recall"]) < 1.0
    # fewer cells can only find farther neighbours
    assert bool((scores(few, fresh) >= scores(whole, fresh) - 1e-6).all())


def test_rows_without_enough_neighbours_in_their_cells_are_compared_with_the_bank() -> None:
    pytest.importorskip("faiss")
    rows, fresh = blobs(300, WIDTH)[0], blobs(40, WIDTH, seed=1)[0]
    fresh[3, 2] = float("nan")
    whole = learnt("knn", rows, k=200)
    indexed = learnt("knn", rows, k=200, index="faiss", probes=1)
    expected, found = scores(whole, fresh), scores(indexed, fresh)
    assert bool(found[3].isnan())
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_an_index_is_made_once_and_forgotten_with_its_bank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faiss = pytest.importorskip("faiss")
    rows, fresh = blobs(300, WIDTH)[0], blobs(40, WIDTH, seed=1)[0]
    before = len(cellindex._MADE)
    scorer = learnt("knn", rows, k=3, index="faiss")
    assert len(cellindex._MADE) == before  # that of learning went with its tensors
    made: list[int] = []
    real = faiss.IndexIVFFlat

    def counted(*given: Any) -> Any:
        made.append(len(given))
        return real(*given)

    monkeypatch.setattr(faiss, "IndexIVFFlat", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(functools.partial(scores, scorer), [fresh] * 16))
    assert all(torch.equal(one, found[0]) for one in found)
    assert len(made) == 1
    assert len(cellindex._MADE) == before + 1
    del scorer
    gc.collect()
    assert len(cellindex._MADE) == before


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ContractError, match=r"index: 'faiss' needs faiss: pip install 'oodmon\[fa"):
        learnt("knn", blobs(50, WIDTH)[0], k=3, index="faiss")
    for options, said in (
        ({"index": "annoy"}, "'annoy' is neither 'product' nor 'faiss'"),
        ({"index": "faiss", "probes": 0}, "probes: 0 is not positive"),
        ({"index": "faiss", "coreset": 100}, "give 'faiss' or a coreset"),
    ):
        with pytest.raises(ContractError, match=said):
            detectors.create("knn", **options)
