"""The alternatives that the budget bets on: fair for uniform p, and pointing the right way."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from oodmon.drift.bets import bets
from oodmon.drift.neighbours import Alike
from oodmon.errors import ContractError
from oodmon.records import BIN_EDGES

BINS = len(BIN_EDGES) - 1


def _uniform(n: int) -> tuple[int, ...]:
    return tuple(np.round(n * np.diff(BIN_EDGES)).astype(int).tolist())


def test_some_bet_gains_on_every_direction_of_change() -> None:
    found = bets(_uniform(1_000_000), 0.0, 0.05, "frozen")
    z = np.cumsum(np.diff(BIN_EDGES)) - np.diff(BIN_EDGES) / 2
    directions = {
        "more in the tail": np.where(z < 0.1, 3.0, 1.0),
        "less in the tail": np.where(z < 0.1, 0.2, 1.0),
        "more in the middle": np.where(abs(z - 0.5) < 0.25, 2.0, 0.5),
        "more at both ends": np.where(abs(z - 0.5) > 0.4, 3.0, 0.7),
        "more ordinary": np.where(z > 0.6, 2.0, 0.7),
    }
    for name, change in directions.items():
        law = found.q * change
        growth = found.log_bets @ (law / law.sum())
        assert growth.max() > 0.01, name
    # Where nothing changes, every bet loses: the mean of a fair bet's log is below log 1.
    assert (found.log_bets @ found.q).max() <= 0.0


def test_tables_are_shared_and_follow_the_reference() -> None:
    assert bets(_uniform(1000), 0.01, 0.05, "frozen") is bets(_uniform(1000), 0.01, 0.05, "frozen")
    small, large = (
        bets(_uniform(300), 0.01, 0.05, "frozen"),
        bets(_uniform(30_000), 0.01, 0.05, "frozen"),
    )
    assert small.least_shift > large.least_shift > 0
    assert small.least_share > large.least_share > 0
    with pytest.raises(ContractError, match="no calibration scores"):
        bets((0,) * BINS, 0.01, 0.05, "auto")


def test_what_correlated_samples_are_worth_is_what_a_simulation_shows() -> None:
    """Variance of window sums of each bet over AR(1) scores, against independent ones."""
    found = bets(_uniform(100_000), 0.0, 0.05, "sequential")
    rng = np.random.default_rng(0)
    windows, rows = 2000, 200
    noise = rng.normal(size=(rows, windows))
    for phi in (0.3, 0.6):
        z = [rng.normal(size=windows)]
        for row in noise[1:]:
            z.append(phi * z[-1] + np.sqrt(1 - phi**2) * row)
        edges = np.array([NormalDist().inv_cdf(1 - edge) for edge in BIN_EDGES[1:-1]])
        bins = BINS - 1 - np.searchsorted(edges[::-1], np.array(z), side="left")
        worth = found.worth(Alike(np.array(phi), np.zeros(()), np.array(phi)))
        for log_bet, expected in zip(found.log_bets, worth, strict=True):
            values = log_bet[bins]
            ratio = values.sum(0).var() / (rows * values.var())
            assert ratio == pytest.approx(expected, rel=0.2)
        # A shift pays in full, a spread for φ² only, and nothing is worth more than a sample.
        assert worth.max() == pytest.approx((1 + phi) / (1 - phi), rel=0.05)
        assert worth.min() >= 1.0
        assert np.sort(worth)[5] < (1 + phi**2) / (1 - phi**2) * 1.2
    none = np.zeros(())
    assert found.worth(Alike(none, none, none)) == pytest.approx(1.0)
    # Where samples repeat the one before them, every bet pays as a shift does.
    repeated = Alike(np.full(2, 0.5), np.array([1.0, 0.0]), np.full(2, 0.5))
    assert found.worth(repeated)[0] == pytest.approx(3.0)
    assert found.worth(repeated)[1].min() < 1.5


def test_weights_sum_to_one_and_frozen_bets_have_the_smaller_part() -> None:
    found = bets(_uniform(50_000), 0.0, 0.05, "auto")
    assert np.exp(found.log_weights).sum() == pytest.approx(1.0)
    assert 0 < found.sequential < len(found.log_bets)
    assert np.exp(found.log_weights[found.sequential :]).sum() == pytest.approx(0.15)
    # With too few scores for frozen ranks, the sequential ones have everything.
    few = bets((*(0,) * (BINS - 1), 3), 0.0, 0.05, "auto")
    assert few.sequential == len(few.log_bets)
    assert np.exp(few.log_weights).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("shift", [0.08, 0.1, 0.18, 0.35, 0.7, 1.4])
def test_a_shift_between_two_that_are_bet_on_is_paid_for(shift: float) -> None:
    """A bet on somewhat less or more wins most of what the right one would."""
    normal = NormalDist()
    inner = [normal.cdf(normal.inv_cdf(edge) + shift) for edge in BIN_EDGES[1:-1].tolist()]
    shifted = np.diff([0.0, *inner, 1.0])
    possible = float(shifted @ np.log(shifted / np.diff(BIN_EDGES)))
    found = bets(_uniform(10_000), 0.0, 0.05, "sequential")
    assert float((found.log_bets @ shifted).max()) > 0.8 * possible
