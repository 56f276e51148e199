"""Who is proposed: gain for cost, within the budget, no twins; ranks as scipy has them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from oodmon.fitting.proposal import coverage, propose, rank_correlation


def chosen(
    auroc: list[list[float]], cost: list[float], budget: float = 10.0, alike: float = 0.0
) -> list[int]:
    correlation = np.full((len(auroc), len(auroc)), alike)
    np.fill_diagonal(correlation, 1.0)
    return propose(np.array(auroc), np.array(cost), correlation, budget)


def test_coverage_is_the_mean_of_the_best_and_never_below_chance() -> None:
    assert coverage(np.array([[0.9, 0.2], [0.6, np.nan]])) == pytest.approx(0.7)
    assert coverage(np.empty((0, 3))) == 0.5
    assert coverage(np.empty((2, 0))) == 0.5


def test_those_that_see_different_things_are_taken_together() -> None:
    assert sorted(chosen([[0.9, 0.5], [0.5, 0.9], [0.7, 0.7]], [1, 1, 1])) == [0, 1]


def test_what_others_made_redundant_is_taken_out_again() -> None:
    # the cheap one comes first, by gain per cost, and adds nothing once the dear one is there
    assert chosen([[0.7, 0.7], [0.9, 0.9]], [0.1, 1.0]) == [1]


def test_a_dear_one_that_alone_beats_the_cheap_ones_is_taken_instead() -> None:
    assert chosen([[0.6, 0.5], [1.0, 1.0]], [0.1, 10.0]) == [1]


def test_the_budget_is_never_passed() -> None:
    assert chosen([[0.9, 0.5], [0.5, 0.9]], [6, 6]) in ([0], [1])
    assert chosen([[0.9, 0.5], [0.5, 0.9]], [11, 11]) == []


def test_twins_are_not_taken_together() -> None:
    assert len(chosen([[0.9, 0.5], [0.5, 0.9]], [1, 1], alike=0.96)) == 1
    assert len(chosen([[0.9, 0.5], [0.5, 0.9]], [1, 1], alike=0.94)) == 2


def test_who_sees_nothing_is_not_proposed() -> None:
    assert chosen([[0.5, 0.3], [0.501, 0.5]], [1, 1]) == []


def test_random_proposals_are_near_the_best_set() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        auroc = draw.uniform(0.4, 1.0, (6, 4))
        cost = draw.uniform(0.5, 4.0, 6)
        found = propose(auroc, cost, np.eye(6), 5.0)
        assert cost[found].sum() <= 5.0
        sets = ([row for row in range(6) if number >> row & 1] for number in range(64))
        best = max(coverage(auroc[rows]) for rows in sets if cost[rows].sum() <= 5.0)
        assert coverage(auroc[found]) - 0.5 >= 0.6 * (best - 0.5)


def test_rank_correlation_is_spearmans_with_ties() -> None:
    draw = np.random.default_rng(1)
    scores = draw.normal(size=(3, 200)).round(1)
    scores[1] += scores[0]
    expected = spearmanr(scores, axis=1).statistic
    assert rank_correlation(scores) == pytest.approx(expected)
    scores[2, 5] = np.nan
    kept = np.delete(scores, 5, axis=1)
    assert rank_correlation(scores) == pytest.approx(spearmanr(kept, axis=1).statistic)


def test_a_constant_row_agrees_with_nobody() -> None:
    found = rank_correlation(np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]))
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert rank_correlation(np.full((2, 3), np.nan)).tolist() == [[1.0, 0.0], [0.0, 1.0]]
