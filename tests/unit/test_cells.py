"""Ranks within a context: blind to the mix of traffic, not to a change within class or hour."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from oodmon.calibration import Calibration
from oodmon.cells import Cells
from oodmon.contexts import Context
from oodmon.drift.budget import Budget
from oodmon.errors import ContractError
from oodmon.pipeline import Pipeline
from oodmon.records import ALL, BIN_EDGES, DriftResult, Fact, Notice, ScoreBatch
from oodmon.windows import Windowing
from tests.streams import EPOCH, SECOND, batch

CLASSES = Context(("predicted",))
LEVELS = np.array([0.0, 2.0, 4.0])
"""Mean score of each class: the mix of classes makes the law of all scores."""


def _traffic(
    rng: np.random.Generator, rows: int, shares: list[float]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    classes = rng.choice(3, rows, p=shares).astype(np.int32)
    return (rng.normal(size=rows) + LEVELS[classes]).astype(np.float32), classes


def _calibration(rows: int = 4000, shares: tuple[float, ...] = (0.5, 0.3, 0.2)) -> Calibration:
    scores, classes = _traffic(np.random.default_rng(0), rows, list(shares))
    return Calibration.from_scores("msp", "digest-msp", scores, classes)


def _batch(rng: np.random.Generator, rows: int, shares: list[float], at: int = 0) -> ScoreBatch:
    scores, classes = _traffic(rng, rows, shares)
    return batch(scores, at, at, predicted=classes)


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
def test_the_law_of_the_bins_does_not_depend_on_the_mix(shares: list[float]) -> None:
    cells = Cells(_calibration(), CLASSES)
    reference = cells.reference("m", "1").histogram("msp").counts
    bins = cells.bins(_batch(np.random.default_rng(1), 200_000, shares))
    found = np.cumsum(np.bincount(bins, minlength=64)) / 200_000
    expected = np.cumsum(reference) / reference.sum()
    # The cells' own sampling error: the smallest has some 800 scores.
    assert np.abs(found - expected).max() < 1.6 / np.sqrt(cells.least)


def test_places_are_those_that_the_reference_counts() -> None:
    """Against itself, averaged over what is drawn, each cell fills its places evenly."""
    rng = np.random.default_rng(2)
    total = np.zeros(64)
    for seed in range(400):
        draw = np.random.default_rng(seed)
        scores = draw.normal(size=60).astype(np.float32)
        cells = Cells(Calibration.from_scores("msp", "", scores, np.zeros(60, np.int32)), CLASSES)
        fresh = dataclasses.replace(
            batch(rng.normal(size=50), sequence=seed), predicted=np.zeros(50, np.int32)
        )
        total += np.bincount(cells.bins(fresh), minlength=64)
    places = cells.reference("m", "1").histogram("msp").counts.astype(float)
    places[np.searchsorted(BIN_EDGES, 1 / 61) - 1] += 1
    expected = 20_000 * places / 61
    assert np.all(total[expected == 0] == 0)
    full = expected > 0
    assert ((total - expected)[full] ** 2 / expected[full]).sum() < 3 * full.sum()


def test_bins_are_the_same_on_replay_and_nan_stays_out() -> None:
    cells = Cells(_calibration(), CLASSES)
    one = _batch(np.random.default_rng(3), 20_000, [0.4, 0.3, 0.3])
    np.testing.assert_array_equal(cells.bins(one), cells.bins(one))
    assert (cells.bins(one) != cells.bins(dataclasses.replace(one, sequence=1))).any()
    hole = batch([np.nan, 0.0], predicted=np.array([0, 1], np.int32))
    assert (cells.bins(hole)[0], cells.bins(hole)[1] >= 0) == (-1, True)


def test_rare_and_unknown_classes_share_a_cell() -> None:
    rng = np.random.default_rng(4)
    classes = np.repeat(np.array([0, 1, 2, 3], np.int32), [500, 40, 30, 2])
    cells = Cells(Calibration.from_scores("msp", "", rng.normal(size=572), classes), CLASSES)
    assert cells.least == 72
    for label in (1, 3, 99, -1):
        same = batch(rng.normal(size=5000), predicted=np.full(5000, label, np.int32))
        assert np.mean(cells.bins(same)) == pytest.approx(45, abs=4)
    # No predicted classes at all: ranked with the rare ones.
    assert (cells.bins(batch([50.0])) < 32).all()
    few = np.repeat(np.array([0, 1], np.int32), [500, 3])
    whole = Cells(Calibration.from_scores("msp", "", rng.normal(size=503), few), CLASSES)
    assert whole.least == 500


def _alarms(context: tuple[str, ...], shares: list[float], shift: float) -> bool:
    rng = np.random.default_rng(5)
    tests = {"b": Budget("1 per 1000 windows", tolerated_fraction=0.0)}
    pipeline = Pipeline(
        "m", "1", {"msp": _calibration()}, Windowing(1, 0, 0), tests, {}, context=Context(context)
    )
    facts = []
    for at in range(120):
        one = _batch(rng, 64, shares if at >= 40 else [0.5, 0.3, 0.2], at)
        moved = one.scores["msp"] + np.float32(shift) * (one.predicted == 1) * (at >= 40)
        facts += pipeline.step(dataclasses.replace(one, scores={"msp": moved.astype(np.float32)}))
    found = [f for f in facts if isinstance(f, DriftResult) and f.detector == ALL]
    return any(result.drifted for result in found)


def test_another_mix_is_a_change_only_without_context() -> None:
    assert _alarms((), [0.2, 0.3, 0.5], 0.0)
    assert not _alarms(("predicted",), [0.2, 0.3, 0.5], 0.0)
    assert _alarms(("predicted",), [0.5, 0.3, 0.2], 1.5)


HOUR = 3600 * SECOND
DAY = 24 * HOUR
TYPICAL = 2.0 * np.sin(np.arange(24) * np.pi / 12.0)
"""Mean score of each hour of the day: the hours' shares of the traffic make the law of all."""


def _of_hours(rows: int, seed: int) -> Calibration:
    """Held-out traffic of some days, spread evenly over them; NaN at the places that are so."""
    rng = np.random.default_rng(seed)
    times = EPOCH - EPOCH % DAY + rng.integers(0, 7 * DAY, rows)
    scores = rng.normal(size=rows) + TYPICAL[times // HOUR % 24]
    scores[:7] = np.nan
    return Calibration.from_scores("msp", "digest-msp", scores, times=times)


QUIET_DAYS = 6


def _days(context: Context, busy: int, moved: int) -> list[bool]:
    """Whether there was an alarm, per day; after some days one hour is busy, or its scores move."""
    tests = {"b": Budget("1 per 1000 windows", tolerated_fraction=0.0)}
    windowing = Windowing(86_400, 0, 0)
    pipeline = Pipeline(
        "m", "1", {"msp": _of_hours(12_000, 6)}, windowing, tests, {}, context=context
    )
    rng = np.random.default_rng(7)
    start = (EPOCH - EPOCH % DAY + 7 * DAY - EPOCH) / SECOND
    facts: list[Fact] = []
    for at in range(24 * 2 * QUIET_DAYS):
        hour, late = at % 24, at >= 24 * QUIET_DAYS
        rows = 400 if late and hour == busy else 30
        scores = rng.normal(size=rows) + TYPICAL[hour] + 2.0 * (late and hour == moved)
        facts += pipeline.step(batch(scores, start + 3600.0 * at, at))
    assert not [fact for fact in facts if isinstance(fact, Notice)]
    return [f.drifted for f in facts if isinstance(f, DriftResult) and f.detector == ALL]


def test_a_busy_hour_is_a_change_only_without_context() -> None:
    plain = _days(Context(), 6, -1)
    assert not any(plain[:QUIET_DAYS])
    assert any(plain[QUIET_DAYS:])
    assert not any(_days(Context(("hour",)), 6, -1))


def test_a_change_within_one_hour_is_found_within_it() -> None:
    found = _days(Context(("hour",)), -1, 18)
    assert not any(found[:QUIET_DAYS])
    assert any(found[QUIET_DAYS:])


def test_hours_are_those_of_the_time_zone_summer_and_winter() -> None:
    winter = 1_705_323_600 * SECOND  # 2024-01-15 13:00 UTC
    summer = 1_721_048_400 * SECOND  # 2024-07-15 13:00 UTC
    times = np.array([winter, summer, winter + 1_799 * SECOND])
    assert Context(("hour",)).hours(times).tolist() == [13, 13, 13]
    assert Context(("hour",), "Europe/Berlin").hours(times).tolist() == [14, 15, 14]
    assert Context(("hour",), "Asia/Kolkata").hours([winter, winter + 1_800 * SECOND]).tolist() == [
        18,
        19,
    ]
    assert Context(("hour",)).hours(np.empty(0, np.int64)).shape == (0,)


def _of_segments(shares: tuple[float, ...] = (0.6, 0.38, 0.02), rows: int = 2_000) -> Calibration:
    rng = np.random.default_rng(8)
    names = rng.choice(["north", "south", "rare"], rows, p=shares)
    scores = rng.normal(size=rows) + 3.0 * (names == "south") + 30.0 * (names == "rare")
    return Calibration.from_scores("msp", "digest-msp", scores, segments=names)


def test_segments_are_ranked_by_name_and_strangers_are_told_once() -> None:
    calibration = _of_segments()
    cells = Cells(calibration, Context(("segment",)))
    rng = np.random.default_rng(9)

    def place(names: tuple[str, ...], mean: float) -> float:
        one = batch(
            rng.normal(size=4_000) + mean,
            segment=np.full(4_000, len(names) - 1, np.int32),
            segments=names,
        )
        return float(np.mean(cells.bins(one)))

    own = place(("north",), 0.0)
    assert place(("x", "y", "south"), 3.0) == pytest.approx(own, abs=1.5)
    assert place(("south",), 0.0) > own + 5.0
    # Of 2,000 some 40 are rare: these, and a segment never seen, are ranked among everything.
    assert calibration.segments == ("north", "rare", "south")
    assert cells.least < 900
    assert place(("rare",), 30.0) < 20.0
    assert place(("new",), 0.0) == pytest.approx(place(("rare",), 0.0), abs=1.5)

    pipeline = Pipeline(
        "m", "1", {"msp": calibration}, Windowing(1, 0, 0), {}, {}, context=Context(("segment",))
    )
    facts = []
    for at in range(3):
        facts += pipeline.step(
            batch(
                [0.0, 0.0],
                at,
                at,
                segment=np.array([0, 1], np.int32),
                segments=("north", "new", "absent"),
            )
        )
    facts += pipeline.step(batch([0.0], 3, 3))
    told = [fact.text for fact in facts if isinstance(fact, Notice)]
    assert [text.split(" has too few")[0] for text in told] == ["segment 'new'", "segment ''"]
    again = Pipeline(
        "m", "1", {"msp": calibration}, Windowing(1, 0, 0), {}, {}, context=Context(("segment",))
    )
    again.thaw(pipeline.freeze())
    assert not [f for f in again.step(batch([0.0], 4, 4)) if isinstance(f, Notice)]


def test_contexts_combine_and_an_unseen_pair_is_rare() -> None:
    rng = np.random.default_rng(10)
    rows = 6_000
    names = rng.choice(["a", "b"], rows)
    classes = rng.choice(2, rows).astype(np.int32)
    alone = (names == "a") & (classes == 1)
    scores = (rng.normal(size=rows) + 4.0 * (names == "b") + 8.0 * classes)[~alone]
    times = EPOCH + rng.integers(0, 2, rows) * HOUR
    calibration = Calibration.from_scores(
        "msp",
        "digest-msp",
        scores,
        classes[~alone],
        segments=names[~alone],
        times=times[~alone],
    )
    cells = Cells(calibration, Context(("segment", "predicted", "hour"), "Asia/Tokyo"))
    assert 600 < cells.least < 800

    def mean(segment: str, label: int, at: float, level: float) -> float:
        one = batch(
            rng.normal(size=3_000) + level,
            at,
            segment=np.zeros(3_000, np.int32),
            segments=(segment,),
            predicted=np.full(3_000, label, np.int32),
        )
        return float(np.mean(cells.bins(one)))

    own = mean("b", 1, 0.0, 12.0)
    assert mean("b", 0, 3600.0, 4.0) == pytest.approx(own, abs=2.0)
    assert mean("a", 0, 0.0, 0.0) == pytest.approx(own, abs=2.0)
    # (a, 1) and a third hour were never seen: ranked among everything, whose median is about 4.
    assert mean("a", 1, 0.0, 20.0) < 20.0
    assert mean("b", 1, 2 * 3600.0, 20.0) < 20.0
    assert cells.strangers(batch([0.0], 2 * 3600.0, segment=np.zeros(1, np.int32), segments=("a",)))


@pytest.mark.parametrize(
    ("name", "said"), [("predicted", "logits"), ("segment", "`segments`"), ("hour", "`times`")]
)
def test_a_calibration_that_lacks_the_context_is_refused(name: str, said: str) -> None:
    with pytest.raises(ContractError, match=rf"context.*'msp'.*oodmon fit.*{said}"):
        Cells(Calibration.from_scores("msp", "", np.arange(9.0)), Context((name,)))


def test_what_is_no_context_is_refused() -> None:
    with pytest.raises(ContractError, match=r"context: expected .* found 'weather'"):
        Context(("weather",))
    with pytest.raises(ContractError, match="twice"):
        Context(("hour", "hour"))
    for zone in ("Berlin", "../../etc/passwd", ""):
        with pytest.raises(ContractError, match="time_zone"):
            Context((), zone)
