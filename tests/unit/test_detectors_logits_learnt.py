"""gen, doctor, kl_matching, temperature_scaling, openmax, introspection: formulas and traps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import gumbel_l

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.openmax import fit_extremes
from oodmon.detectors.temperature_scaling import best_temperature
from oodmon.errors import ContractError, StateError
from oodmon.evaluate import auroc
from oodmon.records import Activations
from oodmon.registry import detectors
from tests.golden import oracles, shaping_oracles


def peaked(rows: int, classes: int, seed: int = 0, wrong: float = 0.1) -> tuple[Any, Any]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=draw)
    said = labels.clone()
    errors = torch.rand(rows, generator=draw) < wrong
    said[errors] = torch.randint(classes, (int(errors.sum()),), generator=draw)
    logits = torch.randn(rows, classes, generator=draw) * 1.5
    logits[torch.arange(rows), said] += 5.0
    return logits, labels


def learnt(name: str, logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> Scorer:
    reference = Reference.from_arrays(logits=logits, labels=labels, seed=1)
    return Scorer.learn(detectors.create(name, **options), reference)


def scored(scorer: Scorer, logits: torch.Tensor) -> np.ndarray:
    return scorer.score(Activations(logits=logits)).numpy()


def extreme_logits(classes: int) -> torch.Tensor:
    logits = torch.randn(20, classes, generator=torch.Generator().manual_seed(3)) * 3
    logits[0], logits[1, 0], logits[2, 1] = 0.0, 40.0, -math.inf
    logits[3, :2] = 12.0
    logits[4, 2] = 90.0
    return logits


@pytest.mark.parametrize("classes", [1, 7, 150])
@pytest.mark.parametrize(("gamma", "top"), [(0.1, 100), (0.5, 3), (1.0, 5)])
def test_gen_is_its_formula(classes: int, gamma: float, top: int) -> None:
    logits = extreme_logits(classes) if classes > 1 else torch.tensor([[-9.0], [0.0], [30.0]])
    scorer = Scorer(detectors.create("gen", gamma=gamma, top=top), {})
    expected = shaping_oracles.gen(logits.double().numpy(), gamma, top)
    np.testing.assert_allclose(scored(scorer, logits), expected, rtol=2e-5)


@pytest.mark.parametrize("classes", [3, 7, 150])
def test_gen_with_a_least_probability_is_the_clamped_formula(classes: int) -> None:
    logits = extreme_logits(classes)
    scorer = Scorer(detectors.create("gen", top=classes, least=1e-7), {})
    p = logits.double().softmax(dim=1).clamp(1e-7, 1.0 - 1e-7).numpy()
    expected = ((p * (1.0 - p)) ** 0.1).sum(axis=1)
    np.testing.assert_allclose(scored(scorer, logits), expected, rtol=2e-5)


def test_gen_keeps_the_order_of_sure_samples() -> None:
    logits = torch.zeros(5, 10)
    logits[:, 0] = torch.tensor([10.0, 20.0, 40.0, 80.0, 160.0])
    assert bool((np.diff(scored(Scorer(detectors.create("gen"), {}), logits)) < 0).all())


@pytest.mark.parametrize("classes", [2, 7, 150])
def test_doctor_is_its_formula(classes: int) -> None:
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(3)) * 3
    logits[0], logits[1, 0] = 0.0, 30.0
    scorer = Scorer(detectors.create("doctor"), {})
    expected = shaping_oracles.doctor(logits.double().numpy())
    np.testing.assert_allclose(scored(scorer, logits), expected, rtol=1e-5, atol=1e-5)


def test_doctor_beta_orders_as_msp_and_stays_finite() -> None:
    logits = extreme_logits(6)
    beta = scored(Scorer(detectors.create("doctor", kind="beta"), {}), logits)
    msp = oracles.msp(logits.double().numpy())
    assert (beta.argsort() == msp.argsort()).all()
    sure = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    for kind in ("alpha", "beta"):
        found = scored(Scorer(detectors.create("doctor", kind=kind), {}), sure)
        assert np.isfinite(found).all()
        assert found[0] == pytest.approx(-1e4, rel=1e-3)


def test_kl_matching_is_its_formula_without_a_class() -> None:
    logits, labels = peaked(600, 6)
    logits[:, 4] = -20.0  # a class that the model never gives
    scorer = learnt("kl_matching", logits, labels)
    shares = logits.double().softmax(1).numpy()
    said = shares.argmax(1)
    typical = np.array([shares[said == k].mean(0) for k in range(6) if (said == k).any()])
    assert len(typical) == 5
    assert tuple(scorer.state["log_typical"].shape) == (5, 6)
    probe = extreme_logits(6)
    expected = shaping_oracles.kl(probe.double().numpy(), typical)
    np.testing.assert_allclose(scored(scorer, probe), expected, rtol=1e-4, atol=1e-5)


def test_kl_matching_never_diverges_to_infinity() -> None:
    logits, labels = peaked(200, 5, wrong=0.0)
    logits[:, 3] = -math.inf
    found = scored(learnt("kl_matching", logits, labels), torch.tensor([[0.0, 0, 0, 30, 0]]))
    assert np.isfinite(found).all()
    assert 70 < float(found[0]) <= 81


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_best_temperature_is_found(true: float) -> None:
    draw = torch.Generator().manual_seed(4)
    logits = torch.randn(4000, 8, generator=draw) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=draw).squeeze(1)
    hot = logits * true

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(hot.double() / temperature, labels))

    best = minimize_scalar(loss, bounds=(0.05, 20.0), method="bounded", options={"xatol": 1e-9})
    found = best_temperature(hot, labels)
    assert found == pytest.approx(best.x, rel=1e-4)
    assert found == pytest.approx(true, rel=0.1)


def test_temperature_stays_in_its_bracket_where_every_answer_is_right() -> None:
    logits, labels = peaked(300, 4, wrong=0.0)
    logits[torch.arange(300), labels] += 20
    assert best_temperature(logits, labels) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("score_of", ["msp", "entropy", "energy"])
def test_temperature_scaling_scores_cooler_logits(score_of: str) -> None:
    logits, labels = peaked(900, 6)
    scorer = learnt("temperature_scaling", logits, labels, score_of=score_of)
    cooler = logits / scorer.state["temperature"]
    expected = scored(Scorer(detectors.create(score_of), {}), cooler)
    np.testing.assert_allclose(scored(scorer, logits), expected, rtol=1e-5)


def test_extremes_are_fitted_to_the_maximum_of_the_likelihood() -> None:
    draw = np.random.default_rng(0)
    distances = draw.gamma(9.0, 0.5, size=900)
    labels = draw.integers(0, 3, size=900)
    rate, location = fit_extremes(torch.from_numpy(distances), torch.from_numpy(labels), 4, 25)
    for k in range(3):
        tail = np.sort(distances[labels == k])[-25:]
        where, spread = gumbel_l.fit(tail)
        assert float(rate[k]) == pytest.approx(1 / spread, rel=1e-3)
        assert float(location[k]) == pytest.approx(where, rel=1e-3)
    assert float(location[3]) < -1e29  # a class without rows


def test_extremes_of_equal_distances_and_of_one_are_a_step() -> None:
    rate, location = fit_extremes(
        torch.tensor([2.0, 2.0, 2.0, 5.0]), torch.tensor([0, 0, 0, 1]), 2, 20
    )
    assert bool((rate.isfinite() & (rate > 1e3)).all())
    assert location.tolist() == pytest.approx([2.0, 5.0], rel=1e-3)


def test_openmax_is_its_formula() -> None:
    logits, labels = peaked(1500, 6)
    scorer = learnt("openmax", logits, labels, alpha=4)
    right = logits.argmax(1) == labels
    for k in range(6):
        centre = logits[right & (labels == k)].double().mean(0)
        torch.testing.assert_close(scorer.state["mean"][k], centre.float())
    probe = torch.randn(50, 6, generator=torch.Generator().manual_seed(8)) * 4
    mean, rate, location = (
        scorer.state[key].double().numpy() for key in ("mean", "rate", "location")
    )
    expected = shaping_oracles.openmax(probe.double().numpy(), mean, rate, location, 4)
    np.testing.assert_allclose(scored(scorer, probe), expected, rtol=1e-4, atol=1e-4)


def test_openmax_gives_a_class_that_was_never_seen_to_the_unknown() -> None:
    logits, labels = peaked(800, 5, wrong=0.0)
    kept = labels != 2
    scorer = learnt("openmax", logits[kept], labels[kept])
    probe = torch.zeros(2, 5)
    probe[0, 2], probe[1, 3] = 6.0, 6.0
    found = scored(scorer, probe)
    assert found[0] > found[1] + 3.0


def test_chunks_change_no_openmax_score() -> None:
    logits, labels = peaked(3000, 120)
    scorer = learnt("openmax", logits, labels)
    whole = scored(scorer, logits[:600])
    parts = np.concatenate([scored(scorer, part) for part in logits[:600].split(50)])
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-5)


def test_introspection_learns_from_known_outliers_and_from_errors() -> None:
    logits, labels = peaked(2000, 6, wrong=0.2)
    flat = torch.randn(500, 6, generator=torch.Generator().manual_seed(5)) * 0.5
    scorer = learnt(
        "introspection",
        torch.cat([logits, flat]),
        torch.cat([labels, torch.full((500,), -1)]),
        epochs=8,
    )
    fresh = torch.randn(300, 6, generator=torch.Generator().manual_seed(6)) * 0.5
    probe, _ = peaked(300, 6, seed=9, wrong=0.0)
    assert auroc(scored(scorer, probe), scored(scorer, fresh)) > 0.98


@pytest.mark.parametrize("name", ["kl_matching", "openmax", "temperature_scaling"])
def test_rows_that_are_not_finite_do_not_spoil_what_is_learnt(name: str) -> None:
    logits, labels = peaked(400, 5)
    spoilt = torch.cat([logits, torch.full((2, 5), math.nan)])
    whole = learnt(name, logits, labels)
    with_nan = learnt(name, spoilt, torch.cat([labels, torch.tensor([0, 1])]))
    for key, tensor in whole.state.items():
        torch.testing.assert_close(with_nan.state[key], tensor)


def test_bad_options_states_and_data_are_refused() -> None:
    logits, labels = peaked(60, 4)
    for name, options, word in (
        ("gen", {"gamma": 0.0}, "gamma"),
        ("gen", {"top": 0}, "top"),
        ("gen", {"least": 0.5}, "least"),
        ("doctor", {"kind": "gamma"}, "kind"),
        ("openmax", {"tail": 1}, "tail"),
        ("openmax", {"euclid_weight": 2.0}, "euclid_weight"),
        ("temperature_scaling", {"score_of": "gen"}, "score_of"),
        ("introspection", {"space": "probabilities"}, "space"),
    ):
        with pytest.raises(ContractError, match=word):
            detectors.create(name, **options)
    for name in ("openmax", "temperature_scaling", "introspection"):
        with pytest.raises(ContractError, match="labels"):
            Scorer.learn(detectors.create(name), Reference.from_arrays(logits=logits))
    for name in ("kl_matching", "openmax", "introspection"):
        scorer = learnt(name, logits, labels)
        with pytest.raises(ContractError, match="4 classes, found 3"):
            scored(scorer, logits[:, :3])
    with pytest.raises(StateError, match="location"):
        Scorer(detectors.create("openmax"), {"mean": torch.zeros(3, 3)})
