"""The flow: invertible, its volume right, finite far away, and a density that is one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.flow import Flow, _coupling, transform
from oodmon.detectors.networks import initial
from oodmon.errors import ContractError
from oodmon.evaluate import auroc
from oodmon.records import Activations


def moons(rows: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    angle = torch.rand(rows, generator=draw) * math.pi
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    found = torch.where(torch.rand(rows, 1, generator=draw) < 0.5, upper, lower)
    return found + 0.05 * torch.randn(rows, 2, generator=draw)


def weights(size: int, couplings: int = 5) -> dict[str, Tensor]:
    detector = Flow(couplings=couplings, width=2)
    return initial(detector._weights((size,)), torch.Generator().manual_seed(4))


def inverse(found: Tensor, weights: dict[str, Tensor], couplings: int) -> Tensor:
    number = torch.arange(found.shape[1])
    bits = (found.shape[1] - 1).bit_length()
    for i in reversed(range(couplings)):
        moved = ((number >> (i // 2 % bits)) & 1 == i % 2).to(found.dtype)
        log_scale, shift = _coupling(found * (1 - moved), weights, f"coupling{i}")
        found = (found - shift * moved) * (-log_scale * moved).exp()
    return found


@pytest.mark.parametrize("size", [2, 5, 8])
def test_the_flow_is_invertible_and_its_volume_is_the_jacobians(size: int) -> None:
    ours = {name: tensor.double() for name, tensor in weights(size).items()}
    rows = torch.randn(6, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, volume = transform(rows, ours)
    assert float((found - rows).abs().mean()) > 0.1
    torch.testing.assert_close(inverse(found, ours, 5), rows)
    for row, expected in zip(rows, volume, strict=True):
        jacobian = torch.func.jacrev(lambda x: transform(x.unsqueeze(0), ours)[0][0])(row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, expected)


def test_every_unit_moves() -> None:
    rows = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    found, _ = transform(rows, weights(7, couplings=2))
    assert bool(((found - rows).abs() > 1e-4).all())


def test_two_moons() -> None:
    detector = Flow(epochs=40, width=8, learning_rate=2e-3, noise=0.02)
    scorer = Scorer.learn(detector, Reference.from_arrays({"f": moons(2000)}))
    inside = moons(300, seed=1)
    draw = torch.Generator().manual_seed(2)
    around = torch.rand(3000, 2, generator=draw) * torch.tensor([4.0, 3.0]) - torch.tensor([1.5, 1])
    outside = around[torch.cdist(around, moons(2000)).amin(1) > 0.3]
    scores = [scorer.score(Activations({"f": rows})) for rows in (inside, outside)]
    assert auroc(scores[0].numpy(), scores[1].numpy()) > 0.95
    # the density adds to one over the plane
    axis = torch.linspace(-6, 6, 301)
    grid = torch.cartesian_prod(axis, axis)
    back = grid * scorer.state["scale"] + scorer.state["mean"]
    density = scorer.score(Activations({"f": back})).neg().exp()
    assert float(density.sum()) * float(axis[1] - axis[0]) ** 2 == pytest.approx(1.0, abs=0.03)


def test_an_untrained_flow_is_a_gaussian() -> None:
    rows = moons(200)
    detector = Flow(epochs=1, learning_rate=1e-12)
    scorer = Scorer.learn(detector, Reference.from_arrays({"f": rows}))
    white = (rows - rows.mean(0)) / rows.std(0, correction=0)
    expected = 0.5 * white.square().sum(1) + math.log(2 * math.pi)
    torch.testing.assert_close(scorer.score(Activations({"f": rows})), expected)


def test_far_away_and_dead_units_are_finite() -> None:
    rows = torch.cat([moons(300), torch.zeros(300, 2)], dim=1).clamp(min=0.0)
    detector = Flow(epochs=10, width=4, learning_rate=5e-3)
    scorer = Scorer.learn(detector, Reference.from_arrays({"f": rows}))
    far = torch.tensor([[1e30, -1e30, 1e30, 0.0], [0.0, 0.0, 0.0, 1e-3], [math.inf, 0, 0, 0]])
    scores = scorer.score(Activations({"f": far}))
    assert bool(scores.isfinite().all())
    assert float(scores[0]) > float(scorer.score(Activations({"f": rows})).max())


def test_tabular_inputs_are_taken_and_images_are_not() -> None:
    scorer = Scorer.learn(Flow(on="inputs", epochs=1), Reference.from_arrays(inputs=moons(50)))
    assert scorer.score(Activations(inputs=moons(3))).shape == (3,)
    with pytest.raises(ContractError, match="for images use their features"):
        Scorer.learn(Flow(on="inputs"), Reference.from_arrays(inputs=torch.zeros(4, 1, 5, 5)))
    with pytest.raises(ContractError, match="at least 2 values, found 1"):
        Scorer.learn(Flow(), Reference.from_arrays({"f": torch.zeros(4, 1)}))
    with pytest.raises(ContractError, match=r"flow\.couplings: 0 is not positive"):
        Flow(couplings=0)
