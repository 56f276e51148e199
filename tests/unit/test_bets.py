"""The alternatives that the budget bets on: fair for uniform p, and pointing the right way."""

from __future__ import annotations

import numpy as np
import pytest

from oodmon.bets import bets
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
