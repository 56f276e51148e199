"""PixelCNN: a true probability, blind to what comes later, grey levels, and known outliers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.networks import initial
from oodmon.detectors.pixelcnn import PixelCNN, levels_of, masked, mixture_logs, predict
from oodmon.errors import ContractError
from oodmon.evaluate import auroc
from oodmon.records import Activations

SMALL = {"epochs": 12, "width": 12, "blocks": 1, "side": 8, "learning_rate": 1e-2}


def ramps(rows: int, seed: int = 0, *, falling: bool = False) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    found = torch.linspace(0, 1, 8) * torch.rand(rows, 1, 1, 1, generator=draw)
    found = found.expand(rows, 1, 8, 8) + 0.03 * torch.rand(rows, 1, 8, 8, generator=draw)
    return found.flip(3) if falling else found


def weights(depth: int, levels: int, logistics: int = 0) -> dict[str, Tensor]:
    detector = PixelCNN(width=6, blocks=2, levels=levels, logistics=logistics)
    drawn = initial(detector._weights((depth, 2, 2)), torch.Generator().manual_seed(3))
    return masked({name: 2.0 * tensor for name, tensor in drawn.items()})


def test_the_probabilities_of_all_images_add_to_one() -> None:
    for depth, side in ((1, 2), (2, 1)):
        count = 4  # two levels and the two outside them
        grids = torch.meshgrid(*[torch.arange(count)] * (depth * 2 * side), indexing="ij")
        levels = torch.stack([grid.flatten() for grid in grids], 1).reshape(-1, depth, 2, side)
        logits = predict(levels, weights(depth, 2), 2).double()
        nats = torch.nn.functional.cross_entropy(logits, levels, reduction="none").flatten(1).sum(1)
        assert float(nats.std()) > 0.5
        assert float(nats.neg().exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_chances_of_256_values_add_to_one_and_are_those_of_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    count, logistics, places = 256, 4, 30
    odds, mean, log_scale = 3.0 * torch.randn(3, places, logistics, generator=draw).double()
    mean, log_scale = 0.4 * mean, log_scale - 2.0
    log_scale[0], log_scale[1], mean[2] = -9.0, 6.0, 50.0  # sharper than allowed, flat, far out
    outputs = torch.cat([odds, mean, log_scale], dim=1).T[None, :, None, None]
    levels = torch.arange(count + 2)
    logs = torch.stack(
        [mixture_logs(torch.full((1, 1, 1, places), n), outputs, count)[0, 0, 0] for n in levels]
    )
    assert bool(logs.isfinite().all())
    torch.testing.assert_close(logs.exp().sum(dim=0), torch.ones(places).double())
    # the formula as it is printed, where it does not cancel
    scale = log_scale.clamp(min=-7.0).exp()
    ends = torch.tensor([-math.inf, math.inf]).double()
    inner = 2.0 * (levels[:-1].double() + 0.5) / 257.0 - 1.0
    edges = torch.cat([ends[:1], inner, ends[1:]])
    cumulated = torch.sigmoid((edges[:, None, None] - mean) / scale)
    expected = (odds.softmax(dim=1) * cumulated.diff(dim=0)).sum(dim=2)
    torch.testing.assert_close(logs.exp(), expected, rtol=1e-9, atol=1e-13)


def test_the_mixture_stays_finite_in_single_precision_and_has_gradients() -> None:
    outputs = torch.tensor([0.0, 40.0, -60.0, 90.0, -50.0, 30.0])[None, :, None, None, None]
    outputs = outputs.repeat(3, 1, 1, 1, 1).requires_grad_()
    levels = torch.tensor([0, 100, 257])[:, None, None, None]
    logs = mixture_logs(levels, outputs, 256)
    assert bool(logs.isfinite().all())
    (gradient,) = torch.autograd.grad(logs.sum(), outputs)
    assert bool(gradient.isfinite().all())


def test_bits_per_dimension_of_bytes_near_the_best_there_is() -> None:
    # each byte is one of 16 neighbours by chance: 4 bits, which a mixture comes close to
    draw = torch.Generator().manual_seed(0)
    made = (100 + torch.randint(16, (700, 4, 4), generator=draw)) / 255.0
    made[0, 0, 0], made[0, 0, 1] = 0.0, 1.0  # so that a level is a byte
    detector = PixelCNN(
        width=8, blocks=1, side=4, levels=256, logistics=5, epochs=25, learning_rate=1e-2
    )
    scorer = Scorer.learn(detector, Reference.from_arrays(inputs=made[:500]))
    bits = scorer.score(Activations(inputs=made[500:]))
    assert 3.95 < float(bits.mean()) < 4.6
    far = scorer.score(Activations(inputs=made[500:] + 0.2))
    assert float(far.min()) > float(bits.max())


@pytest.mark.parametrize("logistics", [0, 2])
def test_no_pixel_sees_itself_or_what_comes_after(logistics: int) -> None:
    draw = torch.Generator().manual_seed(1)
    levels = torch.randint(1, 9, (1, 2, 6, 5), generator=draw)
    ours = weights(2, 8, logistics)
    before = predict(levels, ours, 8)
    for place in (0, 7, 13, 29):
        changed = levels.clone()
        changed.flatten(2)[..., place] = 9 - changed.flatten(2)[..., place]
        moved = (predict(changed, ours, 8) - before).abs().sum(dim=(1, 2)).flatten() > 1e-6
        assert not bool(moved[: place + 1].any())
        assert place == 29 or bool(moved[place + 1])


def test_grey_levels_and_those_outside() -> None:
    white = torch.tensor([-3.0, -0.4, 0.0, 0.99, 1.0, 3.7, 4.0, 4.4, 4.6, math.inf, -math.inf])
    found = levels_of(white, 4)
    assert found.tolist() == [0, 1, 1, 1, 2, 4, 4, 4, 5, 5, 0]


def test_the_score_is_in_bits_per_dimension() -> None:
    # each pixel is one of four levels by chance, so two bits is the best that there is
    draw = torch.Generator().manual_seed(0)
    chance = torch.randint(4, (500, 5, 5), generator=draw) / 3
    scorer = Scorer.learn(
        PixelCNN(**{**SMALL, "levels": 4, "epochs": 5}),  # type: ignore[arg-type]
        Reference.from_arrays(inputs=chance),
    )
    fresh = torch.randint(4, (200, 5, 5), generator=draw) / 3
    assert float(scorer.score(Activations(inputs=fresh)).mean()) == pytest.approx(2.0, abs=0.1)


def test_unlike_images_and_values_outside_the_range_score_high() -> None:
    scorer = Scorer.learn(PixelCNN(**SMALL), Reference.from_arrays(inputs=ramps(300)))  # type: ignore[arg-type]
    inside = scorer.score(Activations(inputs=ramps(100, seed=1)))
    for strange in (ramps(100, seed=2, falling=True), ramps(100, seed=3) + 2.0):
        assert auroc(inside.numpy(), scorer.score(Activations(inputs=strange)).numpy()) > 0.95
    spoilt = ramps(3)
    spoilt[1, 0, 4, 4] = math.nan
    assert scorer.score(Activations(inputs=spoilt)).isnan().tolist() == [False, True, False]


def test_known_outliers_are_made_unlikely() -> None:
    flat = 0.1 + 0.02 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    images = torch.cat([ramps(300), flat])
    labels = torch.cat([torch.zeros(300), -torch.ones(60)]).long()
    alone = Scorer.learn(PixelCNN(**SMALL), Reference.from_arrays(inputs=ramps(300)))  # type: ignore[arg-type]
    told = Scorer.learn(
        PixelCNN(**SMALL, outliers=True),  # type: ignore[arg-type]
        Reference.from_arrays(inputs=images, labels=labels),
    )
    fresh = 0.1 + 0.02 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    gains = [
        float(scorer.score(Activations(inputs=fresh)).mean())
        - float(scorer.score(Activations(inputs=ramps(60, seed=1))).mean())
        for scorer in (alone, told)
    ]
    assert gains[1] > gains[0] + 0.3
    # the range of grey levels comes from in-distribution rows alone
    assert torch.equal(told.state["mean"], alone.state["mean"])


def test_outliers_need_labels() -> None:
    with pytest.raises(ContractError, match="pixelcnn: the reference has no labels"):
        Scorer.learn(PixelCNN(outliers=True), Reference.from_arrays(inputs=ramps(5)))
    with pytest.raises(ContractError, match=r"pixelcnn\.levels: 0 is not positive"):
        PixelCNN(levels=0)
