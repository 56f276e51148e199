"""Deep SVDD and Deep SAD: the centre, the collapse that is refused, and what -1 labels do."""

from __future__ import annotations

import pytest
import torch

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.deep_svdd import DeepSAD, DeepSVDD, centre_of, check_spread
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations

SMALL = {"epochs": 10, "pretraining": 5, "outputs": 8, "width": 4, "learning_rate": 3e-3}


def features(rows: int, seed: int = 0) -> torch.Tensor:
    """On a plane in ten dimensions, with a little noise."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, 10, generator=torch.Generator().manual_seed(7))
    return torch.randn(rows, 2, generator=draw) @ mix + 0.1 * torch.randn(rows, 10, generator=draw)


def shifted(rows: int, seed: int = 0) -> torch.Tensor:
    return features(rows, seed) + torch.linspace(0.25, 0.75, 10)


def fitted(detector: DeepSVDD, labels: torch.Tensor | None = None, **more: torch.Tensor) -> Scorer:
    rows = features(600) if "rows" not in more else more["rows"]
    return Scorer.learn(detector, Reference.from_arrays({"f": rows}, labels=labels))


def found(scorer: Scorer) -> float:
    inside = scorer.score(Activations({"f": features(300, seed=1)})).numpy()
    return float(auroc(inside, scorer.score(Activations({"f": shifted(300, seed=2)})).numpy()))


def test_the_score_is_the_squared_distance_of_a_network_without_bias() -> None:
    scorer = fitted(DeepSVDD(**SMALL))  # type: ignore[arg-type]
    state = {name: tensor.double() for name, tensor in scorer.state.items()}
    assert not [name for name in state if name.endswith("bias") or name.startswith("decoder")]
    rows = features(5, seed=3)
    hidden = ((rows.double() - state["mean"]) / state["scale"]).clamp(-5, 5)
    hidden = hidden @ state["encoder.linear0.weight"].T
    code = torch.where(hidden > 0, hidden, 0.01 * hidden) @ state["encoder.linear1.weight"].T
    expected = ((code - state["centre"]) ** 2).sum(1)
    scores = scorer.score(Activations({"f": rows}))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-7)


def test_training_draws_the_reference_to_the_centre() -> None:
    before = fitted(DeepSVDD(**{**SMALL, "learning_rate": 1e-9}))  # type: ignore[arg-type]
    after = fitted(DeepSVDD(**SMALL))  # type: ignore[arg-type]
    acts = Activations({"f": features(300, seed=1)})
    assert float(after.score(acts).mean()) < 0.3 * float(before.score(acts).mean())


def test_a_centre_keeps_away_from_the_origin() -> None:
    embedding = torch.tensor([[0.05, -0.02, 0.0, 3.0, -0.5], [0.03, -0.06, 0.0, 1.0, -0.5]])
    torch.testing.assert_close(centre_of(embedding), torch.tensor([0.1, -0.1, 0.1, 2.0, -0.5]))


def test_known_outliers_are_pushed_away() -> None:
    alone = found(fitted(DeepSVDD(**SMALL)))  # type: ignore[arg-type]
    rows = torch.cat([features(600), shifted(60, seed=5)])
    labels = torch.cat([torch.zeros(600), -torch.ones(60)]).long()
    told = found(fitted(DeepSAD(**SMALL), labels, rows=rows))  # type: ignore[arg-type]
    assert told > 0.85
    assert told > alone + 0.1


def test_outliers_change_neither_whitening_nor_centre() -> None:
    rows, labels = features(300), torch.zeros(300).long()
    wild = torch.full((20, 10), 1e3)
    detector = DeepSAD(**{**SMALL, "pretraining": 0})  # type: ignore[arg-type]
    without = fitted(detector, labels, rows=rows).state
    told = fitted(
        detector, torch.cat([labels, torch.full((20,), -1)]), rows=torch.cat([rows, wild])
    ).state
    for name in ("mean", "scale", "centre"):
        torch.testing.assert_close(told[name], without[name])
    assert not torch.equal(told["encoder.linear0.weight"], without["encoder.linear0.weight"])


def test_without_outliers_deep_sad_is_deep_svdd() -> None:
    labels = torch.arange(600) % 3
    plain, told = fitted(DeepSVDD(**SMALL)), fitted(DeepSAD(**SMALL), labels)  # type: ignore[arg-type]
    for name, tensor in plain.state.items():
        assert torch.equal(told.state[name], tensor)


def test_a_collapsed_embedding_is_refused() -> None:
    with pytest.raises(ContractError, match="collapsed to a point"):
        fitted(DeepSVDD(**SMALL), rows=torch.full((50, 10), 3.0))  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="collapsed"):
        check_spread(torch.full((4, 2), torch.nan), "deep_svdd")
    check_spread(torch.tensor([[0.0], [0.1]]), "deep_svdd")


def test_images_are_embedded() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.rand(200, 10, 7, generator=draw) * torch.linspace(0, 1, 7)
    detector = DeepSVDD(on="inputs", **SMALL)  # type: ignore[arg-type]
    scorer = Scorer.learn(detector, Reference.from_arrays(inputs=inputs))
    inside = scorer.score(Activations(inputs=inputs)).numpy()
    outside = scorer.score(Activations(inputs=inputs.flip(2))).numpy()
    assert auroc(inside, outside) > 0.95


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ContractError, match="no labels, and -1 is to mark"):
        fitted(DeepSAD(**SMALL))  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=r"deep_sad\.outlier_weight"):
        DeepSAD(outlier_weight=0.0)
    with pytest.raises(ContractError, match=r"deep_svdd\.layer is empty"):
        DeepSVDD().learn(Reference.from_arrays({"f": features(5)}))
    scorer = fitted(DeepSVDD(**SMALL))  # type: ignore[arg-type]
    with pytest.raises(StateError, match="'centre'"):
        Scorer(scorer.detector, {**scorer.state, "centre": torch.zeros(3)})
    labels = torch.cat([torch.zeros(50), -torch.ones(2)]).long()
    rows = torch.cat([features(50), torch.full((2, 10), torch.nan)])
    with pytest.raises(ContractError, match="no row that is finite"):
        fitted(DeepSAD(**SMALL), labels, rows=rows)  # type: ignore[arg-type]
