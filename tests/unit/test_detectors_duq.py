"""DUQ: the kernel's arithmetic, a head's output, a head fitted to frozen features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.duq import DUQ, embed, log_kernel, move_centroids
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations
from tests.golden import oracles


def blobs(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=draw)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(9)) * 4
    return centres[labels] + torch.randn(rows, 8, generator=draw) * 0.5, labels


def fitted(**options: object) -> Scorer:
    features, labels = blobs(900)
    detector = DUQ(epochs=5, **options)  # type: ignore[arg-type]
    return Scorer.learn(detector, Reference.from_arrays({"f": features}, labels=labels))


def test_the_kernel_is_that_of_the_paper() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(6, 5, generator=draw)
    weight, centroid = torch.randn(4, 3, 5, generator=draw), torch.randn(4, 3, generator=draw)
    found = log_kernel(embed(features, weight), centroid, 0.4)
    expected = oracles.kernel_distance(
        features.double().numpy(), weight.double().numpy(), centroid.double().numpy(), 0.4
    )
    np.testing.assert_allclose(-found.amax(1).numpy(), expected, rtol=1e-4)


def test_with_nothing_kept_the_centroid_is_the_batch_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    embedding, labels = torch.randn(30, 4, 3, generator=draw), torch.arange(30) % 3
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    _, _, centroid = move_centroids(embedding, one_hot, torch.ones(3), torch.ones(4, 3), 0.0)
    for c in range(3):
        torch.testing.assert_close(centroid[:, c], embedding[labels == c, :, c].mean(0))


def test_an_absent_class_keeps_a_finite_centroid() -> None:
    count, total = torch.full((3,), 1e-30), torch.zeros(4, 3)
    _, _, centroid = move_centroids(torch.ones(5, 4, 3), torch.zeros(5, 3), count, total, 0.9)
    assert bool(centroid.isfinite().all())


def test_the_slope_is_the_gradient_of_the_cross_entropy() -> None:
    from oodmon.recipes.duq import cross_entropy

    draw = torch.Generator().manual_seed(0)
    features, labels = torch.randn(20, 5, generator=draw), torch.arange(20) % 3
    centroid = torch.randn(4, 3, generator=draw)
    weight = torch.randn(4, 3, 5, generator=draw, requires_grad=True)
    detector = DUQ(embedding=4, length_scale=0.7)
    loss = cross_entropy(log_kernel(embed(features, weight), centroid, 0.7), labels)
    (expected,) = torch.autograd.grad(loss, weight)
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    found = detector._slope(features, one_hot, weight.detach(), centroid)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_far_from_all_classes_scores_high() -> None:
    scorer = fitted()
    near, _ = blobs(300, seed=3)
    far = torch.randn(300, 8, generator=torch.Generator().manual_seed(4)) * 12
    scores = [scorer.score(Activations({"f": x})).numpy() for x in (near, far)]
    assert auroc(*scores) > 0.97
    beyond = scorer.score(Activations({"f": near + 50.0}))
    assert float(beyond.min()) > scores[0].max()


def test_scores_match_the_oracle() -> None:
    scorer = fitted()
    features, _ = blobs(20, seed=5)
    state = {name: tensor.double().numpy() for name, tensor in scorer.state.items()}
    white = (features.double().numpy() - state["mean"]) / state["scale"]
    expected = oracles.kernel_distance(white, state["weight"], state["centroid"], 0.3)
    found = scorer.score(Activations({"f": features})).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_a_head_is_read_from_logits_or_from_a_layer() -> None:
    kernel = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.0, 0.0]])
    logs = torch.tensor([[-0.1, -9.0], [-400.0, -500.0], [-800.0, -700.0]])
    from_logits = Scorer(DUQ(mode="head"), {}).score(Activations(logits=logs))
    assert from_logits.tolist() == pytest.approx([0.1, 400.0, 700.0])
    values = Scorer(DUQ(mode="head", layer="head", head_output="kernel"), {})
    found = values.score(Activations({"head": kernel}))
    assert found[:2].tolist() == pytest.approx([-math.log(0.9), -math.log(0.3)])
    assert bool(found.isfinite().all())
    assert bool((found.diff() > 0).all())


def test_labels_may_be_the_predicted_ones() -> None:
    features, labels = blobs(600)
    logits = torch.nn.functional.one_hot(labels, 3).float() * 8
    given = Scorer.learn(
        DUQ(epochs=2), Reference.from_arrays({"f": features}, logits, labels=labels)
    )
    found = Scorer.learn(
        DUQ(epochs=2, labels="predicted"), Reference.from_arrays({"f": features}, logits)
    )
    assert torch.equal(given.state["weight"], found.state["weight"])
    assert given.reads().labels
    assert found.reads().logits
    with pytest.raises(ContractError, match="labels: predicted"):
        Scorer.learn(DUQ(epochs=2), Reference.from_arrays({"f": features}, logits))


def test_a_unit_that_never_moves_does_no_harm() -> None:
    features, labels = blobs(600)
    features = torch.cat([features, torch.full((600, 1), 3.0)], dim=1)
    scorer = Scorer.learn(DUQ(epochs=2), Reference.from_arrays({"f": features}, labels=labels))
    assert bool(scorer.score(Activations({"f": features})).isfinite().all())
    same = torch.ones(50, 4)
    flat = Scorer.learn(DUQ(epochs=1), Reference.from_arrays({"f": same}, labels=labels[:50]))
    assert bool(flat.score(Activations({"f": same})).isfinite().all())


def test_maps_are_averaged() -> None:
    features, labels = blobs(300)
    maps = features[:, :, None, None].expand(-1, -1, 3, 2)
    scorer = Scorer.learn(DUQ(epochs=2), Reference.from_arrays({"f": maps}, labels=labels))
    torch.testing.assert_close(
        scorer.score(Activations({"f": maps})),
        scorer.score(Activations({"f": features})),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "options",
    [{"mode": "both"}, {"epochs": 0}, {"length_scale": 0.0}, {"keep": 1.0}, {"labels": "none"}],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ContractError, match=next(iter(options))):
        DUQ(**options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_named() -> None:
    scorer = fitted()
    with pytest.raises(ContractError, match="learnt with 8 units"):
        scorer.score(Activations({"f": torch.zeros(2, 5)}))
    with pytest.raises(StateError, match="centroid"):
        Scorer(scorer.detector, {**scorer.state, "centroid": torch.zeros(2, 2)})
    with pytest.raises(StateError, match="float64"):
        Scorer(scorer.detector, {**scorer.state, "mean": scorer.state["mean"].double()})
    with pytest.raises(StateError, match="expected \\[\\]"):
        Scorer(DUQ(mode="head"), scorer.state)
