"""What the detectors' benchmark concludes from its lines."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.detectors.frame import Joint, Line
from benchmarks.detectors.results import results, text


def line(method: str, rows: int, ratio: float, goal: float = 0.0, rank: float = 1.0) -> Line:
    return Line(method, f"{rows} rows", rows, 1e-5, ratio, rank, math.nan, goal, "")


LINES = [
    line("a", 1, 0.5),
    line("a", 64, 4.0),
    line("a", 256, 16.0, goal=20.0),
    line("b", 256, 2.0, rank=0.99),
    line("alone", 256, math.nan),
]


def found(lines: list[Line] = LINES, joints: tuple[Joint, ...] = ()) -> dict[str, Any]:
    return results(lines, joints)


def test_methods_are_averaged_after_their_settings() -> None:
    means = {row["batch"]: row["geometric_mean"] for row in found()["batches"]}
    assert means == pytest.approx(
        {
            "1": 0.5,
            "64": 4.0,
            "256": math.sqrt(16.0 * 2.0),
            "64 and more": math.sqrt(8.0 * 2.0),
            "all": math.sqrt((0.5 * 4.0 * 16.0) ** (1 / 3) * 2.0),
        }
    )
    counts = {row["batch"]: (row["methods"], row["lines"]) for row in found()["batches"]}
    assert counts["all"] == (2, 4)
    assert counts["64 and more"] == (2, 3)


def test_every_line_below_the_peer_is_named_and_no_other() -> None:
    assert [row["what"] for row in found()["below"]] == ["1 rows"]
    assert [row["method"] for row in found()["ranks"]] == ["b"]


def test_goals_say_whether_they_were_reached() -> None:
    joints = (Joint(("a", "b"), "1x10", 1, 1.31), Joint(("a", "b"), "256x10", 256, 1.3))
    goals = {row["what"]: row["reached"] for row in found(joints=joints)["goals"]}
    assert goals["a 256 rows"] is False
    assert [reached for what, reached in goals.items() if "a + b" in what] == [False, True]
    assert goals["none below 1x; least: a 1 rows"] is False
    better = found([line("a", 256, 20.0, goal=20.0)])
    assert all(row["reached"] for row in better["goals"])


def test_the_text_has_every_figure() -> None:
    told = text(found(joints=(Joint(("a", "b"), "1x10", 1, 1.31),)))
    for part in ("5.66x", "0.50x", "a 1 rows (0.50x)", "b 256 rows (2.00x)", "NOT REACHED"):
        assert part in told
    assert "below 1x: none" in text(found([line("a", 256, 20.0)]))
