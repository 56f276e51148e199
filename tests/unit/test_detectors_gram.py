"""Gram deviations: bounds, held-out weights, scales, layouts, classes that were never predicted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from oodmon.contracts import Detector
from oodmon.detectors import Reference, Scorer
from oodmon.detectors.gram import Gram
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations
from tests.golden import oracles


def data(rows: int = 120, seed: int = 0, scale: float = 1.0) -> Activations:
    draw = torch.Generator().manual_seed(seed)
    return Activations(
        layers={
            "map": torch.randn(rows, 5, 4, 3, generator=draw) * scale,
            "vector": torch.randn(rows, 6, generator=draw).relu() * scale,
        },
        logits=torch.randn(rows, 4, generator=draw) * 2,
    )


def reference(acts: Activations, batch_size: int = 50) -> Reference:
    return Reference.from_arrays(acts.layers, acts.logits, batch_size=batch_size)


def held_out(rows: int, batch_size: int) -> torch.Tensor:
    draw = Reference.from_arrays(logits=torch.zeros(1, 2)).generator()
    starts = range(0, rows, batch_size)
    sizes = [min(batch_size, rows - start) for start in starts]
    return torch.cat([torch.rand(n, generator=draw, dtype=torch.float64) < 0.1 for n in sizes])


def test_bounds_and_weights_are_those_of_the_definition() -> None:
    acts = data()
    scorer = Scorer.learn(Gram(powers=(1, 2, 3)), reference(acts))
    aside = held_out(120, 50).numpy()
    assert 0 < aside.sum() < 30
    assert acts.logits is not None
    label = acts.logits.argmax(1).numpy()
    sure = acts.logits.double().softmax(1).amax(1).numpy()
    for position, name in enumerate(("map", "vector")):
        maps = acts.layers[name].double().flatten(2 if name == "map" else 1).numpy()
        unit = float(scorer.state["unit"][position])
        assert math.log2(unit) == int(math.log2(unit))
        values = oracles.gram_statistics(maps.reshape(120, maps.shape[1], -1), (1, 2, 3), "rowsum")
        values /= unit**2
        for c in range(4):
            mine = values[~aside & (label == c)]
            for end, expected in (("lower", mine.min(axis=0)), ("upper", mine.max(axis=0))):
                found = scorer.state[f"{name}.{end}"][c].numpy()
                np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
        low = np.array([values[~aside & (label == c)].min(axis=0) for c in label])
        high = np.array([values[~aside & (label == c)].max(axis=0) for c in label])
        deviation = oracles.gram_deviation(values[aside], low[aside], high[aside], 1e-6)
        weight = 1.0 / (deviation / sure[aside]).mean()
        assert float(scorer.state["weight"][position]) == pytest.approx(weight, rel=1e-3)


def test_quantile_bounds_are_numpys() -> None:
    acts = data(400)
    detector = Gram(layers=("vector",), powers=(1,), bounds="quantile", quantile=0.03)
    scorer = Scorer.learn(detector, reference(acts))
    aside = held_out(400, 50).numpy()
    assert acts.logits is not None
    label = acts.logits.argmax(1).numpy()
    unit = float(scorer.state["unit"][0])
    values = oracles.gram_statistics(
        acts.layers["vector"].double().numpy()[:, :, None], (1,), "rowsum"
    )
    for c in range(4):
        mine = values[~aside & (label == c)] / unit**2
        for end, share in (("lower", 0.03), ("upper", 0.97)):
            found = scorer.state[f"vector.{end}"][c].numpy()
            np.testing.assert_allclose(found, np.quantile(mine, share, axis=0), rtol=1e-4)


def test_one_corrupt_sample_does_not_widen_quantiles() -> None:
    acts = data(400)
    spoilt = acts.layers["vector"].clone()
    spoilt[:4] *= 1000.0
    clean = Scorer.learn(Gram(bounds="quantile", quantile=0.05), reference(acts))
    dirty = Scorer.learn(
        Gram(bounds="quantile", quantile=0.05),
        Reference.from_arrays({"map": acts.layers["map"], "vector": spoilt}, acts.logits),
    )
    for scorer in (clean, dirty):
        upper = scorer.state["vector.upper"] * scorer.state["unit"][1] ** 2
        assert float(upper.max()) < 200.0


@pytest.mark.parametrize("bounds", ["minmax", "quantile"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_size_of_the_reference_batches_does_not_matter(size: int, bounds: str) -> None:
    """Halves learnt after one another are the whole, also where the largest value comes late."""
    draw = torch.Generator().manual_seed(4)
    maps = torch.rand((300, 3, 4, 4), generator=draw)
    maps[200:] *= 37.0
    logits = torch.randn((300, 4), generator=draw)

    def learnt(batch: int) -> Scorer:
        given = Reference.from_arrays({"a": maps}, logits, batch_size=batch)
        return Scorer.learn(Gram(layers=("a",), bounds=bounds), given)  # type: ignore[arg-type]

    whole, parts = learnt(300), learnt(size)
    assert float(whole.state["unit"]) == 64.0
    for name, tensor in whole.state.items():
        # products of other shapes differ in their last digits
        torch.testing.assert_close(parts.state[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_a_class_never_predicted_takes_the_whole_range() -> None:
    acts = data()
    assert acts.logits is not None
    logits = acts.logits.clone()
    logits[:, 2] = -50.0
    scorer = Scorer.learn(Gram(), Reference.from_arrays(acts.layers, logits))
    lower, upper = scorer.state["vector.lower"], scorer.state["vector.upper"]
    assert torch.equal(lower[2], lower[[0, 1, 3]].amin(0))
    assert torch.equal(upper[2], upper[[0, 1, 3]].amax(0))
    logits[:, 2] = 50.0
    assert bool(scorer.score(Activations(acts.layers, logits)).isfinite().all())


def test_rows_that_are_not_finite_teach_nothing() -> None:
    acts = data()
    spoilt = {name: layer.clone() for name, layer in acts.layers.items()}
    spoilt["map"][7, 1] = math.nan
    spoilt["vector"][9, 0] = math.inf
    scorer = Scorer.learn(Gram(), Reference.from_arrays(spoilt, acts.logits))
    assert all(bool(tensor.isfinite().all()) for tensor in scorer.state.values())
    nothing = {name: torch.full_like(layer, math.nan) for name, layer in spoilt.items()}
    with pytest.raises(ContractError, match="too few rows"):
        Scorer.learn(Gram(), Reference.from_arrays(nothing, acts.logits))


def test_the_unit_of_the_activations_does_not_matter() -> None:
    here = Scorer.learn(Gram(), reference(data())).score(data(30, seed=1))
    for scale in (2.0**-20, 2.0**30):
        scaled = data(scale=scale)
        there = Scorer.learn(Gram(), reference(scaled)).score(data(30, seed=1, scale=scale))
        assert torch.equal(here, there)


@pytest.mark.parametrize("statistic", ["rowsum", "triu", "diag"])
def test_power_ten_neither_overflows_nor_vanishes(statistic: str) -> None:
    detector = Gram(powers=tuple(range(1, 11)), statistic=statistic)  # type: ignore[arg-type]
    scorer = Scorer.learn(detector, reference(data(scale=300.0)))
    usual = scorer.score(data(20, seed=1, scale=300.0))
    for factor in (1e4, 1e12, 1e18):
        far = scorer.score(data(20, seed=1, scale=300.0 * factor))
        assert bool(far.isfinite().all())
        assert bool((far > usual).all())
    half = data(20, seed=1, scale=300.0)
    half = Activations({n: t.half() for n, t in half.layers.items()}, half.logits)
    torch.testing.assert_close(scorer.score(half), usual, rtol=0.2, atol=1.0)


def test_sequences_have_channels_last() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(90, 7, 5, generator=draw)
    logits = torch.randn(90, 3, generator=draw)
    by_token = Scorer.learn(Gram(), Reference.from_arrays({"x": tokens}, logits))
    as_map = Scorer.learn(
        Gram(channels="first"), Reference.from_arrays({"x": tokens.transpose(1, 2)}, logits)
    )
    assert by_token.state["x.lower"].shape == (3, 5, 5)
    torch.testing.assert_close(
        by_token.score(Activations({"x": tokens * 2}, logits)),
        as_map.score(Activations({"x": tokens.transpose(1, 2) * 2}, logits)),
    )


def test_layers_without_held_out_deviation_are_dropped() -> None:
    acts = data()
    layers = {**acts.layers, "constant": torch.ones(120, 3)}
    scorer = Scorer.learn(Gram(), Reference.from_arrays(layers, acts.logits))
    assert scorer.state["weight"].ne(0).tolist() == [True, True, False]
    odd = {**layers, "constant": torch.full((120, 3), 1e30)}
    assert torch.equal(
        scorer.score(Activations(odd, acts.logits)), scorer.score(Activations(layers, acts.logits))
    )


def test_confidence_divides() -> None:
    acts = data()
    scorer = Scorer.learn(Gram(), reference(acts))
    plain = Scorer(Gram(layers=("map", "vector"), divide_by_confidence=False), scorer.state)
    far = data(20, seed=4, scale=2.0)
    assert far.logits is not None
    sure = far.logits.softmax(1).amax(1)
    torch.testing.assert_close(scorer.score(far), plain.score(far) / sure, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"powers": ()},
        {"powers": (0, 1)},
        {"powers": (2, 2)},
        {"statistic": "all"},
        {"bounds": "sigma"},
        {"channels": "middle"},
        {"quantile": 0.5},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ContractError, match=next(iter(options))):
        Gram(**options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_named() -> None:
    scorer = Scorer.learn(Gram(), reference(data()))
    acts = data(3)
    wide = {**acts.layers, "vector": torch.zeros(3, 9)}
    with pytest.raises(ContractError, match="'vector': learnt 6"):
        scorer.score(Activations(wide, acts.logits))
    with pytest.raises(ContractError, match="4 classes"):
        scorer.score(Activations(acts.layers, torch.zeros(3, 5)))
    with pytest.raises(ContractError, match="layers is empty"):
        Gram().learn(reference(data()))
    cut = {**scorer.state, "vector.lower": scorer.state["vector.lower"][:, :2]}
    with pytest.raises(StateError, match="vector"):
        Scorer(scorer.detector, cut)
    other: Detector = Gram(layers=("map", "vector"), powers=(1, 2))
    with pytest.raises(StateError, match=r"expected float32 \(4, 2"):
        Scorer(other, scorer.state)
