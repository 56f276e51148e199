"""The probability of a wrong answer: what it learns, and what it is worth where it may be used."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from oodmon.detectors import Reference, Scorer
from oodmon.detectors.expected_error import ExpectedError
from oodmon.errors import ContractError, StateError
from oodmon.records import Activations


def _drawn(
    count: int, temperature: float, seed: int = 0, classes: int = 2
) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from softmax(logits / temperature)."""
    draw = torch.Generator().manual_seed(seed)
    logits = 3.0 * torch.randn((count, classes), generator=draw)
    shares = (logits / temperature).softmax(1)
    return logits, torch.multinomial(shares, 1, generator=draw).squeeze(1)


def _learnt(logits: Tensor, labels: Tensor, **options: Any) -> Scorer:
    return Scorer.learn(
        ExpectedError(**options), Reference.from_arrays(logits=logits, labels=labels)
    )


def _wrong(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) != labels).double().mean())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_two_classes_give_back_the_law_that_the_labels_came_from(temperature: float) -> None:
    # of two classes P(wrong) = sigmoid(u / T), u the log odds at temperature 1
    scorer = _learnt(*_drawn(40_000, temperature))
    assert float(scorer.state["slope"]) == pytest.approx(1.0 / temperature, rel=0.05)
    assert float(scorer.state["offset"]) == pytest.approx(0.0, abs=0.06)


@pytest.mark.parametrize("temperature", [0.7, 2.5])
def test_the_mean_is_the_error_rate_learnt_and_of_fresh_samples_however_reweighted(
    temperature: float,
) -> None:
    logits, labels = _drawn(20_000, temperature, classes=2)
    scorer = _learnt(logits, labels)
    mean = float(scorer.score(Activations(logits=logits)).double().mean())
    assert mean == pytest.approx(_wrong(logits, labels), abs=2e-4)
    fresh, truth = _drawn(40_000, temperature, seed=1)
    # covariate drift as the method supposes it: many more samples that the model doubts
    hard = (fresh[:, 0] - fresh[:, 1]).abs() < 2.0
    rate = _wrong(fresh[hard], truth[hard])
    assert rate > mean + 0.05
    now = float(scorer.score(Activations(logits=fresh[hard])).double().mean())
    assert now == pytest.approx(rate, abs=0.015)


def test_as_many_learnt_samples_are_above_the_threshold_as_are_wrong() -> None:
    logits, labels = _drawn(5_000, 1.5, classes=4)
    found = _learnt(logits, labels, kind="threshold").score(Activations(logits=logits))
    assert set(found.tolist()) == {0.0, 1.0}
    assert int(found.sum()) == int((logits.argmax(1) != labels).sum())


@pytest.mark.parametrize("kind", ["calibrated", "threshold"])
@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_is_always_right_or_always_wrong(kind: str, right: bool) -> None:
    logits, _ = _drawn(300, 1.0)
    labels = logits.argmax(1) if right else logits.argmin(1)
    scorer = _learnt(logits, labels, kind=kind)
    found = scorer.score(Activations(logits=logits))
    assert found.isfinite().all()
    if right:
        assert float(found.mean()) < 0.02
    else:
        assert float(found.mean()) > 0.98


def test_where_doubt_says_nothing_the_score_still_rises_with_it() -> None:
    logits, _ = _drawn(4_000, 1.0)
    sure = (logits[:, 0] - logits[:, 1]).abs() > 3.0
    labels = torch.where(
        sure, logits.argmin(1), logits.argmax(1)
    )  # the surer, the more often wrong
    scorer = _learnt(logits, labels)
    assert float(scorer.state["slope"]) == pytest.approx(0.05)
    found = scorer.score(Activations(logits=logits))
    assert float(found.mean()) == pytest.approx(float(sure.double().mean()), abs=0.01)
    doubtful = scorer.score(Activations(logits=torch.tensor([[4.0, 0.0], [1.0, 0.0]])))
    assert doubtful[1] > doubtful[0]


def test_rows_without_a_label_are_left_out_and_a_reference_without_labels_is_refused() -> None:
    logits, labels = _drawn(600, 1.0)
    known = _learnt(logits[:400], labels[:400])
    labels[400:] = -1
    part = _learnt(logits, labels)
    assert float(part.state["slope"]) == float(known.state["slope"])
    with pytest.raises(ContractError, match="no labels"):
        Scorer.learn(ExpectedError(), Reference.from_arrays(logits=logits))


def test_one_logit_is_a_binary_model() -> None:
    logits, labels = _drawn(2_000, 1.0)
    both = _learnt(logits, labels).score(Activations(logits=logits))
    one = (logits[:, 1] - logits[:, 0])[:, None]
    torch.testing.assert_close(_learnt(one, labels).score(Activations(logits=one)), both)


@pytest.mark.parametrize("kind", ["calibrated", "threshold"])
def test_a_row_of_nan_has_no_score(kind: str) -> None:
    scorer = _learnt(*_drawn(100, 1.0), kind=kind)
    found = scorer.score(Activations(logits=torch.tensor([[math.nan, 0.0], [5.0, 0.0]])))
    assert found[0].isnan()
    assert found[1].isfinite()


def test_options_and_state_are_checked() -> None:
    with pytest.raises(ContractError, match=r"kind: 'atc' is none of calibrated, threshold"):
        ExpectedError(kind="atc")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=r"rows: 0 is not positive"):
        ExpectedError(rows=0)
    with pytest.raises(StateError, match=r"expected \['threshold'\], found \['offset', 'slope'\]"):
        Scorer(ExpectedError(kind="threshold"), dict(_learnt(*_drawn(50, 1.0)).state))
    with pytest.raises(StateError, match=r"'threshold': expected \(\), found \(2,\)"):
        Scorer(ExpectedError(kind="threshold"), {"threshold": torch.zeros(2)})
