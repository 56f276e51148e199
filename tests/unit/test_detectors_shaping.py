"""Shaping: float64 oracles on maps, vectors and flattened maps; order statistics; traps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.order import Quantiles, _search, largest
from oodmon.detectors.rankfeat import leading
from oodmon.errors import ContractError
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.golden import shaping_oracles as oracles

WIDTH, CLASSES = 12, 5


def maps(rows: int, seed: int = 0, shape: tuple[int, ...] = (WIDTH, 4, 3)) -> torch.Tensor:
    return torch.randn((rows, *shape), generator=torch.Generator().manual_seed(seed)).relu_()


def head(width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return torch.randn(CLASSES, width, generator=draw), torch.randn(CLASSES, generator=draw)


def learnt(name: str, layer: torch.Tensor, width: int = WIDTH, **options: Any) -> Scorer:
    reference = Reference.from_arrays(layers={"f": layer}, head=head(width), batch_size=32)
    return Scorer.learn(detectors.create(name, layer="f", **options), reference)


def scored(scorer: Scorer, layer: torch.Tensor) -> np.ndarray:
    return scorer.score(Activations(layers={"f": layer})).numpy()


def expected_of(features: np.ndarray) -> np.ndarray:
    weight, bias = head(features.shape[1])
    return oracles.energy_of(features, weight.double().numpy(), bias.double().numpy())


def apart(layer: torch.Tensor) -> torch.Tensor:
    """No two values equal, so that every order statistic is one value."""
    return layer + torch.rand(layer.shape, generator=torch.Generator().manual_seed(4)) * 0.01


def plain(layer: torch.Tensor) -> np.ndarray:
    """(B, D, P) float64."""
    whole = layer if layer.ndim > 2 else layer.unsqueeze(2)
    found: np.ndarray = whole.flatten(2).double().numpy()
    return found


@pytest.mark.parametrize("kind", ["map", "vector"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("react", {}),
        ("vra", {}),
        ("scale", {}),
        ("scale", {"pruned": 0.5}),
        ("ash", {"kind": "s", "pruned": 0.7}),
        ("ash", {"kind": "p"}),
        ("ash", {"kind": "b", "pruned": 0.7}),
    ],
)
def test_scores_are_their_formulas(name: str, options: dict[str, Any], kind: str) -> None:
    shape = (WIDTH, 4, 3) if kind == "map" else (WIDTH,)
    scorer, probe = learnt(name, maps(80, 1, shape), **options), apart(maps(30, 2, shape))
    values = plain(probe)
    if name == "react":
        shaped = oracles.clipped(values, -math.inf, float(scorer.state["threshold"]))
    elif name == "vra":
        bounds = float(scorer.state["lower"]), float(scorer.state["upper"])
        shaped = oracles.clipped(values, *bounds)
    elif name == "scale":
        shaped = oracles.scale(values, options.get("pruned", 0.85))
    else:
        shaped = oracles.ash(values, options.get("pruned", 0.9), options["kind"])
    np.testing.assert_allclose(scored(scorer, probe), expected_of(shaped), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shape", [(WIDTH, 4, 3), (WIDTH, 2, 2), (7, 5, 5)])
def test_rankfeat_is_an_svd(shape: tuple[int, ...]) -> None:
    scorer, probe = learnt("rankfeat", maps(40, 1, shape), shape[0]), maps(25, 2, shape)
    shaped = oracles.rankfeat(plain(probe))
    np.testing.assert_allclose(scored(scorer, probe), expected_of(shaped), rtol=1e-4, atol=1e-4)


def test_the_leading_vector_of_signed_matrices() -> None:
    matrices = torch.randn(60, 9, 14, generator=torch.Generator().manual_seed(0))
    first = torch.linalg.svd(matrices.double())[0][:, :, 0].float()
    agree = (leading(matrices) * first).sum(dim=1).abs()
    gaps = torch.linalg.svdvals(matrices)
    clear = gaps[:, 1] / gaps[:, 0] < 0.99
    assert int(clear.sum()) > 40
    assert float(agree[clear].min()) > 1.0 - 1e-5
    assert torch.equal(leading(torch.zeros(2, 3, 4)), torch.zeros(2, 3))


def test_dice_keeps_the_weights_that_contribute_most() -> None:
    layer = maps(50, 1, (WIDTH,))
    scorer = learnt("dice", layer, sparsity=0.5)
    weight, bias = head()
    contribution = weight.double() * layer.double().mean(0)
    kept = contribution >= contribution.flatten().sort().values[30]
    assert torch.equal(scorer.state["weight"] != 0, kept)
    probe = maps(20, 2, (WIDTH,))
    expected = oracles.energy_of(
        probe.double().numpy(), (weight * kept).double().numpy(), bias.double().numpy()
    )
    np.testing.assert_allclose(scored(scorer, probe), expected, rtol=1e-5, atol=1e-5)
    whole = learnt("dice", layer, sparsity=0.0)
    assert torch.equal(whole.state["weight"], weight)


def test_flattened_maps_and_tokens_feed_a_head_too() -> None:
    flat = learnt("react", maps(40, 1, (3, 2, 2)), 12)
    vector = learnt("react", maps(40, 1, (3, 2, 2)).flatten(1), 12)
    probe = maps(9, 2, (3, 2, 2))
    np.testing.assert_allclose(scored(flat, probe), scored(vector, probe.flatten(1)), rtol=1e-6)
    tokens = learnt("react", maps(40, 1, (7, WIDTH)))
    as_map = learnt("react", maps(40, 1, (7, WIDTH)).transpose(1, 2).unsqueeze(3))
    probe = maps(9, 2, (7, WIDTH))
    expected = scored(as_map, probe.transpose(1, 2).unsqueeze(3))
    np.testing.assert_allclose(scored(tokens, probe), expected, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 40])
def test_the_largest_are_the_largest_by_search_and_by_selection(rows: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    for values in (
        torch.randn(rows, 3000, generator=draw).relu_(),
        torch.rand(rows, 3000, generator=draw).log_().neg_(),
        torch.randn(rows, 3000, generator=draw).exp_().square_(),
    ):
        for count in (30, 300, 1050):
            for cut in (largest(values, count), _search(values, count)):  # the latter on devices
                kept = cut.share(values)
                expected = values.topk(count, dim=1).values.sum(dim=1)
                torch.testing.assert_close((kept * values).sum(1), expected, rtol=2e-4, atol=1e-4)
                assert float((kept > 0).sum(1).double().median()) == count or count > 1000


@pytest.mark.parametrize("width", [100, 2048, 2500, 20_000])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 0.65, 1.0])
def test_selection_is_exact_whatever_the_row(width: int, share: float) -> None:
    """Also where the sample misleads: sorted, constant, of one huge value, or mostly zeros."""
    draw = torch.Generator().manual_seed(width)
    dense = torch.randn(width, generator=draw)
    rows = torch.stack(
        [
            dense,
            dense.relu(),
            dense.sort().values,
            torch.zeros(width),
            torch.full((width,), 2.5),
            torch.where(dense > 1.9, dense, torch.zeros(())),
            dense.round(),
            torch.cat([torch.full((1,), math.inf), dense[1:]]),
            -dense.square(),
            dense.double().exp().pow(9).float(),
        ]
    )
    count = max(1, round(share * width))
    sorted_rows = rows.sort(dim=1, descending=True).values
    several = largest(rows, count)
    for number, row in enumerate(rows):
        expected = sorted_rows[number, count - 1]
        alone = largest(row[None], count)
        for high, low in ((several.high[number], several.low[number]), (alone.high, alone.low)):
            assert float(high) == float(expected)
            assert float(low) < float(expected)
        taken = alone.share(row[None]).sum()
        assert float(taken) == pytest.approx(count, rel=1e-5), number
        assert float(several.share(rows)[number].sum()) == pytest.approx(count, rel=1e-5)


@pytest.mark.parametrize("width", [100, 2500])
def test_a_row_with_a_nan_gets_nan_and_the_others_what_they_are(width: int) -> None:
    rows = torch.rand(3, width, generator=torch.Generator().manual_seed(5)) + 0.1
    expected = largest(rows, 30).kept(rows)
    rows[1, 7] = math.nan
    assert largest(rows[1:2], 30).kept(rows[1:2]).isnan().any()
    kept = largest(rows, 30).kept(rows)
    assert kept[1].isnan().any()
    torch.testing.assert_close(kept[::2], expected[::2])


@pytest.mark.parametrize("width", [300, 40_000])
def test_a_row_alone_is_cut_as_it_is_among_others(width: int) -> None:
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(width)).relu_()
    values[1, width // 20 :] = 0.0
    count = width // 10
    many = largest(values.repeat(40, 1), count)
    together = many.kept(values.repeat(40, 1))[:3]
    for row, expected in zip(values, together, strict=True):
        cut = largest(row[None], count)
        kept = cut.kept(row[None])
        assert float(kept.sum()) == pytest.approx(float(expected.sum()), rel=1e-3)
        torch.testing.assert_close(kept, cut.share(row[None]) * row)
    exact = values[0].topk(count).values.sum()
    torch.testing.assert_close(largest(values[:1], count).kept(values[:1]).sum(), exact)
    lost = values[:1].clone()
    lost[0, 5] = math.nan
    assert bool(largest(lost, count).kept(lost).isnan().any())


def test_values_that_share_the_last_place_share_it_evenly() -> None:
    for rows in (1, 60):
        values = torch.ones(rows, 2000)
        values[:, :500] = 2.0
        kept = largest(values, 800).share(values)
        torch.testing.assert_close(kept[:, :500], torch.ones(rows, 500))
        torch.testing.assert_close(kept[:, 500:], torch.full((rows, 1500), 0.2), rtol=0.01, atol=0)


def test_quantiles_of_a_stream() -> None:
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.normal(size=40_000), draw.exponential(size=20_000) * 100])
    found = Quantiles(torch.device("cpu"))
    for part in np.array_split(values.astype(np.float32), 7):
        found.add(torch.from_numpy(part))
    for share in (0.01, 0.3, 0.6, 0.9, 0.999):
        assert found.at(share) == pytest.approx(np.quantile(values, share), rel=2**-10, abs=1e-4)
    zeros = Quantiles(torch.device("cpu"))
    zeros.add(torch.tensor([0.0, 0.0, -0.0, 0.0, 3.0]))
    assert zeros.at(0.5) == 0.0
    assert zeros.at(1.0) == pytest.approx(3.0, rel=2**-10)
    with pytest.raises(ContractError, match="no row"):
        Quantiles(torch.device("cpu")).at(0.5)


@pytest.mark.parametrize(("name", "options"), [("scale", {}), ("ash", {"kind": "s"}), ("vra", {})])
def test_a_sample_of_zeros_has_the_energy_of_the_bias(name: str, options: dict[str, Any]) -> None:
    scorer = learnt(name, maps(40, 1), **options)
    found = scored(scorer, torch.zeros(1, WIDTH, 4, 3))
    np.testing.assert_allclose(found, expected_of(np.zeros((1, WIDTH))), rtol=1e-5)


@pytest.mark.parametrize("name", ["react", "vra", "scale", "ash", "dice", "rankfeat"])
def test_a_head_is_needed_and_has_to_fit(name: str) -> None:
    layer = maps(10)
    with pytest.raises(ContractError, match="head"):
        Scorer.learn(detectors.create(name, layer="f"), Reference.from_arrays(layers={"f": layer}))
    with pytest.raises(ContractError, match=r"5 features.*\(10, 12, 4, 3\)"):
        scored(learnt(name, layer, 5), layer)


def test_rankfeat_refuses_a_vector() -> None:
    with pytest.raises(ContractError, match="several places"):
        learnt("rankfeat", maps(10, 1, (WIDTH,)))


@pytest.mark.parametrize("name", ["react", "vra", "dice"])
def test_rows_that_are_not_finite_are_left_out(name: str) -> None:
    layer = maps(60, 1)
    spoilt = torch.cat([layer, torch.full((1, WIDTH, 4, 3), math.inf)])
    whole, other = learnt(name, layer), learnt(name, spoilt)
    for key, tensor in whole.state.items():
        assert torch.equal(tensor, other.state[key]), key


def test_bad_options_are_refused() -> None:
    for name, options, word in (
        ("react", {"quantile": 1.0}, "quantile"),
        ("vra", {"lower": 0.9, "upper": 0.5}, "lower"),
        ("scale", {"pruned": 1.0}, "pruned"),
        ("ash", {"kind": "x"}, "kind"),
        ("dice", {"sparsity": -0.1}, "sparsity"),
    ):
        with pytest.raises(ContractError, match=word):
            detectors.create(name, **options)
