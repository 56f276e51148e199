"""The logit family: order at saturation, ties, sharing, binary logits, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from oodmon.detectors import Scorer
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors

FAMILY = ("msp", "max_logit", "energy", "entropy")


def scores(name: str, logits: torch.Tensor, **options: object) -> torch.Tensor:
    return Scorer(detectors.create(name, **options), {}).score(Activations(logits=logits))


@pytest.mark.parametrize("classes", [5, 200])
def test_confident_samples_keep_their_order(classes: int) -> None:
    logits = torch.zeros(6, classes)
    logits[:, 0] = torch.tensor([10.0, 17.0, 20.0, 30.0, 60.0, 300.0])
    found = scores("msp", logits)
    assert bool((found.diff() < 0).all())
    sure = scores("msp", logits, scale="prob")[2:]
    torch.testing.assert_close(sure, torch.full((4,), -1.0), rtol=0, atol=1e-6)
    expected = math.log(classes - 1) - 60.0
    assert float(found[4]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("classes", [4, 100])
def test_ties_count_as_other_classes(classes: int) -> None:
    logits = torch.full((2, classes), -50.0)
    logits[0, :2] = 3.0
    logits[1] = 3.0
    found = scores("msp", logits)
    assert found.tolist() == pytest.approx([math.log(0.5), math.log1p(-1 / classes)], rel=1e-5)
    assert scores("entropy", logits).tolist() == pytest.approx(
        [math.log(2), math.log(classes)], rel=1e-5
    )


@pytest.mark.parametrize("scale", ["log_complement", "prob"])
@pytest.mark.parametrize("classes", [2, 100])
def test_extremes_are_finite(scale: str, classes: int) -> None:
    logits = torch.zeros(4, classes)
    logits[0, 0], logits[0, 1] = 1e4, -1e4
    logits[2, 1] = -math.inf
    logits[3] = -math.inf
    logits[3, 0] = 2.0
    for name, options in (("msp", {"scale": scale}), ("energy", {}), ("entropy", {})):
        assert bool(scores(name, logits, **options).isfinite().all()), name


@pytest.mark.parametrize("classes", [10, 100])
def test_both_scales_order_alike(classes: int) -> None:
    logits = torch.randn(300, classes, generator=torch.Generator().manual_seed(0))
    order = scores("msp", logits.double()).argsort()
    assert torch.equal(order, scores("msp", logits.double(), scale="prob").argsort())


def test_probability_is_softmax() -> None:
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    expected = -logits.softmax(1).amax(1)
    torch.testing.assert_close(scores("msp", logits, scale="prob"), expected, rtol=0, atol=1e-6)


def test_default_scores_hardly_tie() -> None:
    logits = torch.randn(1000, 10, generator=torch.Generator().manual_seed(2)) * 20
    assert len(set(scores("msp", logits).tolist())) >= 990


def test_binary_logit_is_sure_on_both_sides() -> None:
    logits = torch.tensor([[-9.0], [0.0], [9.0]])
    for name in FAMILY:
        found = scores(name, logits)
        assert float(found[0]) == pytest.approx(float(found[2]))
        assert float(found[1]) > float(found[0]), name
    p = 1 / (1 + math.exp(-9.0))
    assert float(scores("msp", logits, scale="prob")[2]) == pytest.approx(-p)


@pytest.mark.parametrize("classes", [7, 130])
def test_sharing_changes_no_score(classes: int) -> None:
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(3)) * 4
    logits[0, :3] = 20.0
    together = Activations(logits=logits)
    for name in (*FAMILY, *reversed(FAMILY)):
        scorer = Scorer(detectors.create(name), {})
        assert torch.equal(scorer.score(together), scores(name, logits)), name


def test_chunks_change_no_score() -> None:
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(4))
    for name in FAMILY:
        whole = scores(name, logits)
        parts = torch.cat([scores(name, part) for part in logits.tensor_split(9)])
        torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [3, 80])
@pytest.mark.parametrize("name", ["msp", "energy", "entropy"])
def test_infinite_logit_cannot_be_scored(name: str, classes: int) -> None:
    logits = torch.zeros(2, classes)
    logits[0, 1] = math.inf
    assert scores(name, logits).isnan().tolist() == [True, False]


def test_logits_of_another_shape_are_refused() -> None:
    for logits in (torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 4, 5)):
        with pytest.raises(ContractError, match=r"expected \(B, C\)"):
            scores("msp", logits)


@pytest.mark.parametrize("name", ["msp", "energy", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_is_positive(name: str, temperature: float) -> None:
    with pytest.raises(ContractError, match="temperature"):
        detectors.create(name, temperature=temperature)


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(ContractError, match="log_complement"):
        detectors.create("msp", scale="log")
