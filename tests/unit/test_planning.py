"""`oodmon plan`: simulated promises and delays, and the yardstick beside them."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from oodmon.calibration import Calibration
from oodmon.cli import main
from oodmon.drift.ks import KolmogorovSmirnov
from oodmon.drift.yardstick import Yardstick
from oodmon.planning import CHANGES, Change, Plan, best
from oodmon.windows import Windowing

ROOT = Path(__file__).resolve().parents[2]


def calibration(detector: str = "d", n: int = 2_000) -> Calibration:
    rng = np.random.default_rng(0)
    scores = np.exp(rng.normal(size=n))
    return Calibration.from_scores(detector, f"digest-{detector}", scores, rng.integers(0, 8, n))


def planned(alpha: float = 0.05) -> Plan:
    tests = {"ks": KolmogorovSmirnov(alpha=alpha)}
    return Plan({"d": calibration()}, Windowing(1.0, allowed_lateness_seconds=0.0), tests, 100)


def test_without_a_change_false_alarms_come_as_often_as_stated() -> None:
    quiet = planned().quiet(600, 60.0, lambda: 0.0)["ks"]
    assert quiet.windows == 600
    assert quiet.promised == pytest.approx(20.0)
    assert 2 <= quiet.alarms <= 50


def test_larger_changes_are_found_sooner_and_never_before_a_window_ends() -> None:
    plan = planned()
    quiet = plan.quiet(50, 60.0, lambda: 0.0)
    small, large = (
        plan.delays(Change("", mean=mean), quiet, 10, 100, 60.0, lambda: 0.0)["ks"]
        for mean in (0.3, 1.5)
    )
    assert small.found == large.found == 10
    assert small.windows > large.windows == 1.0
    assert large.best == 1.0, "100 samples tell a shift of 1.5 σ within the first window"


def test_time_that_has_run_out_cuts_the_work_and_says_so() -> None:
    plan = planned()
    ticks = itertools.count()
    quiet = plan.quiet(10_000, 20.0, lambda: float(next(ticks)))
    assert quiet["ks"].windows < 30
    ticks = itertools.count()
    slow = planned(1e-9).delays(
        Change("", mean=0.1), quiet, 5, 10_000, 60.0, lambda: float(next(ticks))
    )["ks"]
    assert slow.runs == 1
    assert slow.within < 100


def test_the_yardstick_is_the_known_run_length_of_a_cusum() -> None:
    # Published for the one-sided CUSUM of N(0, 1) with reference value k = 0.5 and h = 4: run
    # length 335.4, delay for a shift by 1 of 8.38 (Hawkins and Olwell 1998, table 3.1).
    assert best(Change("", mean=1.0)).delay(335.4) == pytest.approx(8.38, rel=0.03)


def test_the_yardstick_goes_on_beyond_what_was_solved() -> None:
    yardstick = best(CHANGES[0])
    steps = [yardstick.delay(10.0**power) for power in (1, 3, 6, 9, 15, 18)]
    assert steps == sorted(steps)
    # 1 / KL per unit of the logarithm, KL = 0.5² / 2.
    assert (steps[-1] - steps[-2]) / (3 * math.log(10)) == pytest.approx(8.0, rel=0.05)


def test_a_yardstick_of_laws_that_are_alike_is_slow() -> None:
    rng = np.random.default_rng(0)
    same = rng.normal(-0.005, 0.1, 20_000)
    assert Yardstick(same, same + 0.01).delay(1_000.0) > 100.0


def _example(folder: Path) -> Path:
    config = folder / "digits.yaml"
    shutil.copy(ROOT / "examples" / "digits.yaml", config)
    (folder / "states").mkdir()
    for name in ("msp", "gram", "duq", "rnd"):
        calibration(name).save(folder / "states" / f"{name}.calibration.safetensors")
    return config


def test_plan_of_the_example(tmp_path: Path) -> None:
    config = _example(tmp_path)
    figure = tmp_path / "plan.png"
    told = CliRunner().invoke(
        main, ["plan", str(config), "--seconds", "0.1", "--rate", "200", "--plot", str(figure)]
    )
    assert told.exit_code == 0, told.output
    assert "budget: false alarms come at most 1 per 30 days" in told.output
    assert "windows of 1 s with 200 samples" in told.output
    for change in CHANGES:
        assert change.name in told.output
    assert figure.stat().st_size > 10_000


def test_plan_as_json(tmp_path: Path) -> None:
    config = _example(tmp_path)
    arguments = ["plan", str(config), "--seconds", "0.1", "--window-samples", "400", "--json"]
    told = CliRunner().invoke(main, arguments)
    assert told.exit_code == 0, told.output
    rows = [json.loads(line) for line in told.output.splitlines()]
    assert [row["change"] for row in rows] == [change.name for change in CHANGES]
    large = rows[1]
    assert large["found"] == large["runs"] >= 1
    assert 1.0 <= large["best_windows"] <= large["delay_windows"] < 20.0


def test_plan_without_calibrations_says_what_to_do(tmp_path: Path) -> None:
    config = tmp_path / "digits.yaml"
    shutil.copy(ROOT / "examples" / "digits.yaml", config)
    told = CliRunner().invoke(main, ["plan", str(config)])
    assert told.exit_code == 1
    assert "oodmon fit" in told.output
