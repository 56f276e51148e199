"""The DUQ recipe: two moons, loss, penalty, centroids, modes, and its detector."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import make_moons  # type: ignore[import-untyped]
from torch import nn

from oodmon.detectors import Scorer
from oodmon.errors import ContractError
from oodmon.recipes.duq import DUQ, DUQHead, DUQModel, cross_entropy
from oodmon.records import Activations
from oodmon.registry import detectors


def moons(rows: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    points, labels = make_moons(rows, noise=0.1, random_state=0)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


def backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())


def trained(penalty: float, epochs: int) -> DUQModel:
    torch.manual_seed(0)
    points, labels = moons()
    batches = list(zip(torch.split(points, 50), torch.split(labels, 50), strict=True))
    recipe = DUQ(embedding=10, length_scale=0.3, keep=0.99, penalty=penalty)
    model = recipe.build(backbone(), features=64, classes=2)
    recipe.train(model, batches, epochs)
    return model


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_two_moons(penalty: float) -> None:
    model = trained(penalty, epochs=12)
    assert not model.training
    points, labels = moons()
    found = model(points).detach()
    assert float((found.argmax(1) == labels).float().mean()) > 0.95
    scores = 1.0 - found.exp().amax(1)
    assert float(scores.median()) < 0.3
    angles = torch.arange(0, 2 * math.pi, 0.5)
    far = torch.stack([angles.cos(), angles.sin()], dim=1) * 6.0
    assert float((1.0 - model(far).detach().exp().amax(1)).min()) > 0.9


def test_the_detector_reads_the_model_as_it_is() -> None:
    model = trained(0.0, epochs=1)
    output = model(moons(20)[0]).detach()
    scorer = Scorer(detectors.create("duq", mode="head"), {})
    found = scorer.score(Activations(logits=output))
    assert torch.equal(found, DUQ().native_score(output))
    shares = DUQ().predict(output)
    torch.testing.assert_close(shares.sum(1), torch.ones(20))
    assert torch.equal(shares.argmax(1), output.argmax(1))


def test_cross_entropy_is_that_of_the_kernel() -> None:
    kernel = torch.tensor([[0.9, 0.2], [0.4, 0.6]])
    labels = torch.tensor([0, 1])
    expected = nn.functional.binary_cross_entropy(kernel, torch.eye(2))
    torch.testing.assert_close(cross_entropy(kernel.log(), labels), expected)


def test_cross_entropy_survives_underflow_and_certainty() -> None:
    found = torch.tensor([[-500.0, -1e-12], [0.0, -900.0]], requires_grad=True)
    loss = cross_entropy(found, torch.tensor([0, 1]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert bool(loss.isfinite())
    assert found.grad is not None
    assert bool(found.grad.isfinite().all())
    assert float(found.grad[0, 0]) == pytest.approx(-0.25)


def test_the_penalty_pulls_both_ways() -> None:
    """λ E(|∇| - 1)²: measured by hand on a model whose slope is known."""

    class Ramp(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            # Σ_c K_c = slope · x, so its gradient is the slope
            return (self.slope * inputs / 2).clamp(min=1e-9).log().repeat(1, 2)

    inputs, labels = torch.full((4, 1), 0.1), torch.zeros(4, dtype=torch.int64)
    for slope in (0.25, 1.0, 3.0):
        plain = DUQ(penalty=0.0).loss(Ramp(slope), inputs, labels).detach()
        bent = DUQ(penalty=0.7).loss(Ramp(slope), inputs, labels).detach()
        assert float(bent - plain) == pytest.approx(0.7 * (slope - 1.0) ** 2, abs=1e-5)


def test_with_nothing_kept_a_centroid_is_the_mean_of_its_class() -> None:
    torch.manual_seed(0)
    head = DUQHead(5, 3, embedding=4, keep=0.0)
    features, labels = torch.randn(30, 5), torch.arange(30) % 3
    head.update(features, labels)
    for c in range(3):
        expected = (features[labels == c] @ head.weight[:, c].T).mean(0)
        torch.testing.assert_close(head.centroid[:, c], expected)


def test_after_a_step_the_mode_is_as_before() -> None:
    recipe = DUQ()
    model = recipe.build(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 8)), 8, 2)
    points, labels = moons(40)
    for training in (True, False):
        model.train(training)
        before = model.backbone[0].running_mean.clone()  # type: ignore[index]
        recipe.after_step(model, points, labels)
        assert model.training is training
        assert torch.equal(before, model.backbone[0].running_mean)  # type: ignore[index]


def test_the_head_stays_in_float32_under_autocast() -> None:
    head = DUQHead(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(3, 4).bfloat16()).dtype == torch.float32


def test_state_dict_holds_the_centroids() -> None:
    first, second = DUQHead(4, 2), DUQHead(4, 2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.centroid, second.centroid)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ContractError, match="no batches"):
        DUQ().train(DUQ().build(backbone(), 64, 2), [], epochs=1)
    with pytest.raises(ContractError, match="positive"):
        DUQHead(0, 2)
