"""AUROC, AUPR and the two FPR95 conventions, against definitions and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (  # type: ignore[import-untyped]
    average_precision_score,
    roc_auc_score,
)

from oodmon.errors import ContractError
from oodmon.evaluate import (
    aupr_in,
    aupr_out,
    auroc,
    evaluate,
    fpr95_ood,
    means,
    roc,
    tnr_at_tpr95,
)

scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=40)


@given(scores, scores)
def test_auroc_counts_pairs_and_halves_ties(ids: list[float], oods: list[float]) -> None:
    won = sum((o > i) + 0.5 * (o == i) for i in ids for o in oods)
    assert auroc(ids, oods) == won / (len(ids) * len(oods))
    assert auroc(ids, oods) + auroc(oods, ids) == pytest.approx(1.0, abs=1e-15)


@given(scores, scores)
def test_figures_agree_with_scikit_learn(ids: list[float], oods: list[float]) -> None:
    truth = np.r_[np.zeros(len(ids)), np.ones(len(oods))]
    both = np.r_[ids, oods]
    found = evaluate(ids, oods)
    assert found.auroc == pytest.approx(roc_auc_score(truth, both))
    assert found.aupr_out == pytest.approx(average_precision_score(truth, both))
    assert found.aupr_in == pytest.approx(average_precision_score(1 - truth, -both))
    assert (found.aupr_out, found.aupr_in) == (aupr_out(ids, oods), aupr_in(ids, oods))
    ties = np.mean([[o == i for i in ids] for o in oods])
    assert found.ties == pytest.approx(float(ties))
    assert (found.ids, found.oods) == (len(ids), len(oods))


@given(scores, scores)
def test_the_two_conventions_are_what_their_names_say(ids: list[float], oods: list[float]) -> None:
    inside, outside = np.array(ids), np.array(oods)
    keeping = [t for t in ids if np.mean(inside <= t) >= 0.95]
    assert tnr_at_tpr95(ids, oods) == np.mean(outside > min(keeping))
    catching = [t for t in oods if np.mean(outside >= t) >= 0.95]
    assert fpr95_ood(ids, oods) == np.mean(inside >= max(catching))


def test_the_conventions_differ() -> None:
    ids = np.arange(100.0)
    oods = np.r_[np.full(10, -1.0), np.full(90, 1000.0)]
    assert tnr_at_tpr95(ids, oods) == 0.9
    assert fpr95_ood(ids, oods) == 1.0


def test_separation_is_perfect_or_reversed() -> None:
    best, worst = evaluate([0.0, 1.0], [2.0, np.inf]), evaluate([2.0, 3.0], [0.0, 1.0])
    assert (best.auroc, best.aupr_out, best.tnr_at_tpr95, best.fpr95_ood) == (1.0, 1.0, 1.0, 0.0)
    assert (worst.auroc, worst.tnr_at_tpr95, worst.fpr95_ood) == (0.0, 0.0, 1.0)


def test_a_million_scores_are_quick_and_exact() -> None:
    draw = np.random.default_rng(0)
    ids = draw.normal(size=1_000_000).astype(np.float32)
    found = evaluate(ids, ids + np.float32(1.0))
    assert found.auroc == pytest.approx(0.7602, abs=2e-3)  # Φ(1/√2)


@pytest.mark.parametrize(("ids", "oods"), [([], [1.0]), ([1.0], []), ([[1.0]], [1.0])])
def test_an_empty_side_is_refused(ids: list[float], oods: list[float]) -> None:
    with pytest.raises(ContractError, match="expected"):
        evaluate(ids, oods)


def test_nan_is_refused() -> None:
    with pytest.raises(ContractError, match="1 are NaN"):
        auroc([0.0, np.nan], [1.0])


@given(scores, scores)
def test_the_roc_curve_is_every_threshold_and_its_area_is_the_auroc(
    ids: list[float], oods: list[float]
) -> None:
    flagged, caught = roc(ids, oods)
    inside, outside = np.array(ids), np.array(oods)
    thresholds = np.unique(np.r_[ids, oods])[::-1]
    assert flagged.tolist() == [0.0, *(float(np.mean(inside >= t)) for t in thresholds)]
    assert caught.tolist() == [0.0, *(float(np.mean(outside >= t)) for t in thresholds)]
    assert float(np.trapezoid(caught, flagged)) == pytest.approx(auroc(ids, oods))
    assert evaluate(ids, oods).fpr95_id == 1.0 - tnr_at_tpr95(ids, oods)


def test_means_are_over_all_data_sets_and_the_best_comes_first() -> None:
    good, poor = evaluate([0.0, 1.0], [2.0, 3.0]), evaluate([0.0, 1.0], [0.0, 1.0])
    near = {"poor": poor, "mixed": good, "unjudged": good}
    far = {"poor": poor, "mixed": poor, "unjudged": None}
    found = means({"near": near, "far": far})
    assert list(found.items()) == [("mixed", 0.75), ("poor", 0.5), ("unjudged", None)]
