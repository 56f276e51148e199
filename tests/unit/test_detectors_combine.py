"""Detectors made of others: p-values by hand, held-out ranks, what is joined, what cannot be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from oodmon.calibration import Calibration  # noqa: E402
from oodmon.detectors import Reference, Scorer  # noqa: E402
from oodmon.detectors.combine import Combine, PerLayer  # noqa: E402
from oodmon.detectors.expressions import detector_of, text_of  # noqa: E402
from oodmon.detectors.tails import evidence, joined, ranked  # noqa: E402
from oodmon.errors import ContractError, StateError  # noqa: E402
from oodmon.evaluate import auroc  # noqa: E402
from oodmon.records import Activations  # noqa: E402
from tests import blobs  # noqa: E402

WIDTH = 8


def column(*values: float) -> Tensor:
    found: Tensor = torch.tensor([values])
    return found


def reference(rows: int = 600, seed: int = 0) -> Reference:
    features, labels = blobs.blobs(rows, WIDTH, seed=seed)
    draw = torch.Generator().manual_seed(seed + 100)
    return Reference.from_arrays(
        {"a": features, "b": torch.randn(rows, WIDTH, generator=draw)},
        blobs.logits(features),
        labels=labels,
        head=blobs.head(WIDTH),
        batch_size=64,
    )


def acts(features: Tensor, b: Tensor) -> Activations:
    return Activations(layers={"a": features, "b": b}, logits=blobs.logits(features))


def probabilities(scores: Sequence[float], against: Sequence[float]) -> list[float]:
    ranks, scale = ranked(column(*against))
    return torch.exp(-evidence(column(*scores), ranks, scale))[0].tolist()  # type: ignore[no-any-return]


def test_at_reference_scores_and_below_p_is_the_conformal_p_value() -> None:
    against = [1.0, 2.0, 2.0, 4.0]
    assert probabilities([0.5, 1.0, 2.0, 4.0], against) == pytest.approx([1.0, 1.0, 0.8, 0.4])


def test_p_is_never_below_the_conformal_one_inside_and_falls_on_outside() -> None:
    draw = np.random.default_rng(0)
    against = np.sort(draw.normal(size=200).round(1)).astype(np.float32)  # with ties
    scores = np.linspace(-4, float(against[-1]), 500).astype(np.float32)
    conformal = Calibration("d", "", against).tail_probabilities(scores)
    found = np.array(probabilities(scores.tolist(), against.tolist()))
    assert (found >= conformal - 1e-6).all()
    assert (np.diff(found) <= 1e-6).all()
    assert (found - conformal).max() < 0.1
    largest = float(against[-1])
    above = np.asarray(
        probabilities([largest + x for x in (0.0, 1.0, 10.0, 1e6)], against.tolist()), np.float64
    )
    assert (np.diff(above) < 0).all()
    assert above[0] == pytest.approx(found[-1], rel=1e-5)


def test_half_way_between_two_reference_scores_p_is_half_way() -> None:
    assert probabilities([3.0], [0.0, 2.0, 4.0]) == pytest.approx([2.5 / 4])


def test_the_tail_is_as_long_as_the_mean_excess_of_the_largest_tenth() -> None:
    against = [float(value) for value in range(20)]  # the largest two, over 17: 1 and 2
    assert probabilities([19.0 + 1.5], against) == pytest.approx([2 / 21 / 2])


def test_reference_scores_that_are_all_equal_do_not_break_it() -> None:
    found = probabilities([0.0, 1.0, math.inf, -math.inf], [0.0, 0.0, 0.0])
    assert found[0] == 1.0
    assert found[3] == 1.0
    assert found[1] < 1e-6
    assert 0.0 <= found[2] <= found[1]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("fisher", -2 * math.log(0.5 * 0.1)),
        ("max", -math.log(0.1)),
        ("mean", -math.log(0.3)),
    ],
)
def test_rules_by_hand(by: str, expected: float) -> None:
    found = joined(torch.tensor([[0.5], [0.1]]).log().neg(), by)
    assert float(found) == pytest.approx(expected)


def test_members_are_ranked_on_samples_that_they_have_not_learnt_from() -> None:
    """gram scores what it has learnt from lower; ranks that came from it would promise too much."""
    combine = Combine(of=("gram(layers=(a, b))",), learn_share=0.5)
    scorer = Scorer.learn(combine, reference(300))
    fresh, _ = blobs.blobs(4000, WIDTH, seed=9)
    draw = torch.Generator().manual_seed(7)
    evidence_of_fresh = scorer.score(acts(fresh, torch.randn(4000, WIDTH, generator=draw))) / 2
    share = float((evidence_of_fresh >= -math.log(0.05)).float().mean())
    assert 0.01 < share < 0.12  # 0.05 is expected, of 150 ranks
    assert 100 < scorer.state["ranks"].shape[1] < 200


def test_every_reference_row_is_either_learnt_from_or_ranked() -> None:
    data = reference(400)
    scorer = Scorer.learn(Combine(of=("knn(layer=a)", "energy")), data)
    assert len(scorer.state["0/bank"]) + scorer.state["ranks"].shape[1] == 400
    held = scorer.state["ranks"][1]
    energy = Scorer.learn(detector_of("energy"), data)
    everything = torch.cat([energy.score(batch) for batch in data])
    assert torch.isin(held, everything).all()


def test_fisher_sees_what_each_member_sees_a_little_of() -> None:
    scorers = {
        name: Scorer.learn(detector, reference(2000))
        for name, detector in {
            "a": detector_of("cosine(layer=a)"),
            "b": detector_of("mahalanobis(layer=b)"),
            "fisher": Combine(of=("cosine(layer=a)", "mahalanobis(layer=b)")),
        }.items()
    }
    inside, outside = (blobs.blobs(2000, WIDTH, seed=seed)[0] for seed in (1, 2))
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(2000, WIDTH, generator=draw)
    usual = acts(inside, torch.randn(2000, WIDTH, generator=draw))
    odd = acts(outside + 0.7 * noise, 1.3 * torch.randn(2000, WIDTH, generator=draw))
    found = {
        name: auroc(s.score(usual).numpy(), s.score(odd).numpy()) for name, s in scorers.items()
    }
    assert 0.55 < found["a"] < 0.95
    assert 0.55 < found["b"] < 0.95
    assert found["fisher"] > max(found["a"], found["b"]) + 0.01


def test_a_row_that_one_member_cannot_score_is_nan() -> None:
    scorer = Scorer.learn(Combine(of=("energy", "knn(layer=b)"), by="max"), reference())
    features, _ = blobs.blobs(6, WIDTH)
    b = torch.zeros(6, WIDTH)
    b[2] = math.nan
    assert scorer.score(acts(features, b)).isnan().nonzero().flatten().tolist() == [2]


def test_per_layer_is_combine_with_one_member_per_layer() -> None:
    features, _ = blobs.blobs(50, WIDTH, seed=4)
    probe = acts(features, features.roll(1, dims=0))
    each = Scorer.learn(PerLayer(of="cosine", by="mean"), reference())
    same = Scorer.learn(Combine(of=("cosine(layer=a)", "cosine(layer=b)"), by="mean"), reference())
    assert isinstance(each.detector, PerLayer)
    assert each.detector.layers == ("a", "b")
    assert torch.equal(each.score(probe), same.score(probe))
    gram = Scorer.learn(PerLayer(of="gram(powers=(1,))"), reference())
    assert isinstance(gram.detector, PerLayer)
    assert [member.reads().layers for member in gram.detector.members()] == [("a",), ("b",)]


def test_reads_and_pin_are_those_of_the_members() -> None:
    pinned = Combine(of=("energy", "knn", "rnd(target='inputs')")[:2]).pin(("a", "b"))
    assert pinned.of == ("energy", "knn(layer='b')")
    reads = pinned.reads()
    assert (reads.layers, reads.logits, reads.inputs, reads.model) == (("b",), True, False, False)
    assert Combine(of=("odin", "msp")).reads().model


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("energy", {"temperature": 1.0}),
        ("energy(temperature=2)", {"temperature": 2}),
        (
            "gram(powers=[1, 2], layers=(stage.conv, 'layer1.0'))",
            {"layers": ("stage.conv", "layer1.0")},
        ),
        ("gram(divide_by_confidence=false)", {"divide_by_confidence": False}),
        ("msp(scale=prob)", {"scale": "prob"}),
        ("combine(of=(msp, 'energy(temperature=2)'))", {"of": ("msp", "energy(temperature=2)")}),
    ],
)
def test_members_are_read_from_text_and_written_back(text: str, options: dict[str, object]) -> None:
    detector = detector_of(text)
    for name, value in options.items():
        assert getattr(detector, name) == value
    assert detector_of(text_of(detector)) == detector


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Combine(of=()), "names no detector"),
        (lambda: Combine(of=("msp", "msp")), "twice"),
        (lambda: Combine(of=("mps",)), "did you mean `msp`"),
        (lambda: Combine(of=("msp(temprature=2)",)), "did you mean `temperature`"),
        (lambda: Combine(of=("msp(temperature=-1)",)), "msp.temperature"),
        (lambda: Combine(of=("__import__('os').system('true')",)), "expected a detector's name"),
        (lambda: Combine(of=("msp(temperature=1+1j)",)), "expected a detector's name"),
        (lambda: Combine(of=("msp(2)",)), "expected a detector's name"),
        (lambda: Combine(of=("msp(**x)",)), "expected a detector's name"),
        (lambda: Combine(by="stouffer"), "combine.by"),  # type: ignore[arg-type]
        (lambda: Combine(learn_share=1.0), "combine.learn_share"),
        (lambda: Combine(rows=1), "combine.rows"),
        (lambda: PerLayer(of="msp"), "reads no layer"),
        (lambda: PerLayer(of="nothing"), "per_layer.of"),
        (lambda: PerLayer(layers=("a", "a")), "twice"),
    ],
)
def test_bad_options_are_named(make: object, told: str) -> None:
    with pytest.raises(ContractError, match=told.replace("*", r"\*")):
        make()  # type: ignore[operator]


def test_a_state_with_something_more_is_refused() -> None:
    scorer = Scorer.learn(Combine(of=("msp", "energy")), reference())
    with pytest.raises(StateError, match="more than its 2 members"):
        Scorer(scorer.detector, {**scorer.state, "2/bank": torch.zeros(1)})
    with pytest.raises(StateError, match="ranks"):
        Scorer(Combine(of=("msp",)), scorer.state)


def test_a_member_that_cannot_learn_is_named() -> None:
    unlabelled = Reference.from_arrays({"a": torch.rand(40, WIDTH)}, torch.rand(40, 3))
    with pytest.raises(ContractError, match=r"detectors\.combine: mahalanobis.*labels"):
        Scorer.learn(Combine(of=("msp", "mahalanobis")), unlabelled)
