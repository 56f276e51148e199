"""Figures of the acceptance experiments: bounds are held, files keep what other runs left there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs import measured
from tests.figures import Figures


def test_a_missed_bound_is_said_and_a_kept_one_is_not() -> None:
    figures = Figures("tests/flows/test_x.py::test_y", None)
    figures.hold("B2", "seen", 0.7, seed=0, least=0.7)
    figures.hold("B2", "not seen", 0.6, seed=0, most=0.6)
    assert figures.missed == []
    figures.hold("B2", "seen", 0.6999, seed=1, least=0.7)
    figures.hold("B2", "not seen", 0.0001, seed=1, most=0.0)
    figures.hold("B2", "nothing", float("nan"), seed=1, least=0.0)
    assert figures.missed == [
        "B2 seen, seed 1: 0.6999, not >= 0.7",
        "B2 not seen, seed 1: 0.0001, not <= 0",
        "B2 nothing, seed 1: nan, not >= 0",
    ]
    for bounds in ({}, {"least": 0.1, "most": 0.2}):
        with pytest.raises(ValueError, match="give least or most"):
            figures.hold("B2", "seen", 0.7, seed=0, **bounds)


def test_the_file_keeps_other_figures_and_takes_new_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "acceptance.json"
    figures = Figures("tests/flows/test_x.py::test_y", path)
    for seed, value in ((1, 0.8), (0, 0.9), (2, 0.85)):
        figures.hold("B2", "seen | far", value, seed=seed, least=0.7)
    figures.hold("A1", "rise", 0.02, seed=0, most=0.1)
    figures.hold("B2", "seen | far", 0.95, seed=0, least=0.6, expected=0.7)
    rows = json.loads(path.read_text(encoding="utf-8"))["figures"]
    assert [(row["what"], row["seed"], row["value"]) for row in rows] == [
        ("rise", 0, 0.02),
        ("seen | far", 0, 0.95),
        ("seen | far", 1, 0.8),
        ("seen | far", 2, 0.85),
    ]
    assert {(row["least"], row["expected"]) for row in rows[1:]} == {(0.6, 0.7)}
    monkeypatch.setattr(measured, "_FOLDER", tmp_path)
    assert measured.experiments().splitlines() == [
        "### A1",
        "",
        "`tests/flows/test_x.py`",
        "",
        "|  | seed 0 | ±3 s.d. | bound | expected |",
        "| --- | --- | --- | --- | --- |",
        "| rise | 0.020 |  | ≤ 0.1 |  |",
        "",
        "### B2",
        "",
        "`tests/flows/test_x.py`",
        "",
        "|  | seed 0 | seed 1 | seed 2 | ±3 s.d. | bound | expected |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| seen \\| far | 0.950 | 0.800 | 0.850 | 0.638 | ≥ 0.6 | ≥ 0.7 |",
    ]
